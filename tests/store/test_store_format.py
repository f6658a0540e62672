"""The bytes of format version 1, and what happens when they are not what they should be."""

import copy
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from store_samples import (
    CACHED,
    LISTED,
    append,
    edit_manifest,
    find,
    full_store,
    places,
    rows_of,
    unreadable,
    writer_of,
)

from logra_kernels.store import (
    Module,
    Store,
    StoreError,
    StoreFormatError,
    StoreWriter,
    verify_store,
)
from logra_kernels.store.manifest import seal


def test_golden_store(tmp_path: Path) -> None:
    """Written out byte by byte; only the Arrow file's bytes are Arrow's own business."""
    with StoreWriter.create(tmp_path, modules=[Module("a", 1, 2), Module("b", 1, 1)]) as writer:
        writer.set_module_exponents([0, -5])
        rows = np.array([[1, -2, 0.5], [65504, 2**-24, 0]], np.float16)
        writer.append(["x", 7], rows, np.array([2, 0.25], np.float32), [{"text": "ü"}, None])

    head = b"\x93NUMPY\x01\x00\xf6\x0f"
    text = b"{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3), }"
    data = bytes.fromhex("003c 00c0 0038 ff7b 0100 0000")
    assert (tmp_path / "shard-00000.npy").read_bytes() == head + text.ljust(4085) + b"\n" + data
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
    scale = bytes.fromhex("00000040 0000803e")
    assert (tmp_path / "shard-00000.scale.npy").read_bytes() == head + text.ljust(
        4085
    ) + b"\n" + scale

    ids = (tmp_path / "shard-00000.ids.arrow").read_bytes()
    table = pa.ipc.open_file(ids).read_all()
    assert str(table.schema) == "id: large_string not null\nmetadata: large_string"
    assert table.to_pylist() == [
        {"id": "x", "metadata": '{"text": "ü"}'},
        {"id": "7", "metadata": None},
    ]

    sealed = f"""{{
 "format": "logra_kernels.store",
 "version": 1,
 "state": "finalized",
 "dtype": "float16",
 "endianness": "little",
 "modules": [
  {{
   "name": "a",
   "ko": 1,
   "ki": 2,
   "offset": 0
  }},
  {{
   "name": "b",
   "ko": 1,
   "ki": 1,
   "offset": 2
  }}
 ],
 "module_exponents": [
  0,
  -5
 ],
 "projection": null,
 "projection_tensors": null,
 "fingerprints": null,
 "rows": 2,
 "shards": [
  {{
   "rows": 2,
   "first_row": 0,
   "data": {{
    "file": "shard-00000.npy",
    "bytes": 4108,
    "crc32": "{zlib.crc32(data):08x}"
   }},
   "scale": {{
    "file": "shard-00000.scale.npy",
    "bytes": 4104,
    "crc32": "{zlib.crc32(scale):08x}"
   }},
   "ids": {{
    "file": "shard-00000.ids.arrow",
    "bytes": {len(ids)},
    "crc32": "{zlib.crc32(ids):08x}"
   }}
  }}
 ],
 "curvature": {{}}"""
    seal = f',\n "crc32": "{zlib.crc32(sealed.encode()):08x}"\n}}\n'
    assert (tmp_path / "manifest.json").read_bytes() == (sealed + seal).encode()
    assert sorted(os.listdir(tmp_path)) == [
        "lock",
        "manifest.json",
        "shard-00000.ids.arrow",
        "shard-00000.npy",
        "shard-00000.scale.npy",
    ]


def test_safetensors_opens_our_tensors(tmp_path: Path, store: Store) -> None:
    """The header is written here, not by the library: it must agree, byte for byte in the data."""
    tensors = {"c": np.arange(3.0), "a": np.array([[1, 2]], np.float32), "empty": np.zeros((2, 0))}
    store.save_curvature("mixed", tensors, None)
    path = find(tmp_path, "curvature/mixed-*.safetensors")
    got = safetensors.numpy.load(path.read_bytes())
    assert {name: (value.dtype, value.shape) for name, value in got.items()} == {
        name: (value.dtype, value.shape) for name, value in tensors.items()
    }
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


@pytest.mark.parametrize("pattern", LISTED)
@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_cut_file_is_named(tmp_path: Path, pattern: str, keep: float, store: Store) -> None:
    path = find(tmp_path, pattern)
    data = path.read_bytes()
    size = int(len(data) * keep) if 0 < keep < 1 else int(keep) % len(data)
    path.write_bytes(data[:size])
    with pytest.raises(StoreFormatError) as caught:
        Store.open(tmp_path)
    assert str(path) in str(caught.value)
    if pattern != "manifest.json":
        assert str(caught.value) == f"{path}: expected {len(data)} bytes, got {size}"
    assert verify_store(tmp_path, checksums=False) == [str(caught.value)]
    assert str(caught.value) in verify_store(tmp_path)


@pytest.mark.parametrize("pattern", LISTED[1:])
def test_a_file_that_has_grown_or_gone_is_named(tmp_path: Path, pattern: str, store: Store) -> None:
    path = find(tmp_path, pattern)
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"x")
    unreadable(f"expected {size} bytes, got {size + 1}", Store.open, tmp_path)
    path.unlink()
    unreadable("the manifest lists this file, but it is missing", Store.open, tmp_path)
    path.mkdir()
    unreadable("cannot be read: Is a directory", Store.open, tmp_path)


@pytest.mark.parametrize("pattern", [*LISTED, *CACHED])
def test_a_flipped_bit_is_found_and_named(tmp_path: Path, pattern: str, store: Store) -> None:
    path = find(tmp_path, pattern)
    data = path.read_bytes()
    places = {0, 5, 9, 20, len(data) // 2, len(data) - 1}
    places.update(np.random.default_rng(0).integers(0, len(data), 12).tolist())
    for place in sorted(places):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        problems = verify_store(tmp_path)
        assert problems, f"byte {place} of {path.name}"
        assert all(str(path) in problem for problem in problems)
    path.write_bytes(data)
    assert verify_store(tmp_path) == []


def test_verify_names_every_bad_file(tmp_path: Path, store: Store) -> None:
    (tmp_path / "shard-00000.npy").unlink()
    cut = tmp_path / "shard-00001.ids.arrow"
    cut.write_bytes(cut.read_bytes()[:-3])
    scale = tmp_path / "shard-00002.scale.npy"
    scale.write_bytes(scale.read_bytes()[:-1] + b"\x7f")
    problems = store.verify()
    assert [Path(problem.split(": ")[0]).name for problem in problems] == [
        "shard-00000.npy",
        "shard-00001.ids.arrow",
        "shard-00002.scale.npy",
    ]
    assert "damaged: expected crc32" in problems[2]


def test_verify_reports_progress(tmp_path: Path, store: Store) -> None:
    calls: list[tuple[int, int]] = []
    assert store.verify(progress=lambda done, total: calls.append((done, total))) == []
    done = [call[0] for call in calls]
    assert done == sorted(done)
    shards = [entry for shard in store.manifest["shards"] for entry in shard.values()]
    files = [entry["bytes"] for entry in shards if isinstance(entry, dict)]
    files.append(store.manifest["projection_tensors"]["bytes"])
    files.append(store.curvatures["raw"]["bytes"])
    assert calls[-1] == (sum(files), sum(files))
    (tmp_path / "shard-00000.npy").unlink()
    store.verify(progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (sum(files), sum(files))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def reseal_shard(folder: Path, key: str, name: str, start: int) -> None:
    """Make the manifest agree with a file that was changed."""
    crc = zlib.crc32((folder / name).read_bytes()[start:])

    def change(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            if shard[key]["file"] == name:
                shard[key]["crc32"] = f"{crc:08x}"
                shard[key]["bytes"] = (folder / name).stat().st_size

    edit_manifest(folder, change)


def test_verify_looks_at_the_values_too(tmp_path: Path, store: Store) -> None:
    """A buggy writer's checksum agrees with its wrong values."""
    rows = tmp_path / "shard-00001.npy"
    overwrite(rows, 4096 + 2 * 13, b"\x00\x7c")  # an infinity in the second row
    reseal_shard(tmp_path, "data", rows.name, 4096)
    scale = tmp_path / "shard-00000.scale.npy"
    overwrite(scale, 4096 + 8, np.float32(3).tobytes())
    reseal_shard(tmp_path, "scale", scale.name, 4096)
    assert verify_store(tmp_path) == [
        f"{scale}: expected powers of two, got 3.0 for row 2",
        f"{rows}: expected finite values, got others in row 4",
    ]


def write_ids(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def ids_of(ids: list[str | None], metadata: list[str | None] | None = None) -> pa.Table:
    notes = [None] * len(ids) if metadata is None else metadata
    text = pa.large_string()
    return pa.table({"id": pa.array(ids, text), "metadata": pa.array(notes, text)})


BAD_IDS: list[tuple[pa.Table, str]] = [
    (pa.table({"id": ["1", "9", "5"]}), "expected the columns id (large_string), metadata"),
    (ids_of(["3", "4"]), "expected 3 rows, got 2"),
    (ids_of(["3", None, "5"]), "expected an id for every row, got none for some"),
    (ids_of(["3", "1", "5"]), "the id '1' is in the store twice"),
    (ids_of(["3", "4", "5"], [None, "[1]", "{"]), "the metadata of row 4 is no JSON object"),
]


@pytest.mark.parametrize(("table", "message"), BAD_IDS)
def test_verify_looks_into_the_ids(tmp_path: Path, table: pa.Table, message: str) -> None:
    full_store(tmp_path)
    path = tmp_path / "shard-00001.ids.arrow"
    write_ids(path, table)
    reseal_shard(tmp_path, "ids", path.name, 0)
    problems = verify_store(tmp_path)
    assert problems[0].startswith(f"{path}: {message}")


def test_an_ids_file_that_is_not_arrow(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "shard-00001.ids.arrow"
    path.write_bytes(b"not arrow" * 20)
    reseal_shard(tmp_path, "ids", path.name, 0)
    assert f"{path}: is not a readable Arrow file" in verify_store(tmp_path)[0]
    with pytest.raises(StoreFormatError, match="is not a readable Arrow file"):
        _ = Store.open(tmp_path).ids


@pytest.mark.parametrize(
    "header",
    [
        {"descr": "<f4", "shape": (3, 5)},
        {"descr": ">f2", "shape": (3, 10)},
        {"descr": "<f2", "shape": (10, 3)},
        {"descr": "<f2", "shape": (30,)},
        {"descr": "<f2", "shape": (3, 10), "order": True},
    ],
)
def test_another_array_of_the_same_size_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    full_store(tmp_path)
    path = tmp_path / "shard-00000.npy"
    text = (
        f"{{'descr': '{header['descr']}', 'fortran_order': {header.get('order', False)}, "
        f"'shape': {header['shape']}, }}"
    ).encode()
    overwrite(path, 10, text.ljust(200))
    with pytest.raises(StoreFormatError) as caught:
        Store.open(tmp_path)
    wanted = "expected the .npy header {'descr': '<f2', 'fortran_order': False, 'shape': (3, 10), }"
    assert str(caught.value) == f"{path}: {wanted}, got {text!r}"


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    unreadable("nowhere: there is no such folder", Store.open, tmp_path / "nowhere")
    unreadable("is no store: there is no manifest.json in it", Store.open, tmp_path)
    manifest = tmp_path / "manifest.json"
    for content, message in (
        (b"", "is not JSON"),
        (b"\x80\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 5000, "is not JSON|expected the format"),
        (b"[1]", 'expected the format "logra_kernels.store", got null'),
        (b'{"files": []}', 'expected the format "logra_kernels.store", got null'),
        (b'{"format": "bergson"}', 'expected the format "logra_kernels.store", got "bergson"'),
        (b'{"format": "logra_kernels.store"}', "version: expected a positive integer, got None"),
        (b'{"format": "logra_kernels.store", "version": "1"}', "positive integer, got '1'"),
        (b'{"format": "logra_kernels.store", "version": 0}', "positive integer, got 0"),
        (b'{"format": "logra_kernels.store", "version": 1}', "do not agree with its own crc32"),
    ):
        manifest.write_bytes(content)
        with pytest.raises(StoreFormatError, match=message):
            Store.open(tmp_path)
        assert len(verify_store(tmp_path)) == 1
    manifest.unlink()
    manifest.mkdir()
    unreadable("cannot be read", Store.open, tmp_path)
    (tmp_path / "file").write_text("x")
    unreadable("expected a folder with a store, got a file", Store.open, tmp_path / "file")


def test_a_newer_version_is_refused_before_anything_else(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({**manifest, "version": 3, "shards": "elsewhere"}))
    message = (
        f"{path}: this store has format version 3, and this logra_kernels reads versions up to 2; "
        "install a newer logra_kernels"
    )
    with pytest.raises(StoreFormatError) as caught:
        Store.open(tmp_path)
    assert str(caught.value) == message
    assert verify_store(tmp_path) == [message]
    unreadable("install a newer logra_kernels", writer_of, tmp_path, resume=True)


def test_unknown_keys_columns_and_files_are_ignored(tmp_path: Path, store: Store) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "shard-00099.npy").write_text("x")
    (tmp_path / "shard-00003.npy.tmp").write_text("x")

    def change(manifest: dict[str, Any]) -> None:
        manifest["colour"] = "green"
        manifest["shards"][0]["quantised"] = None
        manifest["modules"][0]["kind"] = "Linear"

    edit_manifest(tmp_path, change)
    path = tmp_path / "shard-00001.ids.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    write_ids(path, table.append_column("token", pa.array([1, 2, 3])))
    reseal_shard(tmp_path, "ids", path.name, 0)
    store = Store.open(tmp_path)
    assert store.num_rows == 8
    assert store.ids.to_pylist() == [str(row) for row in range(8)]
    assert store.verify() == []


OUTSIDE = ["../secret", "/etc/passwd", "a/b", "", ".", "..", ".hidden", "a\x00b", "a\n", "a" * 200]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", ["data", "scale", "ids", "projection", "curvature"])
def test_file_names_stay_inside_the_store(tmp_path: Path, place: str, name: Any) -> None:
    full_store(tmp_path)

    def change(manifest: dict[str, Any]) -> None:
        if place == "projection":
            manifest["projection_tensors"]["file"] = name
        elif place == "curvature":
            manifest["curvature"]["raw"]["file"] = f"curvature/{name}"
        else:
            manifest["shards"][1][place]["file"] = name

    edit_manifest(tmp_path, change)
    unreadable("file: expected a plain file name in", Store.open, tmp_path)
    unreadable("file: expected a plain file name in", writer_of, tmp_path, resume=True)


def test_no_manifest_makes_the_reader_stumble(tmp_path: Path, store: Store) -> None:
    """Every value replaced by every nasty one: a StoreError, or a store that reads as it says."""
    good = json.loads((tmp_path / "manifest.json").read_bytes())
    nasty = [None, True, -1, 0, 1, 2**80, 1.5, "x", "../x", [], {}, [None], {"file": 1}]
    refused = accepted = 0
    for way in places(good):
        if way in (("format",), ("version",), ("crc32",)):
            continue
        for value in [*nasty, ...]:
            changed = copy.deepcopy(good)
            inside = changed
            for key in way[:-1]:
                inside = inside[key]
            if value is ...:
                del inside[way[-1]]
            elif inside[way[-1]] == value:
                continue
            else:
                inside[way[-1]] = value
            (tmp_path / "manifest.json").write_bytes(seal(changed))
            try:
                store = Store.open(tmp_path)
            except StoreError:
                refused += 1
                continue
            accepted += 1
            assert is_free(way), f"{way} = {value!r} was accepted"
            assert store.num_rows == 8
            np.testing.assert_array_equal(store.shards[2].rows, rows_of([6, 7]))
    assert refused > 500
    assert accepted > 50


def is_free(way: tuple[Any, ...]) -> bool:
    """Whether one of the nasty values is good there, by FORMAT.md."""
    if way[0] in ("projection", "fingerprints"):
        return True  # any JSON
    if way[:2] == ("projection_tensors", "tensors"):
        return True  # compared on resume only
    return (
        way in (("projection_tensors",), ("curvature",), ("curvature", "raw"))  # may be absent
        or way[:3] == ("curvature", "raw", "meta")
        or way == ("curvature", "raw", "rows")
        or (way[0] == "modules" and way[-1] == "name")
        or (way[0] == "module_exponents" and len(way) == 2)
    )


def test_an_unfinalized_store_opens(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    append(writer, [0, 1, 2, 3])
    writer.flush()
    append(writer, [4, 5, 6, 7])
    store = Store.open(tmp_path)
    assert not store.finalized
    assert store.num_rows in (4, 7)  # the thread may have committed the full shard already
    assert store.verify() == []
    writer.abort()
