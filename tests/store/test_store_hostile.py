"""Folders from strangers: nothing hangs, nothing outside is touched, every error is a sentence."""

import contextlib
import hashlib
import json
import os
import signal
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_influence import gradients, make_store
from store_samples import (
    CACHED,
    LISTED,
    MODULES,
    append,
    edit_manifest,
    find,
    full_store,
    refused,
    resumed,
    writer_of,
)
from tree import output

from logra_kernels import Attributor
from logra_kernels.cli import main
from logra_kernels.store import Store, StoreError, StoreFormatError, verify_store
from logra_kernels.store.ids import parse_metadata, read_ids


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """What is inside ends within five seconds."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class TestArrow:
    def test_no_flipped_bit_of_the_ids_is_more_than_an_error(self, tmp_path: Path) -> None:
        """Some led out of the file; some raised MemoryError, which is no StoreError."""
        full_store(tmp_path)
        path = tmp_path / "shard-00001.ids.arrow"
        intact = path.read_bytes()
        said = []
        for bit in range(0, 8 * len(intact), 5):
            data = bytearray(intact)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                table = read_ids(path, 3)
                table["id"].to_pylist()
                for value in table["metadata"]:
                    parse_metadata(value, path, 0)
            except StoreError as error:
                said.append(str(error))
        assert len(said) > 20
        assert all(sentence.startswith(str(path)) for sentence in said)

    @pytest.mark.parametrize("column", ["id", "metadata"])
    def test_an_offset_that_leads_out_of_the_file(self, tmp_path: Path, column: str) -> None:
        full_store(tmp_path)
        path = tmp_path / "shard-00001.ids.arrow"
        length = 1 if column == "id" else len('{"text": "passage 3"}')
        offsets = struct.pack("<3q", length, 2 * length, 3 * length)
        data = path.read_bytes()
        assert data.count(offsets) == 1
        path.write_bytes(data.replace(offsets, struct.pack("<3q", length, 1 << 40, 3 * length)))
        with pytest.raises(StoreFormatError, match=r"ids\.arrow: is not a readable Arrow file"):
            Store.open(tmp_path).metadata([4])

    def test_metadata_that_is_no_text(self, tmp_path: Path, store: Store) -> None:
        path = tmp_path / "shard-00001.ids.arrow"
        path.write_bytes(path.read_bytes().replace(b"passage 4", b"passage \xff"))
        store = Store.open(tmp_path)
        assert store.metadata([3]) == [{"text": "passage 3"}]
        with pytest.raises(StoreFormatError, match="the metadata of row 4 is no JSON object"):
            store.metadata([4])


class TestNoRegularFile:
    @pytest.mark.parametrize("pattern", [*LISTED, *CACHED])
    @pytest.mark.parametrize("what", ["fifo", "device", "folder"])
    def test_is_named_at_once(self, tmp_path: Path, pattern: str, what: str, store: Store) -> None:
        path = find(tmp_path, pattern)
        path.unlink()
        if what == "fifo":
            os.mkfifo(path)
        elif what == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        with soon():
            assert [str(path) in problem for problem in verify_store(tmp_path)] == [True]
            if "self_influence" not in pattern:
                refused(f"{path}: cannot be read", Store.open, tmp_path, error=StoreFormatError)
            elif path.name == "key.json":
                with pytest.raises(StoreFormatError, match=r"key\.json: cannot be read"):
                    store.self_influence_cache("raw-01", {"damping_scale": 0.1})
            else:
                assert store.self_influence_cache("raw-01", {"damping_scale": 0.1}).missing() == [1]

    def test_a_link_to_a_file_is_followed_for_reading(self, tmp_path: Path) -> None:
        """Snapshots from model hubs are folders of links; so may be the folder itself."""
        full_store(tmp_path / "blobs")
        for path in list((tmp_path / "blobs").rglob("*")):
            place = tmp_path / "snapshot" / path.relative_to(tmp_path / "blobs")
            if path.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path)
        (tmp_path / "link").symlink_to("snapshot")
        store = Store.open(tmp_path / "link")
        assert store.verify() == []
        assert store.ids.to_pylist() == [str(row) for row in range(8)]
        assert store.load_tensors()

    def test_a_lock_that_is_a_pipe(self, tmp_path: Path, store: Store) -> None:
        (tmp_path / "lock").unlink()
        os.mkfifo(tmp_path / "lock")
        with soon(), pytest.raises(StoreError, match="lock"):
            resumed(tmp_path)


class TestLinksThatLeadOut:
    NAMES = (
        "lock",
        "manifest.json.tmp",
        "shard-00003.npy.tmp",
        "shard-00003.scale.npy.tmp",
        "shard-00003.ids.arrow.tmp",
        "self_influence/raw-01/lock",
        "self_influence/raw-01/key.json.tmp",
    )

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("there", [True, False])
    def test_nothing_is_written_through_them(self, tmp_path: Path, name: str, there: bool) -> None:
        path, victim = tmp_path / "s", tmp_path / "victim"
        store = full_store(path)
        if there:
            victim.write_text("precious")
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(victim)
        if name.endswith("key.json.tmp"):
            (path / "self_influence/raw-01/key.json").unlink()
        with contextlib.suppress(StoreError), resumed(path) as writer:
            append(writer, [8])
        with contextlib.suppress(StoreError):
            store.save_curvature("other", {"x": np.ones(2)}, None)
        with contextlib.suppress(StoreError):
            cache = store.self_influence_cache("raw-01", {"damping_scale": 0.1})
            cache.write(0, np.zeros((3, 2), np.float32))
        assert victim.exists() == there
        assert not there or victim.read_text() == "precious"
        assert Store.open(path).verify() == []

    @pytest.mark.parametrize("name", ["curvature", "projection", "self_influence"])
    def test_folders(self, tmp_path: Path, name: str) -> None:
        path, place = tmp_path / "s", tmp_path / "place"
        store = full_store(path)
        os.rename(path / name, place)
        (path / name).symlink_to(place)
        other = place / "other-0123456789abcdef.safetensors"
        other.write_text("precious")
        before = sorted(place.rglob("*"))
        with resumed(path) as writer:
            append(writer, [8])
        if name == "curvature":
            with pytest.raises(StoreFormatError, match="curvature: expected a folder, got a symb"):
                store.save_curvature("raw", {"x": np.ones(2)}, None)
        cache = store.self_influence_cache("new", None)
        if name == "self_influence":
            with pytest.raises(StoreFormatError, match="expected a folder, got a symbolic link"):
                cache.write(0, np.zeros((3, 2), np.float32))
        assert sorted(place.rglob("*")) == before


class TestForeignFiles:
    def test_a_folder_without_a_manifest_keeps_them(self, tmp_path: Path) -> None:
        names = ["model.safetensors", "x-0123456789abcdef.safetensors"]
        files = [
            tmp_path / folder / name for folder in ("projection", "curvature") for name in names
        ]
        for file in files:
            file.parent.mkdir(exist_ok=True)
            file.write_text("precious")
        with writer_of(tmp_path, projection_tensors={"p": np.ones(3)}) as writer:
            append(writer, [1])
        assert all(file.read_text() == "precious" for file in files)
        assert Store.open(tmp_path).verify() == []

    def test_only_names_that_a_writer_gives_are_deleted_later(self, tmp_path: Path) -> None:
        full_store(tmp_path)
        (tmp_path / "projection" / "model.safetensors").write_text("precious")
        resumed(tmp_path).close()
        assert (tmp_path / "projection" / "model.safetensors").exists()

    def test_between_the_caches_they_are_ignored(self, tmp_path: Path, store: Store) -> None:
        root = tmp_path / "self_influence"
        (root / "notes.txt").write_text("x")
        os.mkfifo(root / "pipe")
        (root / "folder" / "key.jsonl").mkdir(parents=True)
        (root / "raw-01" / "shard-00009-01234567-89abcdef.npy").write_text("x")
        (root / "link").symlink_to("nothing")
        with soon():
            assert verify_store(tmp_path) == []


class TestNormsOfOtherRows:
    def test_a_new_store_in_an_old_folder(self, tmp_path: Path) -> None:
        """Without curvature nothing else tells the rows of the kept norms."""
        first, second = gradients(30), 3 * gradients(30, seed=1)
        queries = gradients(2, seed=7)
        for path, rows in ((tmp_path / "s", first), (tmp_path / "fresh", second)):
            store = make_store(path, rows, dtype="float32")
            want = Attributor(store, "none").scores(queries, "l-relatif").scores
        for file in (tmp_path / "s").glob("*.*"):
            file.unlink()
        store = make_store(tmp_path / "s", second, dtype="float32")
        got = Attributor(store, "none").scores(queries, "l-relatif").scores
        assert torch.equal(got, want)
        (folder,) = (tmp_path / "s" / "self_influence").iterdir()
        assert len(list(folder.glob("shard-*"))) == 1  # the old norms went
        assert verify_store(tmp_path / "s") == []

    def test_norms_that_do_not_tell_their_rows_are_computed_again(self, tmp_path: Path) -> None:
        """Version 0.1 named a file by its data alone."""
        store = full_store(tmp_path)
        cache = store.self_influence_cache("raw-01", {"damping_scale": 0.1})
        file = find(cache.folder, "shard-00001-*.npy")
        stem, index, rows, data = file.name.split("-")
        assert rows == store.manifest["shards"][1]["data"]["crc32"]
        old = file.rename(file.with_name("-".join((stem, index, data))))
        assert cache.missing() == [1]
        assert store.verify() == []
        cache.write(1, np.ones((3, 2), np.float32))
        assert cache.missing() == []
        assert not old.exists()


CUT = """
import os, sys
from pathlib import Path
from logra_kernels.store import Store, StoreError
store = Store.open(sys.argv[1])
uses = {
    "take": lambda: store.take([7]),
    "blocks": lambda: [rows.sum() for _, rows, *_ in store.blocks(1)],
    "metadata": lambda: store.metadata([7]),
    "id_of": lambda: store.id_of(7),
}
use = uses[sys.argv[2]]
use()
for path in Path(sys.argv[1]).glob("shard-*"):
    os.truncate(path, 0)
try:
    use()
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("use", ["take", "blocks", "metadata", "id_of"])
def test_a_mapped_file_that_was_cut(tmp_path: Path, use: str, store: Store) -> None:
    """A signal would end the process."""
    printed = output(sys.executable, "-c", CUT, tmp_path, use)
    assert "the file was cut short while it was read" in printed


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


class TestJson:
    @pytest.mark.parametrize(
        "value", [nested(300), nested(5000), float("nan"), float("inf"), {"a": nested(200)}]
    )
    def test_what_could_not_be_written_again_is_refused(self, tmp_path: Path, value: Any) -> None:
        path = tmp_path / "manifest.json"
        full_store(tmp_path)
        sealed = path.read_bytes().rpartition(b',\n "crc32"')[0]
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(100_000)
        try:
            sealed += f',\n "more": {json.dumps(value)}'.encode()
        finally:
            sys.setrecursionlimit(limit)
        path.write_bytes(sealed + f',\n "crc32": "{zlib.crc32(sealed):08x}"\n}}\n'.encode())
        refused("manifest.json: is not JSON", Store.open, tmp_path, error=StoreFormatError)
        assert len(verify_store(tmp_path)) == 1

    def test_as_deep_as_it_may_be_written_it_is_read(self, tmp_path: Path) -> None:
        with writer_of(tmp_path / "s", fingerprints=nested(99), projection=nested(99)) as writer:
            append(writer, [1])
        store = Store.open(tmp_path / "s")
        store.save_curvature("raw", {"x": np.ones(2)}, nested(99))
        assert Store.open(tmp_path / "s").curvatures["raw"]["meta"] == nested(99)
        with pytest.raises(StoreError, match="deeper in each other than 100"):
            writer_of(tmp_path / "t", fingerprints=nested(101))

    def test_deep_metadata(self, tmp_path: Path, store: Store) -> None:
        path = tmp_path / "shard-00001.ids.arrow"
        with writer_of(tmp_path / "deep", shard_rows=1) as writer:
            append(writer, [1], metadata=[{"a": nested(900)}])
        path = tmp_path / "deep" / "shard-00000.ids.arrow"
        data = path.read_bytes()
        path.write_bytes(data.replace(b"[" * 900, b"{" * 900))
        with pytest.raises(StoreFormatError, match=f"{path}: the metadata of row 0 is no JSON"):
            Store.open(tmp_path / "deep").metadata([0])


def test_a_tensor_that_numpy_has_no_type_for(tmp_path: Path, store: Store) -> None:
    path = find(tmp_path, "projection/*.safetensors")
    data = path.read_bytes().replace(b'"F32"', b'"BF16"')
    size = int.from_bytes(data[:8], "little") + 1
    data = size.to_bytes(8, "little") + data[8:]
    data = data.replace(b"[2, 3]", b"[4, 3]")
    path.write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        manifest["projection_tensors"].update(bytes=len(data), sha256=sha256)

    edit_manifest(tmp_path, change)
    with pytest.raises(StoreFormatError, match=f"{path}: is not a readable safetensors file"):
        Store.open(tmp_path).load_tensors()
    assert [str(path) in problem for problem in verify_store(tmp_path)] == [True]


FINGERPRINTS = [
    {"kind": "causal-lm"},
    {"kind": "causal-lm", "model": None, "tokens": [], "data": 3},
    {"kind": "causal-lm", "model": "m", "tokens": {}, "data": {}},
    ["causal-lm"],
    True,
]


@pytest.mark.parametrize("found", FINGERPRINTS)
def test_info_shows_what_it_does_not_know(tmp_path: Path, found: Any, capsys: Any) -> None:
    full_store(tmp_path)
    edit_manifest(tmp_path, lambda manifest: manifest.update(fingerprints=found))
    assert main(["info", str(tmp_path)]) == 0
    assert f"fingerprints {found}" in capsys.readouterr().out


@pytest.mark.parametrize("projection", [{"kind": 3, "rank": 4}, {"kind": "x", "rank": [1, 2]}, [1]])
def test_info_shows_any_projection(tmp_path: Path, projection: Any, capsys: Any) -> None:
    full_store(tmp_path)
    edit_manifest(tmp_path, lambda manifest: manifest.update(projection=projection))
    assert main(["info", str(tmp_path)]) == 0
    assert len(MODULES) == 2
    assert "modules      2" in capsys.readouterr().out
