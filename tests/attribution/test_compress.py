"""`compress_store` and `logra compress`: the same store in fewer bytes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from dense_influence import gradients, make_store
from store_samples import MODULES, full_store, refused

from logra_kernels.attribution import Attributor, compress_store
from logra_kernels.attribution import compress as module
from logra_kernels.cli.main import main
from logra_kernels.curvature import RawCurvature
from logra_kernels.curvature.preconditioner import CholeskyPreconditioner
from logra_kernels.store import (
    RowLayout,
    Store,
    StoreError,
    StoreMismatchError,
    StoreWriter,
    codec_names,
    row_codec,
)


def shards(store: Store) -> list[bytes]:
    """The bytes of every shard's files, ids aside."""
    return [
        (store.path / shard[key]["file"]).read_bytes()
        for shard in store.manifest["shards"]
        for key in (*store.codec.data, "scale")
        if shard[key] is not None
    ]


def test_everything_but_the_rows_is_copied(tmp_path: Path) -> None:
    source = full_store(tmp_path / "a")
    seen: list[tuple[int, int]] = []
    made = compress_store(
        source, tmp_path / "b", rotate=False, whiten=False, progress=lambda *at: seen.append(at)
    )
    assert (made.dtype, made.finalized, made.verify()) == ("int8", True, [])
    assert made.manifest["version"] == 2
    assert seen[-1] == (8, 8)
    assert made.row_bytes * 2 == source.row_bytes
    assert made.ids.equals(source.ids)
    assert made.metadata(range(8)) == source.metadata(range(8))
    for key in ("modules", "projection", "fingerprints"):
        assert made.manifest[key] == source.manifest[key]
    tensors = made.load_tensors()
    assert tensors.keys() == source.load_tensors().keys()
    assert set(made.curvatures) == set(source.curvatures)
    for name in source.curvatures:
        held, meta = made.load_curvature(name)
        wanted, about = source.load_curvature(name)
        assert meta == about
        assert all(np.array_equal(held[key], wanted[key]) for key in wanted)
    exact, got = source.take(range(8)), made.take(range(8))
    factors = np.repeat(np.ldexp(1.0, made.module_exponents), made.layout.sizes)
    largest = np.abs(exact / factors).max(axis=1, keepdims=True)
    assert (np.abs(got - exact) <= (largest / 254 * (1 + 1e-6)) * factors).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_scores_are_nearly_those_of_the_source(tmp_path: Path, dtype: str) -> None:
    source = make_store(tmp_path / "a", gradients(400), dtype, shard_rows=150)
    RawCurvature.rebuild(source).save(source)
    source = Store.open(tmp_path / "a")
    made = compress_store(source, tmp_path / "b", shard_rows=90)
    queries = gradients(5, seed=3)
    for mode in ("dot", "l-relatif"):
        want = Attributor(source).scores(queries, mode).scores
        got = Attributor(made).scores(queries, mode).scores
        for one, other in zip(want, got, strict=True):
            assert np.corrcoef(one, other)[0, 1] > 0.999


@pytest.mark.parametrize("dtype", codec_names())
def test_an_interrupted_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    source = make_store(tmp_path / "a", gradients(300), "float16")
    RawCurvature.rebuild(source).save(source)
    source = Store.open(source.path)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * source.dim * 32)
    whole = compress_store(source, tmp_path / "whole", dtype, shard_rows=50)

    def stop(done: int, total: int) -> None:
        if done == 160:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_store(source, tmp_path / "b", dtype, shard_rows=50, progress=stop)
    begun = Store.open(tmp_path / "b")
    assert (begun.num_rows, begun.finalized) == (160, False)
    made = compress_store(source, tmp_path / "b", dtype, shard_rows=50)
    np.testing.assert_array_equal(made.take(range(300)), whole.take(range(300)))
    assert made.module_exponents == whole.module_exponents
    assert made.ids.equals(source.ids)
    files = shards(made)
    again = compress_store(source, tmp_path / "b", dtype, shard_rows=50)
    assert shards(again) == files
    assert again.verify() == []


def test_what_compress_refuses(tmp_path: Path) -> None:
    source = make_store(tmp_path / "a", gradients(10))
    other = make_store(tmp_path / "c", gradients(10), ids=range(10))
    compress_store(source, tmp_path / "b")
    with pytest.raises(StoreMismatchError, match="holds other rows than"):
        compress_store(other, tmp_path / "b")
    with pytest.raises(StoreMismatchError, match="cannot resume: dtype"):
        compress_store(source, tmp_path / "b", "float32")
    refused("dtype: expected one of", compress_store, source, tmp_path / "d", "int3")
    message = "rotate: expected True or None, for sign rows always are"
    refused(message, compress_store, source, tmp_path / "d", "sign", rotate=False)
    message = "rotation: expected none, for the store's rows are float32"
    refused(message, compress_store, source, tmp_path / "d", "float32", rotate=True)
    message = f"whiten: expected a store with a raw curvature, got {source.path}"
    refused(message, compress_store, source, tmp_path / "d", "int4", whiten=True)
    with StoreWriter.create(tmp_path / "open", modules=source.modules, dtype="float32") as writer:
        with pytest.raises(StoreError, match="expected a finalized store, got one that is being"):
            compress_store(Store.open(tmp_path / "open"), tmp_path / "d")
        writer.flush()
    assert not (tmp_path / "d").exists()


def test_modules_of_different_sizes_are_brought_together() -> None:
    layout = RowLayout.of(MODULES)  # of six columns and of four
    rows = np.concatenate([np.full((4, 6), 2.0**-20), np.full((4, 4), 3.0)], axis=1)
    rows[0, 6:] = 0
    assert module.module_exponents(rows.astype(np.float32), layout) == [-21, 0]
    assert module.module_exponents(np.zeros((4, 10), np.float32), layout) == [0, 0]
    codec = row_codec("int8")
    stored, scale, own = codec.encode(rows, layout, [-21, 0])
    back = codec.decode(stored, scale, own, layout, [-21, 0])
    assert (np.abs(back - rows)[1:, :6] <= 2.0**-20 / 127).all()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_store(tmp_path / "a", gradients(8))
    RawCurvature.rebuild(source).save(source)
    assert main(["compress", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "8 rows of 44 bytes in int8" in capsys.readouterr().out
    assert Store.open(tmp_path / "b").dtype == "int8"
    assert main(["compress", str(tmp_path / "a"), str(tmp_path / "c"), "--codec", "sign"]) == 0
    assert "8 rows of 6 bytes in sign" in capsys.readouterr().out
    assert main(["compress", str(tmp_path / "none"), str(tmp_path / "b")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def whole_store(path: Path, count: int = 400) -> Store:
    """Rows in float32 with their raw curvature."""
    source = make_store(path, gradients(count), "float32", shard_rows=150)
    RawCurvature.rebuild(source).save(source)
    return Store.open(path)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2", "sign"])
class TestLowBits:
    def test_scores_of_whitened_rows(self, tmp_path: Path, dtype: str) -> None:
        """The error of a score is that of the code, over rows whitened and rotated."""
        source = whole_store(tmp_path / "a")
        made = compress_store(source, tmp_path / "b", dtype, shard_rows=90)
        assert made.verify() == []
        assert "whitening" in made.manifest
        assert made.manifest["rotation"] == {"kind": "hadamard", "seed": 0}
        least = {"int8": 0.999, "int4": 0.98, "int2": 0.85, "sign": 0.65}[dtype]
        queries = gradients(5, seed=3)
        groups = {"up": "up", "down": "down"}
        for mode in ("dot", "l-relatif", "l2", "whitened-cosine"):
            want = Attributor(source).scores(queries, mode, groups=groups)
            got = Attributor(made).scores(queries, mode, groups=groups)
            assert got.normalised_by is None
            for one, other in zip(want.scores, got.scores, strict=True):
                assert np.corrcoef(one, other)[0, 1] > least
            if mode == "l2":  # its bias is sigma's, which is exact
                continue
            for name in groups:
                parts = zip(want.groups[name].scores, got.groups[name].scores, strict=True)
                assert np.mean([np.corrcoef(*pair)[0, 1] for pair in parts]) > least - 0.25

    def test_sigma_is_that_of_the_rows_before(self, tmp_path: Path, dtype: str) -> None:
        source = whole_store(tmp_path / "a")
        want = Attributor(source).self_influence({"up": "up"})
        made = compress_store(source, tmp_path / "b", dtype)
        got = Attributor(made).self_influence({"up": "up"})
        for name in want:
            # float32 norms, divided by a scale and multiplied again, then squared
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6)

    def test_another_damping(self, tmp_path: Path, dtype: str) -> None:
        source = whole_store(tmp_path / "a")
        made = compress_store(source, tmp_path / "b", dtype)
        queries = gradients(5, seed=3)
        exact = Attributor(source, damping_scale=1.0)
        least = {"int8": 0.999, "int4": 0.98, "int2": 0.85, "sign": 0.6}[dtype]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            other = Attributor(made, damping_scale=1.0)
            for one, two in zip(
                exact.scores(queries).scores, other.scores(queries).scores, strict=True
            ):
                assert np.corrcoef(one, two)[0, 1] > least
            assert not said  # a dot product needs no sigma
            result = other.scores(queries, "l-relatif")
        if dtype == "int8":
            assert result.normalised_by is None
            assert not said
        else:
            assert result.normalised_by == (
                "sigma of the rows under 'raw' and the damping it came with"
            )
            assert f"rows in {dtype} do not tell their sigma under this" in str(said[0].message)
            np.testing.assert_allclose(
                other.self_influence(), Attributor(source).self_influence(), rtol=1e-6
            )

    def test_rows_and_modules_without_gradient(self, tmp_path: Path, dtype: str) -> None:
        """Their norms are those of the rows before, so that they score zero and are counted."""
        rows = gradients(50)
        rows[[3, 44]] = 0
        rows[7, :12] = 0  # all columns of the first module
        source = make_store(tmp_path / "a", rows, "float32")
        RawCurvature.rebuild(source).save(source)
        made = compress_store(Store.open(source.path), tmp_path / "b", dtype)
        queries, first = gradients(3, seed=3), {"first": "layer.0.up"}
        result = Attributor(made).scores(queries, "l-relatif", groups=first)
        assert (result.zero_rows, result.groups["first"].zero_rows) == (2, 3)
        assert not result.scores[:, [3, 44]].any()
        assert not result.groups["first"].scores[:, 7].any()

    def test_without_a_curvature(self, tmp_path: Path, dtype: str) -> None:
        source = make_store(tmp_path / "a", gradients(50), "float32")
        made = compress_store(source, tmp_path / "b", dtype)
        assert "whitening" not in made.manifest
        queries = gradients(3, seed=3)
        want = Attributor(source, "none").scores(queries).scores
        got = Attributor(made, "none").scores(queries).scores
        for one, other in zip(want, got, strict=True):
            assert np.corrcoef(one, other)[0, 1] > 0.6

    def test_the_first_planes_answer(self, tmp_path: Path, dtype: str) -> None:
        source = whole_store(tmp_path / "a")
        made = compress_store(source, tmp_path / "b", dtype)
        if dtype == "int8":
            return
        queries = gradients(5, seed=3)
        want = Attributor(source).scores(queries, "l-relatif").scores
        got = Attributor(made.first_planes(1)).scores(queries, "l-relatif").scores
        for one, other in zip(want, got, strict=True):
            assert np.corrcoef(one, other)[0, 1] > 0.65


def test_an_int8_store_scores_another_damping_closely(tmp_path: Path) -> None:
    """Dot scores are those of a fresh whitening to 1e-3 of |q||t|."""
    source = whole_store(tmp_path / "a")
    made = compress_store(source, tmp_path / "b")
    queries = gradients(5, seed=3)
    factors = RawCurvature.load(source).damped()
    assert isinstance(factors, CholeskyPreconditioner)
    rows = source.layout.split(source.take(range(400)).astype(np.float64))
    whitened = [
        np.linalg.solve(factor.numpy(), part.T)
        for factor, part in zip(factors.lower_factors().values(), rows, strict=True)
    ]
    length = np.linalg.norm(np.concatenate(whitened), axis=0)  # |t|, [N]
    for scale in (0.01, 1.0):
        fresh = RawCurvature.load(source).damped(damping_scale=scale)
        want = Attributor(source, damping_scale=scale).scores(queries).scores
        got = Attributor(made, damping_scale=scale).scores(queries).scores
        folded = made.basis.fold(fresh.precondition(queries).double().numpy())
        size = np.linalg.norm(folded, axis=1)  # |q|, [Q]
        # Half a step of 1/127 of a row's largest element in 44 columns is more than 1e-3 of a row
        # of so few: the bound of the issue is one of long rows, this one of the codec.
        assert (np.abs((got - want).numpy()) <= 1e-2 * size[:, None] * length).all()


def test_a_source_that_was_taken_for_another_is_refused(tmp_path: Path) -> None:
    source = whole_store(tmp_path / "a", 60)
    compress_store(source, tmp_path / "b", "sign")
    with pytest.raises(StoreMismatchError, match="cannot resume: whitening"):
        compress_store(source, tmp_path / "b", "sign", whiten=False)
    made = compress_store(compress_store(source, tmp_path / "c", "int8"), tmp_path / "d", "sign")
    assert made.num_rows == 60
