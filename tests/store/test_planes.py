"""Rotation, basis and bit planes: every bit as FORMAT.md says, and what becomes of lost planes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import (
    MODULES,
    append,
    edit_manifest,
    full_store,
    refused,
    rows_of,
    scales_of,
    stored,
    unreadable,
    wide_store,
    writer_of,
)

from logra_kernels.store import (
    Module,
    RowLayout,
    Store,
    StoreError,
    StoreFormatError,
    StoreMismatchError,
    StoreWriter,
    row_codec,
)
from logra_kernels.store.basis import Basis
from logra_kernels.store.codecs import Planes
from logra_kernels.store.rotation import Rotation, hadamard

LOW_BITS = ["sign", "int2", "int4"]
WIDTHS = [1, 2, 3, 7, 8, 9, 44, 64, 100, 257, 1000]


def rows_like(count: int, dim: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    uneven = generator.standard_normal((count, dim)) * np.exp(generator.standard_normal(dim))
    return uneven.astype(np.float32)


def layout_of(dim: int) -> RowLayout:
    return RowLayout.of([Module("m", 1, dim)])


def signs_of(seed: int, number: int, width: int) -> list[int]:
    raw = hashlib.shake_256(f"logra hadamard {seed} {number}".encode()).digest(-(-width // 8))
    return [-1 if raw[c // 8] >> (c % 8) & 1 else 1 for c in range(width)]


def matrix_of(dim: int, seed: int) -> np.ndarray:
    """R [D, D] float64, from the words of FORMAT.md."""
    width = 1
    while 2 * width <= dim:
        width *= 2
    h = np.array([[(-1) ** (i & j).bit_count() for j in range(width)] for i in range(width)])
    whole = np.eye(dim)
    starts = [0] if width == dim else [0, dim - width, 0]
    for number, start in enumerate(starts):
        step = np.eye(dim)
        place = slice(start, start + width)
        step[place, place] = h * np.array(signs_of(seed, number, width)) / width**0.5
        whole = step @ whole
    return whole


class TestRotation:
    @pytest.mark.parametrize("dim", WIDTHS[:-2])
    def test_is_the_matrix_of_the_format(self, dim: int) -> None:
        matrix = matrix_of(dim, 5)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-13)
        rows = rows_like(3, dim).astype(np.float64)
        rotation = Rotation(dim, 5)
        np.testing.assert_allclose(rotation.forward(rows), rows @ matrix.T, atol=1e-12)
        np.testing.assert_allclose(rotation.inverse(rows), rows @ matrix, atol=1e-12)

    @pytest.mark.parametrize("dim", WIDTHS)
    def test_keeps_products_and_comes_back(self, dim: int) -> None:
        rotation, rows = Rotation(dim, 1), rows_like(4, dim)
        turned = rotation.forward(rows)
        assert turned.dtype == np.float32
        size = np.linalg.norm(rows, axis=1).max()
        # log2(D) additions in a row, three times
        rounding = 40 * 2.0**-24 * size
        np.testing.assert_allclose(rotation.inverse(turned), rows, atol=rounding, rtol=0)
        exact = rows.astype(np.float64)
        got = turned.astype(np.float64) @ rotation.forward(exact).T
        np.testing.assert_allclose(got, exact @ exact.T, atol=rounding * size, rtol=0)

    def test_golden_values(self) -> None:
        """The same bits on every machine, in float32 too."""
        rows = (np.arange(11, dtype=np.float32) - 4)[None] / 3
        turned = Rotation(11, 7).forward(rows)
        digest = hashlib.sha256(turned.astype("<f4").tobytes()).hexdigest()
        assert digest[:16] == "bd9dd08cc61981c5"
        wide = Rotation(3000, 0).forward(np.sqrt(np.arange(3000, dtype=np.float32))[None])
        assert hashlib.sha256(wide.astype("<f4").tobytes()).hexdigest()[:16] == "032f217e3bd81d01"

    def test_a_row_does_not_depend_on_those_beside_it(self) -> None:
        rows = rows_like(9, 1000)
        rotation = Rotation(1000, 0)
        whole = rotation.forward(rows)
        one = np.concatenate([rotation.forward(rows[i : i + 1]) for i in range(9)])
        assert whole.tobytes() == one.tobytes()

    def test_butterflies_of_small_and_large_strides(self) -> None:
        for width in (1, 2, 32, 64, 128, 512):
            eye = hadamard(np.eye(width))
            assert (eye @ eye == width * np.eye(width)).all()


class TestBasis:
    def factors(self) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(3)
        return {
            m.name: (np.tril(generator.random((m.size, m.size))) + np.eye(m.size)).astype("<f4")
            for m in MODULES
        }

    @pytest.mark.parametrize("seed", [None, 0, 2**63 - 1])
    @pytest.mark.parametrize("whitened", [False, True])
    def test_folded_queries_score_stored_rows(self, seed: int | None, whitened: bool) -> None:
        basis = Basis(RowLayout.of(MODULES), [0, 1], seed, self.factors() if whitened else None)
        assert basis.plain == (seed is None and not whitened)
        codec, layout = row_codec("int8"), RowLayout.of(MODULES)
        rows, queries = rows_like(20, 10), rows_like(4, 10, 1).astype(np.float64)
        packed, scale, _ = basis.encode(codec, rows)
        assert scale is not None
        back = basis.decode(codec, packed, scale, None)
        held = codec.elements(packed, layout) * scale[:, None].astype(np.float64)
        got, want = basis.fold(queries) @ held.T, queries @ back.T.astype(np.float64)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
        # half a step of 127 each, in the basis of what is stored
        assert np.linalg.norm(back - rows) < 0.05 * np.linalg.norm(rows)

    def test_rows_of_all_sizes(self) -> None:
        basis = Basis(layout_of(100), [0], 0)
        rows = rows_like(5, 100) * np.array([1e-36, 1e-20, 1, 1e20, 1e35], np.float32)[:, None]
        for name in ("int8", *LOW_BITS):
            codec = row_codec(name)
            packed, scale, _ = basis.encode(codec, rows)
            assert scale is not None
            assert codec.good_scales(scale).all()
            back = basis.decode(codec, packed, scale, None).astype(np.float64)
            along = (back * rows).sum(1) / (rows.astype(np.float64) ** 2).sum(1)
            np.testing.assert_allclose(along, 1, atol=0.01)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda f: f.astype(np.float64), r"expected float32 \[6, 6\], got float64 \[6, 6\]"),
            (lambda f: f[:5], r"expected float32 \[6, 6\], got float32 \[5, 6\]"),
            (lambda f: f * np.nan, "expected a finite factor with a positive diagonal"),
            (lambda f: f * 0, "expected a finite factor with a positive diagonal"),
        ],
    )
    def test_factors_that_are_refused(self, spoil: Callable[[Any], Any], message: str) -> None:
        factors = self.factors()
        factors[MODULES[0].name] = spoil(factors[MODULES[0].name])
        with pytest.raises(StoreError, match=f"module 'layers.0.mlp': {message}"):
            Basis(RowLayout.of(MODULES), (), None, factors)


class TestCodes:
    @pytest.mark.parametrize("name", LOW_BITS)
    @pytest.mark.parametrize("dim", WIDTHS)
    def test_bits_lie_as_the_format_says(self, name: str, dim: int) -> None:
        codec, layout, rows = row_codec(name), layout_of(dim), rows_like(6, dim)
        assert isinstance(codec, Planes)
        packed, scale, own = codec.encode(rows, layout, [0])
        planes, width = len(codec.data), -(-dim // 8)
        assert packed.shape == (6, planes * width) == (6, codec.row_bytes(layout))
        assert own is None
        assert scale is not None
        for row, got in zip(packed, codec.elements(packed, layout), strict=True):
            for d in range(dim):
                code = 0
                for p in range(planes):
                    code = 2 * code + (int(row[p * width + d // 8]) >> d % 8 & 1)
                assert got[d] == codec.levels[code]
            for p in range(planes):
                assert int(row[(p + 1) * width - 1]) >> (dim - 1) % 8 + 1 == 0  # beyond D
        assert ((codec.elements(packed, layout) > 0) == (rows >= 0)).all()

    @pytest.mark.parametrize("name", LOW_BITS)
    def test_levels_rise_and_are_antisymmetric(self, name: str) -> None:
        codec = row_codec(name)
        assert isinstance(codec, Planes)
        for planes in range(1, len(codec.data) + 1):
            levels = codec.first(planes).levels.astype(int)
            assert len(levels) == 2**planes
            assert (np.diff(levels) > 0).all()
            assert (levels == -levels[::-1]).all()

    @pytest.mark.parametrize(
        ("name", "error"), [("sign", 0.571), ("int2", 0.134), ("int4", 0.0097)]
    )
    def test_gaussian_rows_are_kept_as_well_as_can_be(self, name: str, error: float) -> None:
        """|t̂ - t|²/|t|² is e / (1 - e) with e the least error of so many levels (Lloyd, Max)."""
        rows = np.random.default_rng(0).standard_normal((40, 4096)).astype(np.float32)
        codec, layout = row_codec(name), layout_of(4096)
        packed, scale, _ = codec.encode(rows, layout, [0])
        back = codec.decode(packed, scale, None, layout, [0]).astype(np.float64)
        square = (rows.astype(np.float64) ** 2).sum(1)
        np.testing.assert_allclose((back * rows).sum(1), square, rtol=1e-6)  # no bias towards 0
        assert np.mean(((back - rows) ** 2).sum(1) / square) == pytest.approx(error, rel=0.02)

    @pytest.mark.parametrize("name", ["int2", "int4"])
    def test_the_first_planes_alone_are_a_coarser_store(self, name: str) -> None:
        rows = np.random.default_rng(0).standard_normal((40, 4096)).astype(np.float32)
        codec, layout = row_codec(name), layout_of(4096)
        packed, scale, _ = codec.encode(rows, layout, [0])
        errors = []
        for planes in range(len(codec.data), 0, -1):
            coarse = codec.first(planes)
            assert (coarse.data, coarse.name == name) == (
                codec.data[:planes],
                planes == len(codec.data),
            )
            back = coarse.decode(packed[:, : coarse.columns(layout)], scale, None, layout, [0])
            square = (rows.astype(np.float64) ** 2).sum(1)
            along = (back.astype(np.float64) * rows).sum(1) / square
            np.testing.assert_allclose(along, 1, atol=0.02)
            errors.append(np.mean(((back - rows) ** 2).sum(1) / square))
        assert errors == sorted(errors)
        assert errors[-1] == pytest.approx(0.571, rel=0.02)  # as good as "sign"
        with pytest.raises(StoreError, match=f"planes: expected 1 to {len(codec.data)} of {name}"):
            codec.first(0)
        with pytest.raises(StoreError, match="expected a codec of bit planes, got int8"):
            row_codec("int8").first(1)

    @pytest.mark.parametrize("name", LOW_BITS)
    def test_rows_of_zeros_and_rows_that_are_not_finite(self, name: str) -> None:
        codec, layout = row_codec(name), layout_of(10)
        rows = rows_like(4, 10)
        rows[1], rows[2, 3], rows[3, 0] = 0, np.inf, np.nan
        basis = Basis(layout, [0], 0)
        packed, scale, _ = basis.encode(codec, rows)
        assert scale is not None
        assert (np.isnan(scale) == [False, False, True, True]).all()
        assert scale[1] == 0
        assert (codec.good_scales(scale) == [True, True, False, False]).all()
        assert not basis.decode(codec, packed, scale, None)[1].any()

    def test_golden_codes(self) -> None:
        rows = (np.arange(11, dtype=np.float32) - 4)[None] / 3
        layout = layout_of(11)
        found = {}
        for name in LOW_BITS:
            packed, scale, _ = row_codec(name).encode(rows, layout, [0])
            assert scale is not None
            found[name] = packed.tobytes().hex(), float(scale[0])
        assert found == {
            "sign": ("f007", 1.3010752201080322),
            "int2": ("f0070e07", 0.014058324508368969),
            "int4": ("f0070e07c900a506", 0.023545436561107635),
        }


@pytest.mark.parametrize("dtype", LOW_BITS)
class TestFiles:
    def test_lost_truncated_and_foreign_planes(self, tmp_path: Path, dtype: str) -> None:
        store = full_store(tmp_path / "a", dtype)
        path = store.shards[1].files[-1].path
        assert path.name == f"shard-00001.plane{len(store.shards[1].files) - 1}.npy"
        intact = path.read_bytes()
        path.unlink()
        unreadable("the manifest lists this file, but it is missing", Store.open, tmp_path / "a")
        path.write_bytes(intact[:-1])
        unreadable(f"expected {len(intact)} bytes, got {len(intact) - 1}", Store.open, store.path)
        # Of another shard: the same size and header, other rows.
        other = store.path / path.name.replace("00001", "00000")
        path.write_bytes(other.read_bytes())
        (problem,) = Store.open(store.path).verify()
        assert problem.startswith(f"{path}: damaged: expected crc32")
        # Of a store of other modules.
        wide = wide_store(tmp_path / "b", dtype, dim=100)
        path.write_bytes(wide.shards[0].files[-1].path.read_bytes())
        unreadable(f"{path}: expected", Store.open, store.path)

    def test_the_manifest(self, tmp_path: Path, dtype: str) -> None:
        store = stored(tmp_path, [1, 2], dtype=dtype)
        assert store.manifest["version"] == 2
        assert store.manifest["rotation"] == {"kind": "hadamard", "seed": 0}
        shard = store.manifest["shards"][0]
        assert [key for key in shard if "plane" in key or key == "data"] == list(store.codec.data)
        changes: list[tuple[Any, str]] = [
            (lambda m: m.update(version=1), f"version: expected 2 for {dtype} rows, got 1"),
            (lambda m: m["shards"][0].pop("plane0"), r"shards\[0\].plane0: expected an object"),
            (lambda m: m.pop("rotation"), "rotation: expected an object, got null"),
            (lambda m: m["rotation"].update(kind="x"), 'rotation.kind: expected "hadamard", got'),
            (lambda m: m["rotation"].update(seed=-1), "rotation.seed: expected an integer from 0"),
            (lambda m: m["shards"][0].update(exponents={}), "exponents: expected none, for the"),
            (
                lambda m: m["shards"][0]["plane0"].update(bytes=9),
                "plane0.bytes: expected 4100, got",
            ),
            (
                lambda m: m["shards"][0]["scale"].update(file=m["shards"][0]["plane0"]["file"]),
                "two entries name the same file",
            ),
        ]
        text = (tmp_path / "manifest.json").read_bytes()
        for change, message in changes:
            edit_manifest(tmp_path, change)
            with pytest.raises(StoreFormatError, match=message):
                Store.open(tmp_path)
            (tmp_path / "manifest.json").write_bytes(text)

    def test_another_rotation_is_another_run(self, tmp_path: Path, dtype: str) -> None:
        stored(tmp_path, [1, 2], dtype=dtype)
        with pytest.raises(
            StoreMismatchError, match=r"cannot resume: rotation\.seed: the store has"
        ):
            writer_of(tmp_path, dtype=dtype, rotation=4, resume=True)
        with writer_of(tmp_path, dtype=dtype, resume=True) as writer:
            append(writer, [3])

    def test_rows_that_are_refused(self, tmp_path: Path, dtype: str) -> None:
        with writer_of(tmp_path, dtype=dtype) as writer:
            rows, scale = rows_of([1, 2], dtype), scales_of([1, 2])
            message = (
                f"rows: expected uint8 [2, {rows.shape[1]}], got uint8 [2, {rows.shape[1] - 1}]"
            )
            refused(message, writer.append, [1, 2], rows[:, 1:], scale)
            scale[1] = np.nan
            message = "row_scale: expected positive numbers or 0, got nan for id '2'"
            refused(message, writer.append, [1, 2], rows, scale)
            own = np.ones((2, 2), np.int16)
            message = f"row_exponents: expected None, for the store's rows are {dtype}"
            refused(message, writer.append, [1, 2], rows, scales_of([1, 2]), None, own)


def test_the_first_planes_open_no_other_file(tmp_path: Path) -> None:
    store = stored(tmp_path, list(range(8)), dtype="int4")
    coarse = store.first_planes(2)
    assert (coarse.dtype, coarse.row_bytes) == ("int4[:2]", store.row_bytes // 2)
    for shard in store.shards:
        for file in shard.files[2:]:
            file.path.unlink()
    rows = coarse.take(range(8))
    codec = row_codec("int4").first(2)
    want = store.basis.decode(
        codec, rows_of(list(range(8)), "int4")[:, :4], scales_of(list(range(8))), None
    )
    np.testing.assert_array_equal(rows, want)
    coarse.check_unchanged()


def test_only_some_codecs_are_rotated_or_whitened(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [{"rotation": 0}, {"whitening": {}}]
    for options in asked:
        name = next(iter(options))
        for dtype in ("float16", "float32"):
            with pytest.raises(
                StoreError, match=f"{name}: expected none, for the store's rows are"
            ):
                StoreWriter.create(tmp_path / "s", modules=MODULES, dtype=dtype, **options)
    with pytest.raises(StoreError, match="rotation: expected a seed from 0 to"):
        StoreWriter.create(tmp_path / "s", modules=MODULES, dtype="int8", rotation=-1)
    store = stored(tmp_path / "t", [1], dtype="float16")
    edit_manifest(store.path, lambda m: m.update(rotation={"kind": "hadamard", "seed": 0}))
    unreadable("rotation: expected none, for the rows are float16", Store.open, store.path)


def test_a_whitened_store(tmp_path: Path) -> None:
    factors = TestBasis().factors()
    rows = rows_like(5, 10)
    create = partial(StoreWriter.create, tmp_path, modules=MODULES, dtype="int8", rotation=3)
    with create(whitening=factors) as writer:
        writer.set_module_exponents([0, 1])
        stored_rows, scale, _ = writer.encode(rows)
        writer.append(range(5), stored_rows, scale)
    store = Store.open(tmp_path)
    assert store.verify() == []
    assert np.linalg.norm(store.take(range(5)) - rows) < 0.05 * np.linalg.norm(rows)
    (path,) = (tmp_path / "projection").iterdir()
    assert path.name.startswith("whitening-")
    with create(whitening=factors, resume=True) as writer:
        np.testing.assert_array_equal(writer.encode(rows)[0], stored_rows)
    other = {name: factor * 2 for name, factor in factors.items()}
    with pytest.raises(StoreMismatchError, match="cannot resume: whitening"):
        create(whitening=other, resume=True)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert any("damaged: expected sha256" in problem for problem in store.verify())
    with pytest.raises(StoreFormatError, match="damaged: expected sha256"):
        Store.open(tmp_path).take([0])
