"""`compress_store` and `logra compress`: the same store in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dense_influence import gradients, make_store
from store_samples import MODULES, full_store, refused

from logra_kernels.attribution import Attributor
from logra_kernels.cli.main import main
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import (
    RowLayout,
    Store,
    StoreError,
    StoreMismatchError,
    StoreWriter,
    compress_store,
    row_codec,
)
from logra_kernels.store import compress as module


def shards(store: Store) -> list[bytes]:
    """The bytes of every shard's files, ids aside."""
    return [
        (store.path / shard[key]["file"]).read_bytes()
        for shard in store.manifest["shards"]
        for key in ("data", "scale")
    ]


def test_everything_but_the_rows_is_copied(tmp_path: Path) -> None:
    source = full_store(tmp_path / "a")
    seen: list[tuple[int, int]] = []
    made = compress_store(source, tmp_path / "b", progress=lambda *at: seen.append(at))
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


def test_an_interrupted_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_store(tmp_path / "a", gradients(300), "float16")
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * source.dim * 32)
    whole = compress_store(source, tmp_path / "whole", shard_rows=50)

    def stop(done: int, total: int) -> None:
        if done == 160:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_store(source, tmp_path / "b", shard_rows=50, progress=stop)
    begun = Store.open(tmp_path / "b")
    assert (begun.num_rows, begun.finalized) == (160, False)
    made = compress_store(source, tmp_path / "b", shard_rows=50)
    np.testing.assert_array_equal(made.take(range(300)), whole.take(range(300)))
    assert made.module_exponents == whole.module_exponents
    assert made.ids.equals(source.ids)
    files = shards(made)
    again = compress_store(source, tmp_path / "b", shard_rows=50)
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
    refused("dtype: expected one of", compress_store, source, tmp_path / "d", "int4")
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
    full_store(tmp_path / "a")
    assert main(["compress", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "8 rows of 10 bytes in int8" in capsys.readouterr().out
    assert Store.open(tmp_path / "b").dtype == "int8"
    assert main(["compress", str(tmp_path / "none"), str(tmp_path / "b")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
