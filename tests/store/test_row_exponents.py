"""Exponents of rows: what float16 would lose is kept, checked, and found where it is damaged."""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_influence import MODULES, gradients, make_store
from store_samples import edit_manifest

from logra_kernels import rows as tensor_rows
from logra_kernels.store import (
    Module,
    RowLayout,
    Store,
    StoreError,
    StoreFormatError,
    StoreWriter,
    row_codec,
)

LAYOUT = RowLayout.of(MODULES)
FLOAT16 = row_codec("float16")
LEAST = float(np.finfo(np.float32).smallest_subnormal)
FILE = "shard-00001.exponents.npy"


def wide_rows(count: int, seed: int, power: int) -> torch.Tensor:
    """[count, D] float32: modules of sizes between 2**-power and 2**power, some of them zero."""
    random = np.random.default_rng(seed)
    rows = np.asarray(random.standard_normal((count, LAYOUT.dim)), np.float32)
    rows *= np.exp2(random.uniform(-20, 0, rows.shape)).astype(np.float32)  # some elements are tiny
    for part in LAYOUT.split(rows):
        sizes = np.ldexp(np.float32(1), random.integers(-power, power + 1, (count, 1)))
        part *= np.where(random.random((count, 1)) < 0.1, np.float32(0), sizes)
    return torch.from_numpy(rows)


def wide_store(path: Path, **options: Any) -> Store:
    """20 rows in three shards; rows 9 and 12, of the second, need exponents."""
    rows = gradients(20)
    rows[9, :12] *= 2.0**-50
    rows[12, 12:37] *= 2.0**-70
    return make_store(path, rows, shard_rows=8, exponents=[0, 0, 0], **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [20, 60, 100, 126])
def test_every_module_is_kept_to_float16s_precision(seed: int, power: int) -> None:
    """|stored - x| <= 2**-11 of the module's largest element, whatever the modules' exponents."""
    rows = wide_rows(64, seed, power)
    rows[:3] = torch.stack([torch.full([LAYOUT.dim], v) for v in (LEAST, 3.4e38, -3.4e38)])
    rows[3, :12], rows[3, 12:] = LEAST, 3.4e38
    random = np.random.default_rng(seed)
    for bounds in ((-14, 0), (-126, 127)):
        exponents = random.integers(bounds[0], bounds[1] + 1, len(LAYOUT)).tolist()
        stored, scale, own = FLOAT16.encode(rows.numpy(), LAYOUT, exponents)
        assert scale is not None
        assert FLOAT16.finite(stored, LAYOUT).all()
        back = FLOAT16.decode(stored, scale, own, LAYOUT, exponents)
        parts = zip(LAYOUT.split(rows.numpy()), LAYOUT.split(back), strict=True)
        for part, got in parts:
            largest = np.abs(part).max(axis=1, keepdims=True).astype(np.float64)
            error = np.abs(got.astype(np.float64) - part)
            assert (error <= 2.0**-11 * largest).all()
            assert ((np.abs(got).max(axis=1) == 0) == (largest[:, 0] == 0)).all()
        # The tensors' side gives the same bits, and so does every split into batches.
        for size in (5, 64):
            for begin in range(0, 64, size):
                here = slice(begin, begin + size)
                one, its_scale, its_own = tensor_rows.encode(FLOAT16, rows[here], LAYOUT, exponents)
                np.testing.assert_array_equal(one.numpy().view(np.uint16), bits(stored[here]))
                assert its_scale is not None
                np.testing.assert_array_equal(its_scale.numpy(), scale[here])
                want = np.zeros((len(one), 3)) if own is None else own[here]
                np.testing.assert_array_equal(0 * want if its_own is None else its_own, want)
                decoded = tensor_rows.decode(FLOAT16, one, its_scale, its_own, LAYOUT, exponents)
                np.testing.assert_array_equal(decoded.numpy(), back[here])


def bits(stored: np.ndarray) -> np.ndarray:
    """float16 as its bits, which tell -0 from 0."""
    return stored.view(np.uint16)


def test_ordinary_rows_have_none() -> None:
    rows = gradients(200)
    rows[7] = 0
    rows[8, :12] = 0
    assert FLOAT16.encode(rows.numpy(), LAYOUT, [0, 0, 0])[2] is None
    assert tensor_rows.encode(FLOAT16, rows, LAYOUT, [0, 0, 0])[2] is None
    stored, _, own = tensor_rows.encode(FLOAT16, rows[:0], LAYOUT, [0, 0, 0])
    assert (len(stored), own) == (0, None)


def test_a_row_that_is_not_finite_has_none() -> None:
    rows = gradients(3)
    rows[:, :12] *= 2.0**-60
    rows[1, 30] = float("inf")
    for own in (
        FLOAT16.encode(rows.numpy(), LAYOUT, [0, 0, 0])[2],
        tensor_rows.encode(FLOAT16, rows, LAYOUT, [0, 0, 0])[2],
    ):
        assert own is not None
        assert (own != 0).tolist() == [[True, False, False], [False] * 3, [True, False, False]]


def test_the_bytes_of_the_file(tmp_path: Path) -> None:
    """As FORMAT.md says: element = stored * scale * 2**(module's exponent + the row's)."""
    with StoreWriter.create(tmp_path, modules=[Module("a", 1, 2), Module("b", 1, 1)]) as writer:
        writer.set_module_exponents([0, -5])
        rows = np.array([[2**14, -1, 2**14], [1, 2, 3]], np.float16)
        own = np.array([[0, -40], [0, 0]], np.int16)
        writer.append(["x", "y"], rows, np.array([2, 1], np.float32), row_exponents=own)
        writer.flush()
        writer.append(["z"], rows[:1], np.ones(1, np.float32), row_exponents=own[1:])
    head = b"\x93NUMPY\x01\x00\xf6\x0f"
    text = b"{'descr': '<i2', 'fortran_order': False, 'shape': (2, 2), }"
    data = bytes.fromhex("0000 d8ff 0000 0000")
    file = tmp_path / "shard-00000.exponents.npy"
    assert file.read_bytes() == head + text.ljust(4085) + b"\n" + data
    np.testing.assert_array_equal(np.load(file), own)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    assert manifest["version"] == 2
    assert manifest["shards"][0]["exponents"]["file"] == file.name
    assert "exponents" not in manifest["shards"][1]  # all of its are zero
    assert not (tmp_path / "shard-00001.exponents.npy").exists()
    store = Store.open(tmp_path)
    assert store.verify() == []
    want = [[2.0**15, -2, 2.0 ** (14 + 1 - 5 - 40)], [1, 2, 3 * 2.0**-5], [2.0**14, -1, 2.0**9]]
    np.testing.assert_array_equal(store.take(range(3)), np.array(want, np.float32))
    np.testing.assert_array_equal(store.row(0), np.array(want[0], np.float32))
    blocks = list(store.blocks(1))
    np.testing.assert_array_equal([own for *_, own in blocks[:2]], own[:, None])
    assert blocks[2][3] is None


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([[0, 0, 0]], r"row_exponents: expected a numpy array, got list"),
        (np.zeros((2, 3)), r"row_exponents: expected int16 \[2, 3\], got float64 \[2, 3\]"),
        (np.zeros((2, 2), np.int16), r"expected int16 \[2, 3\], got int16 \[2, 2\]"),
        (np.full((2, 3), 113, np.int16), r"expected -417 to 112, got 113 to 113 for id 'a'"),
        (np.array([[0] * 3, [0, -418, 0]], np.int16), r"112, got -418 to 0 for id 'b'"),
    ],
)
def test_append_refuses_others(tmp_path: Path, own: Any, message: str) -> None:
    stored, scale, _ = FLOAT16.encode(gradients(2).numpy(), LAYOUT, [0, 0, 0])
    assert scale is not None
    with StoreWriter.create(tmp_path / "s", modules=MODULES) as writer:
        writer.set_module_exponents([0, 0, 0])
        with pytest.raises(StoreError, match=message):
            writer.append(["a", "b"], stored, scale, row_exponents=own)
        writer.append(["a"], stored[:1], scale[:1])  # nothing of the batch was taken
    plain = StoreWriter.create(tmp_path / "f", modules=MODULES, dtype="float32")
    with plain, pytest.raises(StoreError, match="row_exponents: expected None, for the store's"):
        plain.append(["a"], gradients(1).numpy(), row_exponents=np.zeros((1, 3), np.int16))


def test_duplicates_that_are_skipped_take_theirs_along(tmp_path: Path) -> None:
    rows = gradients(3)
    rows[1:, :12] *= torch.tensor([2.0**-50, 2.0**-60])[:, None]
    stored, scale, own = FLOAT16.encode(rows.numpy(), LAYOUT, [0, 0, 0])
    assert scale is not None
    assert own is not None
    with StoreWriter.create(tmp_path, modules=MODULES, duplicates="skip") as writer:
        writer.set_module_exponents([0, 0, 0])
        writer.append(["b"], stored[1:2], scale[1:2], row_exponents=own[1:2])
        assert list(writer.append([*"abc"], stored, scale, row_exponents=own)) == [1, 0, 1]
    want = FLOAT16.decode(stored, scale, own, LAYOUT, [0, 0, 0])[[1, 0, 2]]
    np.testing.assert_array_equal(Store.open(tmp_path).take(range(3)), want)


def test_verify_and_open_find_damage(tmp_path: Path) -> None:
    store = wide_store(tmp_path)
    assert [("exponents" in shard) for shard in store.manifest["shards"]] == [False, True, False]
    path, good = tmp_path / FILE, (tmp_path / FILE).read_bytes()

    def damaged(data: bytes) -> list[str]:
        path.write_bytes(data)
        found = store.verify()
        path.write_bytes(good)
        return found

    (flipped,) = damaged(good[:-1] + bytes([good[-1] ^ 4]))
    assert flipped.startswith(f"{path}: damaged: expected crc32 ")
    assert damaged(good[:-2]) == [f"{path}: expected {len(good)} bytes, got {len(good) - 2}"]
    (head,) = damaged(good.replace(b"<i2", b"<u2"))
    assert head.startswith(f"{path}: expected the .npy header {{'descr': '<i2'")
    path.unlink()
    message = f"{path}: the manifest lists this file, but it is missing"
    assert store.verify() == [message]
    with pytest.raises(StoreFormatError, match="it is missing"):
        Store.open(tmp_path)


def test_values_out_of_range_are_refused_under_a_valid_checksum(tmp_path: Path) -> None:
    wide_store(tmp_path)
    path = tmp_path / FILE
    data = bytearray(path.read_bytes())
    data[4096:4098] = np.int16(113).tobytes()
    path.write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][1]["exponents"]["crc32"] = f"{zlib.crc32(data[4096:]):08x}"

    edit_manifest(tmp_path, change)
    store = Store.open(tmp_path)
    message = f"{path}: expected exponents from -417 to 112, got others for row 8"
    assert store.verify() == [message]
    with pytest.raises(StoreFormatError, match="its exponents are out of range"):
        store.take([8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=1), "expected in scaled rows of a store of version 2, got one"),
        (
            lambda m: m["shards"][1].update(exponents=None),
            "expected an object, got null",
        ),
        (lambda m: m["shards"][1]["exponents"].update(bytes=4096), "expected 4144, got 4096"),
        (lambda m: m["shards"][1]["exponents"].update(file="../x"), "expected a plain file name"),
        (lambda m: m["shards"][1]["exponents"].update(crc32="x"), "expected hexadecimal digits"),
        (
            lambda m: m["shards"][1]["exponents"].update(file="shard-00000.npy"),
            "two entries name the same file",
        ),
    ],
)
def test_hostile_manifests(tmp_path: Path, change: Any, message: str) -> None:
    wide_store(tmp_path)
    edit_manifest(tmp_path, change)
    with pytest.raises(StoreFormatError, match=message):
        Store.open(tmp_path)


def test_float32_rows_have_none(tmp_path: Path) -> None:
    make_store(tmp_path, gradients(4), "float32")
    entry = {"file": "e.npy", "bytes": 4120, "crc32": "00000000"}

    def change(manifest: dict[str, Any]) -> None:
        manifest["version"] = 2
        manifest["shards"][0]["exponents"] = entry

    edit_manifest(tmp_path, change)
    with pytest.raises(StoreFormatError, match="got one in float32 rows"):
        Store.open(tmp_path)


def test_resume_keeps_the_version_and_removes_what_is_left(tmp_path: Path) -> None:
    wide_store(tmp_path)
    left = [tmp_path / f"shard-00003.exponents.npy{end}" for end in ("", ".tmp")]
    for path in left:
        path.write_bytes(b"unfinished")
    store = make_store(tmp_path, gradients(2), ids=["new", "newer"], resume=True, shard_rows=8)
    assert not any(path.exists() for path in left)
    assert store.manifest["version"] == 2
    assert store.verify() == []


def test_ordinary_stores_stay_version_1(tmp_path: Path) -> None:
    store = make_store(tmp_path, gradients(20), shard_rows=8)
    store.save_curvature("raw", {"a": np.eye(2)}, None)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    assert manifest["version"] == 1
    assert all(list(shard) == ["rows", "first_row", "data", "scale", "ids"] for shard in
               manifest["shards"])  # fmt: skip
    assert not list(tmp_path.glob("*exponents*"))


def test_cached_norms_name_the_exponents_too(tmp_path: Path) -> None:
    """The same stored rows with other exponents are other rows."""
    stores = []
    for power in (-50, -51):
        rows = gradients(4)
        rows[:, :12] *= 2.0**power
        stores.append(make_store(tmp_path / str(power), rows, exponents=[0, 0, 0]))
        stores[-1].self_influence_cache("a", {}).write(0, np.ones((4, 3), np.float32))
    shards = [store.manifest["shards"][0] for store in stores]
    assert shards[0]["data"]["crc32"] == shards[1]["data"]["crc32"]
    for store, shard, other in zip(stores, shards, stores[::-1], strict=True):
        (file,) = (store.path / "self_influence" / "a").glob("shard-*")
        rows_crc = shard["data"]["crc32"] + shard["exponents"]["crc32"]
        assert file.name.split("-")[2] == f"{zlib.crc32(rows_crc.encode()):08x}"
        shutil.move(file, other.path / "self_influence")  # as a folder that was copied over
    for store in stores:
        (file,) = (store.path / "self_influence").glob("shard-*")
        shutil.move(file, store.path / "self_influence" / "a")
        assert Store.open(store.path).self_influence_cache("a", {}).missing() == [0]


def test_equal_bits_in_other_batches_and_after_a_resume(tmp_path: Path) -> None:
    rows = gradients(60)
    rows[::3, :12] *= 2.0**-50
    rows[10:20, 12:37] *= 2.0**-70

    def write(name: str, batch: int, stop: int) -> StoreWriter:
        writer = StoreWriter.create(
            tmp_path / name, modules=MODULES, shard_rows=7, duplicates="skip", resume=True
        )
        writer.set_module_exponents([0, 0, 0])
        for first in range(0, stop, batch):
            part = rows[first : first + batch].numpy()
            stored, scale, own = FLOAT16.encode(part, LAYOUT, [0, 0, 0])
            writer.append(range(first, first + len(part)), stored, scale, row_exponents=own)
        return writer

    write("whole", 60, 60).close()
    for batch, stop in ((4, 16), (5, 40)):
        writer = write("resumed", batch, stop)
        writer.abort()
    write("resumed", 9, 60).close()
    stores = [Store.open(tmp_path / name) for name in ("whole", "resumed")]
    assert stores[1].verify() == []
    assert stores[0].manifest["version"] == stores[1].manifest["version"] == 2
    for store in stores:
        assert [shard["rows"] for shard in store.manifest["shards"]] == [*[7] * 8, 4]
    for key in ("data", "exponents"):
        one, other = (
            [shard.get(key, {}).get("crc32") for shard in store.manifest["shards"]]
            for store in stores
        )
        assert one == other
