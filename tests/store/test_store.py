"""Rows, ids and metadata go in and come out; resume goes on where a store ended."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import (
    DIM,
    EXPONENTS,
    MODULES,
    append,
    edit_manifest,
    full_store,
    refused,
    resumed,
    rows_of,
    scales_of,
    stored,
    stored_rows,
    unpacked,
    writer_of,
)
from tree import environment, output

from logra_kernels.store import (
    DuplicateIdError,
    Module,
    RowLayout,
    Store,
    StoreError,
    StoreExistsError,
    StoreFormatError,
    StoreLockedError,
    StoreMismatchError,
    StoreWriter,
    codec_names,
)
from logra_kernels.store.codecs import Float16, base
from logra_kernels.store.folder import discard_empty
from logra_kernels.store.writer import append_finite


@pytest.mark.parametrize("dtype", codec_names())
@pytest.mark.parametrize("shard_rows", [1, 3, 4, 11, 100])
def test_what_goes_in_comes_out(tmp_path: Path, dtype: str, shard_rows: int) -> None:
    ids = list(range(11))
    with writer_of(tmp_path / "s", dtype=dtype, shard_rows=shard_rows) as writer:
        for batch in (ids[:2], ids[2:9], [], ids[9:]):
            assert append(writer, batch).all()
    store = Store.open(tmp_path / "s")
    assert store.finalized
    assert (store.num_rows, len(store), store.dim, store.dtype) == (11, 11, DIM, dtype)
    assert store.modules == MODULES
    assert [shard.num_rows for shard in store.shards][:-1] == [shard_rows] * (10 // shard_rows)
    assert store.ids.to_pylist() == [str(value) for value in ids]
    np.testing.assert_array_equal(stored_rows(store), rows_of(ids, dtype))
    if dtype != "float32":
        assert store.module_exponents == EXPONENTS
        scales = np.concatenate([shard.row_scale for shard in store.shards])
        np.testing.assert_array_equal(scales, scales_of(ids))
        np.testing.assert_array_equal(store.take([10, 0, 4]), unpacked([10, 0, 4], dtype))
        np.testing.assert_array_equal(store.row(7), unpacked([7], dtype)[0])
    else:
        assert store.module_exponents == [0, 0]
        np.testing.assert_array_equal(store.take(ids), rows_of(ids, dtype))
        np.testing.assert_array_equal(store.shards[0].row_scale, 1)
    assert store.verify() == []


def test_shards_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    for name, size in (("a", 1), ("b", 5)):
        with writer_of(tmp_path / name) as writer:
            for start in range(0, 10, size):
                append(writer, list(range(start, start + size)))
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b"))
    for name in names:
        if name != "lock":
            left, right = (tmp_path / folder / name for folder in "ab")
            assert left.read_bytes() == right.read_bytes(), name


def test_numpy_opens_the_shards(tmp_path: Path, store: Store) -> None:
    rows = np.load(tmp_path / "shard-00001.npy", mmap_mode="r")
    assert isinstance(rows, np.memmap)
    assert rows.offset == 4096
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, rows_of([3, 4, 5]))
    np.testing.assert_array_equal(np.load(tmp_path / "shard-00002.scale.npy"), scales_of([6, 7]))


def test_blocks_are_views_of_the_mapped_files(tmp_path: Path, store: Store) -> None:
    blocks = list(store.blocks(2))
    assert [first for first, *_ in blocks] == [0, 2, 3, 5, 6]
    for first, rows, row_scale, row_exponents in blocks:
        ids = list(range(first, first + len(rows)))
        assert not rows.flags.writeable
        assert any(np.shares_memory(rows, shard.rows) for shard in store.shards)
        np.testing.assert_array_equal(rows, rows_of(ids))
        np.testing.assert_array_equal(row_scale, scales_of(ids))
        assert row_exponents is None
    refused("block_rows: expected at least 1, got 0", next, store.blocks(0))


def test_the_callers_arrays_may_change_after_append(tmp_path: Path) -> None:
    rows, scale = rows_of([0, 1]), scales_of([0, 1])
    with writer_of(tmp_path / "s") as writer:
        writer.append([0, 1], rows, scale)
        rows[:], scale[:] = 0, 1
    store = Store.open(tmp_path / "s")
    np.testing.assert_array_equal(stored_rows(store), rows_of([0, 1]))
    np.testing.assert_array_equal(store.shards[0].row_scale, scales_of([0, 1]))


def test_strided_rows_are_taken(tmp_path: Path) -> None:
    wide = np.repeat(rows_of([0, 1, 2]), 2, axis=1)
    with writer_of(tmp_path / "s") as writer:
        writer.append([0, 1, 2], wide[:, ::2], np.repeat(scales_of([0, 1, 2]), 2)[::2])
    np.testing.assert_array_equal(stored_rows(Store.open(tmp_path / "s")), rows_of([0, 1, 2]))


def test_extreme_values_survive(tmp_path: Path) -> None:
    rows = np.zeros((2, DIM), np.float16)
    rows[0, :3] = [np.finfo(np.float16).max, np.finfo(np.float16).smallest_subnormal, -0.0]
    scale = np.array([2.0**-126, 2.0**127], np.float32)
    with writer_of(tmp_path / "s") as writer:
        writer.append(["tiny", "huge"], rows, scale)
    store = Store.open(tmp_path / "s")
    assert stored_rows(store).tobytes() == rows.tobytes()
    assert store.shards[0].row_scale.tobytes() == scale.tobytes()
    assert store.verify() == []


def test_metadata_is_any_json_and_may_be_absent(tmp_path: Path) -> None:
    notes: list[Any] = [{"text": "ü 漢\n", "at": [1, None, 2.5]}, None, {}]
    with writer_of(tmp_path / "s") as writer:
        append(writer, [5, 6, 7], metadata=notes)
        append(writer, [8])
    store = Store.open(tmp_path / "s")
    assert store.metadata([3, 0, 1, 2]) == [None, *notes]
    assert store.metadata(np.array([0])) == [notes[0]]
    assert store.row_of("7") == store.row_of(7) == 2
    refused("id: the store has no 'nobody'", store.row_of, "nobody")
    refused("rows: expected 0 to 3, got 4", store.metadata, [4])
    refused("rows: expected 0 to 3, got -1", store.take, [-1])


def test_an_empty_store_opens(tmp_path: Path) -> None:
    with writer_of(tmp_path / "s"):
        pass
    store = Store.open(tmp_path / "s")
    assert (store.num_rows, store.shards, list(store.blocks(5))) == (0, [], [])
    assert store.ids.to_pylist() == []
    assert store.take([]).shape == (0, DIM)
    assert store.verify() == []
    assert store.self_influence_cache("k", None).missing() == []
    refused("rows: expected 0 to -1, got 0", store.row, 0)


BAD_BATCHES: list[tuple[dict[str, Any], str]] = [
    ({"ids": [1]}, r"ids: expected 2, one per row, got 1"),
    ({"ids": "ab"}, r"ids: expected one id per row, got the single str 'ab'"),
    ({"ids": [1, 2.0]}, r"ids: expected strings or integers, got 2.0 at 1"),
    ({"ids": [True, 2]}, r"ids: expected strings or integers, got True at 0"),
    ({"ids": ["a", ""]}, r"ids: expected an id, got an empty string at 1"),
    ({"ids": ["a", "\ud800"]}, r"ids: the id at 1 is not valid Unicode"),
    ({"rows": rows_of([1, 2]).tolist()}, r"rows: expected a numpy array, got list"),
    ({"rows": rows_of([1, 2], "float32")}, r"rows: expected float16 \[2, 10\], got float32 \[2, 1"),
    ({"rows": rows_of([1, 2])[:, 1:]}, r"rows: expected float16 \[2, 10\], got float16 \[2, 9\]"),
    ({"rows": rows_of([1, 2])[0]}, r"rows: expected float16 \[2, 10\], got float16 \[10\]"),
    ({"row_scale": None}, r"row_scale: expected a numpy array, got NoneType"),
    ({"row_scale": np.ones(2)}, r"row_scale: expected float32 \[2\], got float64 \[2\]"),
    ({"row_scale": np.ones(3, np.float32)}, r"row_scale: expected float32 \[2\], got float32 \[3"),
    ({"metadata": [{}]}, r"metadata: expected 2, one per row, got 1"),
    ({"metadata": [{}, "x"]}, r"metadata: expected a dict or None, got 'x' at 1"),
    ({"metadata": [{"a": np.nan}, {}]}, r"metadata: the entry at 0 cannot be written as JSON"),
    ({"metadata": [{"a": {1}}, {}]}, r"metadata: the entry at 0 cannot be written as JSON"),
    ({"metadata": [{"a": "\ud800"}, {}]}, r"metadata: the entry at 0 is not valid Unicode"),
]


@pytest.mark.parametrize(("change", "message"), BAD_BATCHES)
def test_a_bad_batch_leaves_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    batch: dict[str, Any] = {"ids": [1, 2], "rows": rows_of([1, 2]), "row_scale": scales_of([1, 2])}
    with writer_of(tmp_path / "s") as writer:
        with pytest.raises(StoreError, match=message):
            writer.append(**{**batch, **change})
        writer.append(**batch)
    store = Store.open(tmp_path / "s")
    assert store.ids.to_pylist() == ["1", "2"]
    assert store.metadata([0, 1]) == [None, None]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: str) -> None:
    rows = rows_of([1, 2], dtype)
    rows[1, 6] = value
    with writer_of(tmp_path / "s", dtype=dtype) as writer:
        scale = None if dtype == "float32" else scales_of([1, 2])
        message = rf"rows: expected finite values, got {value} in the row of id 'b', module "
        with pytest.raises(StoreError, match=message + r"'layers\.1\.mlp'"):
            writer.append(["a", "b"], rows, scale)
    assert Store.open(tmp_path / "s").num_rows == 0


def test_rows_whose_values_were_looked_at_are_not_looked_at_again(tmp_path: Path) -> None:
    looked = []

    class Watched(Float16):
        def finite(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
            looked.append(len(stored))
            return super().finite(stored, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base._codecs, "float16", Watched())
        with writer_of(tmp_path / "s") as writer:
            append(writer, [0, 1])
            append_finite(writer, [2], rows_of([2]), scales_of([2]), [{"n": 2}])
            with pytest.raises(DuplicateIdError, match="1 in the store already"):
                append_finite(writer, [2], rows_of([2]), scales_of([2]))
            with pytest.raises(StoreError, match=r"rows: expected float16 \[1, 10\], got float32"):
                append_finite(writer, [3], rows_of([3], "float32"), scales_of([3]))
            with pytest.raises(StoreError, match=r"row_scale: expected powers of two, got 3\.0"):
                append_finite(writer, [3], rows_of([3]), np.array([3], np.float32))
    assert looked == [2]
    store = Store.open(tmp_path / "s")
    np.testing.assert_array_equal(stored_rows(store), rows_of([0, 1, 2]))
    assert store.metadata([2]) == [{"n": 2}]


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0, np.inf, np.nan])
def test_scales_are_powers_of_two(tmp_path: Path, scale: float) -> None:
    with writer_of(tmp_path / "s") as writer:
        message = rf"row_scale: expected powers of two, got {scale} for id 'b'"
        with pytest.raises(StoreError, match=message):
            writer.append(["a", "b"], rows_of([1, 2]), np.array([1, scale], np.float32))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-43, np.inf, np.nan])
def test_scales_of_int8_rows_are_positive_numbers(tmp_path: Path, scale: float) -> None:
    with writer_of(tmp_path / "s", dtype="int8") as writer:
        rows = rows_of([1, 2], "int8")
        writer.append(["c", "d"], rows, np.array([0.3, 1e38], np.float32))
        scales = np.array([1, scale], np.float32)
        message = rf"row_scale: expected positive numbers, got {scales[1]} for id 'b'"
        with pytest.raises(StoreError, match=message):
            writer.append(["a", "b"], rows, scales)
        rows[1, 7] = -128
        message = r"rows: expected finite values, got nan in the row of id 'b', module 'layers\.1"
        with pytest.raises(StoreError, match=message):
            writer.append(["a", "b"], rows, np.ones(2, np.float32))


def test_int8_rows_are_version_2(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", [1, 2], dtype="int8")
    assert store.manifest["version"] == 2
    edit_manifest(tmp_path / "s", lambda manifest: manifest.update(version=1))
    with pytest.raises(StoreFormatError, match="version: expected 2 for int8 rows, got 1"):
        Store.open(tmp_path / "s")


def test_exponents_are_fixed_once(tmp_path: Path) -> None:
    with StoreWriter.create(tmp_path / "s", modules=MODULES) as writer:
        assert writer.module_exponents is None
        refused("module_exponents: expected set_module_exponents", append, writer, [1])
        with pytest.raises(StoreError, match="module_exponents: expected 2, one per module, got 1"):
            writer.set_module_exponents([1])
        with pytest.raises(StoreError, match="module_exponents: expected -126 to 127, got 128"):
            writer.set_module_exponents([1, 128])
        writer.set_module_exponents([1, 2])
        writer.set_module_exponents([1, 2])
        refused("store's are fixed as [1, 2], got [1, 3]", writer.set_module_exponents, [1, 3])
    with writer_of(tmp_path / "f", dtype="float32") as writer:
        with pytest.raises(StoreError, match="module_exponents: expected none, for the store's"):
            writer.set_module_exponents([0, 0])
        with pytest.raises(StoreError, match="row_scale: expected None, for the store's rows are"):
            writer.append([1], rows_of([1], "float32"), scales_of([1]))


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"modules": []}, "modules: expected at least one, got none"),
    ({"modules": [("a", 1, 1)]}, r"modules: expected Module\(name, ko, ki\), got \('a', 1, 1\)"),
    ({"modules": [Module("a", 0, 1)]}, "modules: ko of 'a': expected a positive integer, got 0"),
    ({"modules": [Module("a", 1, 1)] * 2}, "modules: the name 'a' is there twice"),
    (
        {"dtype": "int7"},
        "dtype: expected one of float16, float32, int8, int4, int2, sign, got 'int7'",
    ),
    ({"duplicates": "keep"}, "duplicates: expected 'error' or 'skip', got 'keep'"),
    ({"shard_rows": 0}, "shard_rows: expected a positive integer, got 0"),
    ({"queue_bytes": 1.5}, "queue_bytes: expected a positive integer, got 1.5"),
    ({"projection": {"seed": {1}}}, "projection: cannot be written as JSON"),
    ({"fingerprints": float("nan")}, "fingerprints: cannot be written as JSON"),
    ({"projection_tensors": {"p": [1.0]}}, "projection_tensors: 'p': expected a numpy array, got"),
    (
        {"projection_tensors": {"p": np.array(["x"])}},
        "projection_tensors: 'p': expected float64, float32, float16, int64, int32, got <U1",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_a_bad_option_makes_no_folder(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        writer_of(tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_default_shards_hold_256_mebibytes(tmp_path: Path) -> None:
    for columns, dtype, rows in (
        (1 << 14, "float16", 8192),
        (1 << 14, "float32", 4096),
        (1, "float16", 1 << 20),
        (1 << 28, "float16", 1),
    ):
        path = tmp_path / f"{columns}-{dtype}"
        with StoreWriter.create(path, modules=[Module("m", 1, columns)], dtype=dtype) as writer:
            assert writer.shard_rows == rows


class TestDuplicates:
    def test_are_an_error_that_names_them(self, tmp_path: Path) -> None:
        with writer_of(tmp_path / "s") as writer:
            append(writer, [1, 2])
            with pytest.raises(DuplicateIdError) as caught:
                append(writer, [7, 2, 8, 8, 1])
            assert str(caught.value) == (
                "ids: expected new ids, got 1 twice in the batch ('8') and "
                "2 in the store already ('2', '1'); nothing was written"
            )
            assert 7 not in writer
            append(writer, [7, 8])
        assert Store.open(tmp_path / "s").ids.to_pylist() == ["1", "2", "7", "8"]

    def test_an_integer_and_its_decimal_are_one_id(self, tmp_path: Path) -> None:
        with writer_of(tmp_path / "s") as writer:
            writer.append(["1"], rows_of([1]), scales_of([1]))
            with pytest.raises(DuplicateIdError, match="1 in the store already"):
                writer.append([np.int64(1)], rows_of([1]), scales_of([1]))

    def test_are_skipped_on_request_and_counted(self, tmp_path: Path) -> None:
        with writer_of(tmp_path / "s", duplicates="skip") as writer:
            append(writer, [1, 2])
            notes = [{"n": n} for n in range(5)]
            kept = append(writer, [7, 2, 8, 8, 1], metadata=notes)
            assert kept.tolist() == [True, False, True, False, False]
            assert not append(writer, [7]).any()
            assert writer.skipped_rows == 4
        store = Store.open(tmp_path / "s")
        assert store.ids.to_pylist() == ["1", "2", "7", "8"]
        assert store.metadata([2, 3]) == [{"n": 0}, {"n": 2}]
        np.testing.assert_array_equal(stored_rows(store), rows_of([1, 2, 7, 8]))

    def test_are_found_across_a_resume(self, tmp_path: Path) -> None:
        stored(tmp_path / "s", [1, 2])
        with (
            writer_of(tmp_path / "s", resume=True) as writer,
            pytest.raises(DuplicateIdError, match=r"got 1 in the store already \('2'\)"),
        ):
            append(writer, [3, 2])


ZEROS = np.zeros((2, 2), np.float32)


class TestResume:
    def test_goes_on_after_the_short_shard(self, tmp_path: Path) -> None:
        stored(tmp_path / "s", [0, 1, 2, 3])
        with writer_of(tmp_path / "s", resume=True, shard_rows=2) as writer:
            assert writer.committed_rows == 4
            assert writer.committed_ids == ["0", "1", "2", "3"]
            assert writer.module_exponents == EXPONENTS
            assert 3 in writer
            assert "4" not in writer
            append(writer, [4, 5, 6])
        store = Store.open(tmp_path / "s")
        assert [shard.num_rows for shard in store.shards] == [3, 1, 2, 1]
        np.testing.assert_array_equal(stored_rows(store), rows_of(list(range(7))))
        assert store.verify() == []

    def test_makes_the_store_if_there_is_none(self, tmp_path: Path) -> None:
        with writer_of(tmp_path / "deep" / "s", resume=True) as writer:
            append(writer, [0])
        assert Store.open(tmp_path / "deep" / "s").num_rows == 1

    def test_keeps_curvature_and_unknown_keys(self, tmp_path: Path, store: Store) -> None:
        edit_manifest(tmp_path, lambda manifest: manifest.update(future={"a": 1}))
        with resumed(tmp_path) as writer:
            append(writer, [8])
        store = Store.open(tmp_path)
        assert store.num_rows == 9
        assert store.manifest["future"] == {"a": 1}
        assert store.curvatures["raw"]["rows"] == 8
        assert store.self_influence_cache("raw-01", {"damping_scale": 0.1}).missing() == [3]
        assert store.verify() == []

    def test_removes_what_a_kill_left(self, tmp_path: Path, store: Store) -> None:
        rubbish = [
            "shard-00003.npy",
            "shard-00003.ids.arrow",
            "shard-00003.scale.npy.tmp",
            "manifest.json.tmp",
            "curvature/raw.tmp",
            "curvature/raw-0123456789abcdef.safetensors",
        ]
        kept = ["notes.txt", "shards.npy", "curvature/notes.txt"]
        for name in (*rubbish, *kept):
            (tmp_path / name).write_bytes(b"x")
        assert Store.open(tmp_path).verify() == []
        with resumed(tmp_path):
            assert not any((tmp_path / name).exists() for name in rubbish)
        assert all((tmp_path / name).exists() for name in kept)
        assert Store.open(tmp_path).verify() == []

    DIFFERENT: Mapping[str, dict[str, Any]] = {
        'dtype: the store has "float16", this run has "float32"': {"dtype": "float32"},
        "modules[1].ko: the store has 1, this run has 2": {
            "modules": [MODULES[0], Module("layers.1.mlp", 2, 4)]
        },
        "modules: the store has 2 entries, this run has 1": {"modules": MODULES[:1]},
        'modules[0].name: the store has "layers.0.mlp", this run has "layers.1.mlp"': {
            "modules": MODULES[::-1]
        },
        "projection.seed: the store has 0, this run has 1": {"projection": {"seed": 1}},
        'projection: the store has {"seed": 0}, this run has null': {"projection": None},
        'projection.kind: the store has nothing, this run has "pca"': {
            "projection": {"seed": 0, "kind": "pca"}
        },
        'fingerprints.model.sha256: the store has "ab", this run has nothing': {
            "fingerprints": {"model": {}}
        },
        'projection_tensors.p.sha256: the store has "': {"projection_tensors": {"p": ZEROS + 1}},
        "projection_tensors.p.shape: the store has 2 entries, this run has 3": {
            "projection_tensors": {"p": ZEROS[None]}
        },
    }

    @pytest.mark.parametrize("message", DIFFERENT)
    def test_names_the_first_difference(self, tmp_path: Path, message: str) -> None:
        options: dict[str, Any] = {
            "projection": {"seed": 0},
            "projection_tensors": {"p": ZEROS},
            "fingerprints": {"model": {"sha256": "ab"}},
        }
        changed = {"modules": MODULES, **options, **self.DIFFERENT[message]}
        stored(tmp_path / "s", [0], **options)
        with pytest.raises(StoreMismatchError) as caught:
            StoreWriter.create(tmp_path / "s", resume=True, **changed)
        assert str(caught.value).startswith(f"{tmp_path / 's'}: cannot resume: {message}")
        with writer_of(tmp_path / "s", resume=True, **options):
            pass  # the refusal has let go of the lock

    def test_projection_matrices_come_back(self, tmp_path: Path, store: Store) -> None:
        tensors = store.load_tensors("projection")
        assert list(tensors) == ["layers.0.mlp.in"]
        np.testing.assert_array_equal(tensors["layers.0.mlp.in"], [[0, 1, 2], [3, 4, 5]])
        refused("name: expected 'projection', got 'curvature'", store.load_tensors, "curvature")
        with writer_of(tmp_path / "without"):
            pass
        refused("keeps no projection matrices", Store.open(tmp_path / "without").load_tensors)


class TestCreate:
    def test_refuses_an_existing_store(self, tmp_path: Path, store: Store) -> None:
        before = (tmp_path / "manifest.json").read_bytes()
        with pytest.raises(StoreExistsError, match="there is a store already; resume=True goes on"):
            writer_of(tmp_path)
        assert (tmp_path / "manifest.json").read_bytes() == before

    @pytest.mark.parametrize("resume", [False, True])
    @pytest.mark.parametrize("name", ["thesis.tex", "shard-00000.npy"])
    def test_refuses_a_folder_of_somebody_else(
        self, tmp_path: Path, name: str, resume: bool
    ) -> None:
        (tmp_path / name).write_text("x")
        with pytest.raises(
            StoreExistsError, match=f"got a folder with '{name}' and without manifest.json"
        ):
            writer_of(tmp_path, resume=resume)
        assert os.listdir(tmp_path) == [name]

    def test_refuses_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "s").write_text("x")
        with pytest.raises(StoreExistsError, match="expected a folder for the store, got a file"):
            writer_of(tmp_path / "s")

    def test_takes_a_folder_whose_creation_was_killed(self, tmp_path: Path) -> None:
        (tmp_path / "lock").write_text("123\n")
        (tmp_path / "projection").mkdir()
        (tmp_path / "projection" / "projection.tmp").write_text("x")
        (tmp_path / "manifest.json.tmp").write_text("{")
        with writer_of(tmp_path) as writer:
            append(writer, [1])
        assert not (tmp_path / "projection" / "projection.tmp").exists()
        assert Store.open(tmp_path).verify() == []


class TestEndings:
    def test_flush_commits_a_short_shard_and_stays_open(self, tmp_path: Path) -> None:
        with writer_of(tmp_path / "s") as writer:
            append(writer, [0, 1, 2, 3])
            writer.flush()
            assert writer.committed_rows == 4
            store = Store.open(tmp_path / "s")
            assert not store.finalized
            assert [shard.num_rows for shard in store.shards] == [3, 1]
            assert store.verify() == []
            writer.flush()
            append(writer, [4])
        store = Store.open(tmp_path / "s")
        assert store.finalized
        assert [shard.num_rows for shard in store.shards] == [3, 1, 1]

    def test_abort_drops_what_is_not_committed(self, tmp_path: Path) -> None:
        writer = writer_of(tmp_path / "s")
        append(writer, [0, 1, 2])
        writer.flush()
        append(writer, [3, 4])
        writer.abort()
        writer.abort()
        writer.close()
        assert Store.open(tmp_path / "s").ids.to_pylist() == ["0", "1", "2"]
        assert not any(".tmp" in name for name in os.listdir(tmp_path / "s"))
        refused("this writer is closed", append, writer, [5])

    def test_an_exception_keeps_the_rows_and_leaves_the_store_open(self, tmp_path: Path) -> None:
        def interrupted() -> None:
            with writer_of(tmp_path / "s") as writer:
                append(writer, [0, 1])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        store = Store.open(tmp_path / "s")
        assert (store.num_rows, store.finalized) == (2, False)
        with writer_of(tmp_path / "s", resume=True) as writer:
            assert writer.committed_rows == 2

    def test_a_finalized_store_that_grows_is_open_again(self, tmp_path: Path) -> None:
        stored(tmp_path / "s", [0])
        writer = writer_of(tmp_path / "s", resume=True)
        assert Store.open(tmp_path / "s").finalized
        append(writer, [1])
        writer.close(finalize=False)
        assert not Store.open(tmp_path / "s").finalized

    def test_a_program_that_forgets_to_close_loses_nothing(self, tmp_path: Path) -> None:
        code = (
            "import sys; from store_samples import append, writer_of; from pathlib import Path\n"
            "append(writer_of(Path(sys.argv[1])), list(range(5)))\n"
        )
        output(sys.executable, "-c", code, tmp_path / "s")
        store = Store.open(tmp_path / "s")
        assert (store.num_rows, store.finalized) == (5, False)
        assert store.verify() == []


class TestLock:
    def test_one_writer_at_a_time(self, tmp_path: Path) -> None:
        with writer_of(tmp_path / "s") as writer:
            append(writer, [0])
            writer.flush()
            message = rf"another writer \(process {os.getpid()}\) has this store open"
            with pytest.raises(StoreLockedError, match=message):
                writer_of(tmp_path / "s", resume=True)
            with pytest.raises(StoreLockedError, match=message):
                Store.open(tmp_path / "s").save_curvature("raw", {}, None)
        Store.open(tmp_path / "s").save_curvature("raw", {}, None)

    def test_a_dead_process_holds_no_lock(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; from store_samples import append, writer_of\n"
            "from pathlib import Path\n"
            "writer = writer_of(Path(sys.argv[1])); append(writer, [0]); writer.flush()\n"
            "print('ready', flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "s")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment()
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            with pytest.raises(StoreLockedError, match=rf"\(process {child.pid}\)"):
                writer_of(tmp_path / "s", resume=True)
            child.send_signal(signal.SIGKILL)
            child.wait()
        with writer_of(tmp_path / "s", resume=True) as writer:
            assert writer.committed_rows == 1

    def test_a_forked_child_neither_writes_nor_keeps_the_lock(self, tmp_path: Path) -> None:
        writer = writer_of(tmp_path / "s")
        ready, leave = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                append(writer, [1])
                verdict = b"wrote"
            except StoreError as error:
                verdict = b"refused" if "it was forked" in str(error) else b"other"
            os.write(ready[1], verdict)
            os.read(leave[0], 1)
            os._exit(0)
        try:
            assert os.read(ready[0], 10) == b"refused"
            append(writer, [1])
            with pytest.raises(StoreLockedError):
                writer_of(tmp_path / "s", resume=True)
            writer.close()
            writer_of(tmp_path / "s", resume=True).close()  # the child still lives
        finally:
            os.write(leave[1], b"x")
            os.waitpid(child, 0)
            for descriptor in (*ready, *leave):
                os.close(descriptor)

    def test_a_file_system_without_locks_is_warned_about(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.warns(UserWarning, match="this file system has no locks"):
            writer_of(tmp_path / "s").close()
        assert Store.open(tmp_path / "s").finalized


class TestQueue:
    def test_is_bounded_by_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = threading.Event()
        real = os.write

        def slow(descriptor: int, data: Any) -> int:
            gate.wait()
            return real(descriptor, data)

        row_bytes = DIM * 2
        writer = writer_of(tmp_path / "s", queue_bytes=3 * (row_bytes + 1))
        monkeypatch.setattr(os, "write", slow)
        appended = []

        def fill() -> None:
            for value in range(6):
                append(writer, [value])
                appended.append(value)

        thread = threading.Thread(target=fill)
        thread.start()
        try:
            time.sleep(0.2)  # time enough for all six, were there no bound
            assert appended == [0, 1, 2]
        finally:
            gate.set()
            thread.join()
        writer.close()
        np.testing.assert_array_equal(
            stored_rows(Store.open(tmp_path / "s")), rows_of(list(range(6)))
        )

    def test_takes_a_batch_that_is_larger_than_the_bound(self, tmp_path: Path) -> None:
        with writer_of(tmp_path / "s", queue_bytes=1) as writer:
            for start in (0, 5):
                append(writer, list(range(start, start + 5)))
        assert Store.open(tmp_path / "s").num_rows == 10


class TestCurvature:
    def test_comes_back_bit_for_bit(self, tmp_path: Path, store: Store) -> None:
        tensors = {
            "layers.0.mlp": np.random.default_rng(0).standard_normal((6, 6)),
            "layers.1.mlp": np.array([[np.pi]], np.float32).T,
            "empty": np.zeros((0, 4)),
        }
        store.save_curvature("raw", tensors, {"count": 8})
        for reader in (store, Store.open(tmp_path)):
            got, meta = reader.load_curvature("raw")
            assert meta == {"count": 8}
            assert list(got) == list(tensors)
            for name, value in tensors.items():
                assert got[name].dtype == value.dtype
                np.testing.assert_array_equal(got[name], value)
        assert store.verify() == []

    def test_replaces_the_older_one(self, tmp_path: Path, store: Store) -> None:
        store.save_curvature("raw", {"a": np.ones(2)}, 1)
        store.save_curvature("other", {"a": np.ones(2)}, 2)
        store.save_curvature("raw", {"a": np.ones(2)}, 3)  # the same content under the same name
        assert len(os.listdir(tmp_path / "curvature")) == 2
        store = Store.open(tmp_path)
        assert {name: entry["meta"] for name, entry in store.curvatures.items()} == {
            "raw": 3,
            "other": 2,
        }
        assert store.verify() == []

    def test_refuses_bad_input(self, tmp_path: Path, store: Store) -> None:
        good = {"a": np.ones(2)}
        bad: list[tuple[str, Any, Any, str]] = [
            ("../raw", good, None, r"name: expected 1 to 64 letters, digits, '-' or '_', got"),
            ("", good, None, r"name: expected 1 to 64 letters"),
            ("raw", {"a": np.ones(2, int)}, None, "'a': expected float32 or float64, got int64"),
            ("raw", {"a": [1.0]}, None, "tensors: 'a': expected a numpy array, got list"),
            ("raw", good, {"x": np.nan}, "meta: cannot be written as JSON"),
        ]
        for name, tensors, meta, message in bad:
            with pytest.raises(StoreError, match=message):
                store.save_curvature(name, tensors, meta)
        refused("the store has no curvature 'kfac'; it has raw", store.load_curvature, "kfac")
        assert Store.open(tmp_path).verify() == []


class TestSelfInfluence:
    def test_missing_shards_are_known(self, tmp_path: Path, store: Store) -> None:
        cache = store.self_influence_cache("new", {"damping": 1})
        assert cache.missing() == [0, 1, 2]
        assert not (tmp_path / "self_influence" / "new").exists()  # asking writes nothing
        values = np.arange(6, dtype=np.float32).reshape(3, 2)
        cache.write(1, values)
        again = Store.open(tmp_path).self_influence_cache("new", {"damping": 1})
        assert again.missing() == [0, 2]
        np.testing.assert_array_equal(again.read(1), values)
        refused("expected the values of shard 0, got none", again.read, 0)
        assert store.verify() == []

    def test_new_values_replace_old_ones(self, tmp_path: Path, store: Store) -> None:
        cache = store.self_influence_cache("raw-01", {"damping_scale": 0.1})
        cache.write(0, np.full((3, 2), 9, np.float32))
        np.testing.assert_array_equal(cache.read(0), 9)
        np.testing.assert_array_equal(cache.read(2), 3)

    def test_a_damaged_file_is_missing_and_is_named_by_verify(self, tmp_path: Path) -> None:
        store = full_store(tmp_path)
        cache = store.self_influence_cache("raw-01", {"damping_scale": 0.1})
        (file,) = cache.folder.glob("shard-00001-*.npy")
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
        assert cache.missing() == [1]
        assert [str(file) in problem for problem in store.verify()] == [True]
        cache.write(1, np.zeros((3, 2), np.float32))
        assert cache.missing() == []
        assert store.verify() == []

    def test_a_key_means_one_thing(self, tmp_path: Path, store: Store) -> None:
        with pytest.raises(
            StoreMismatchError, match=r"meta.damping_scale: the store has 0.1, this run has 0.2"
        ):
            store.self_influence_cache("raw-01", {"damping_scale": 0.2})
        refused("key: expected 1 to 64 letters", store.self_influence_cache, "../x", {})

    def test_refuses_bad_values(self, tmp_path: Path) -> None:
        cache = full_store(tmp_path).self_influence_cache("raw-01", {"damping_scale": 0.1})
        refused("values: expected a float32 array, got float64", cache.write, 0, np.zeros((3, 2)))
        refused("values: expected [3, 2], got [2, 2]", cache.write, 0, np.zeros((2, 2), np.float32))
        refused("index: expected 0 to 2, got 3", cache.write, 3, np.zeros((2, 2), np.float32))


def test_a_store_without_rows_can_be_discarded(tmp_path: Path) -> None:
    """Its manifest and tensors go, the folder can hold a new store; one with rows is refused."""
    writer_of(tmp_path / "s").close()
    store = Store.open(tmp_path / "s")
    store.save_curvature("toy", {"sums": np.zeros(3)}, None)
    discard_empty(store.path)
    assert not list(store.path.rglob("*.safetensors"))
    again = stored(tmp_path / "s", [0, 1])
    assert again.num_rows == 2
    assert not again.verify()
    with pytest.raises(StoreExistsError, match="expected a store without rows"):
        discard_empty(again.path)
    assert Store.open(again.path).num_rows == 2
