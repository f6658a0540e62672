"""Rows that are logged in few bits at once: no float rows, exact sums, norms, and resumption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from logra_kernels import Config, Run
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import Mean
from logra_kernels.run.row_norms import KEY
from logra_kernels.store import Store

COUNT, WIDTH, COORDINATES = 60, 24, 300
LOW_BITS = ["int4", "int2", "sign"]


def data() -> Tensor:
    return torch.randn(COUNT, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, WIDTH))


def passed(run: Run, net: nn.Module, ids: list[int]) -> None:
    with run(data_id=ids):
        net(data()[ids]).square().sum().backward()


def begun(folder: Path, dtype: str, statistic: object = "diagonal") -> tuple[Run, nn.Module]:
    """A run with a projection from a pilot of a third of the examples; or that goes on with one."""
    net = model()
    config = Config(root_dir=str(folder), dtype=dtype, shard_bytes=1 << 9)
    run = Run("low", config, resume=True)
    run.watch(net)
    with run.pilot("eigen", coordinates=COORDINATES):
        for first in range(0, 20, 5):
            passed(run, net, list(range(first, first + 5)))
    run.setup({"save": "grad", "statistic": statistic} if statistic else {"save": "grad"})
    return run, net


def logged(folder: Path, dtype: str, batch: int = 7, statistic: object = "diagonal") -> Store:
    run, net = begun(folder, dtype, statistic)
    for first in range(0, COUNT, batch):
        ids = list(range(first, min(first + batch, COUNT)))
        if not all(run.is_logged(i) for i in ids):
            passed(run, net, ids)
    run.finalize()
    return Store.open(folder / "low")


def queries(store: Store) -> Tensor:
    return torch.from_numpy(store.take(range(5)))


@pytest.mark.parametrize("dtype", LOW_BITS)
def test_the_curvature_and_the_norms_are_those_of_the_rows_before(
    tmp_path: Path, dtype: str
) -> None:
    exact, low = logged(tmp_path / "a", "float32"), logged(tmp_path / "b", dtype)
    assert low.verify() == []
    assert low.manifest["rotation"] == {"kind": "hadamard", "seed": 0}
    assert low.module_exponents == [0, 0]
    assert low.curvatures["diagonal"]["meta"] == exact.curvatures["diagonal"]["meta"]
    rows = exact.layout.split(exact.take(range(COUNT)))
    norms = np.stack([np.linalg.norm(part, axis=1) for part in rows], axis=1)  # [N, M]
    cache = low.self_influence_cache(KEY, low.self_influence_keys()[0][1])
    for index, shard in enumerate(low.shards):
        here = slice(shard.first_row, shard.first_row + shard.num_rows)
        got = cache.read(index) * shard.row_scale[:, None]
        np.testing.assert_allclose(got, norms[here], rtol=1e-5)
    least = {"int4": 0.97, "int2": 0.8, "sign": 0.6}[dtype]
    want = Attributor(exact).scores(queries(exact), "l-relatif").scores
    with pytest.warns(UserWarning, match=f"rows in {dtype} do not tell their sigma under this"):
        result = Attributor(low).scores(queries(exact), "l-relatif")
    assert result.normalised_by == (
        "sigma of the rows under 'the pilot' and the damping it came with"
    )
    for one, other in zip(want, result.scores, strict=True):
        assert np.corrcoef(one, other)[0, 1] > least


def test_int8_rows_of_an_eigenbasis_are_rotated(tmp_path: Path) -> None:
    exact, low = logged(tmp_path / "a", "float32"), logged(tmp_path / "b", "int8")
    assert low.manifest["rotation"] == {"kind": "hadamard", "seed": 0}
    want = Attributor(exact).scores(queries(exact), "l-relatif").scores
    result = Attributor(low).scores(queries(exact), "l-relatif")
    assert result.normalised_by is None
    for one, other in zip(want, result.scores, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.999


@pytest.mark.parametrize("dtype", ["int8", *LOW_BITS])
@pytest.mark.parametrize("statistic", ["diagonal", {"grad": ["diagonal", Mean]}, None])
def test_a_killed_run_ends_as_the_whole_one(tmp_path: Path, dtype: str, statistic: object) -> None:
    """What sums lost is passed again; its rows are not written again."""
    whole = logged(tmp_path / "whole", dtype, statistic=statistic)
    run, net = begun(tmp_path / "killed", dtype, statistic)
    passed(run, net, list(range(30)))
    assert run._recorder is not None
    writer = run._recorder._writer
    writer.flush()
    before = [shard.first_row for shard in Store.open(writer.path).shards]
    writer.abort()  # as a kill leaves it: rows on the disk, sums lost
    run, net = begun(tmp_path / "killed", dtype, statistic)
    assert run.is_logged(3) == (dtype == "int8")
    del run
    killed = logged(tmp_path / "killed", dtype, statistic=statistic)
    assert [shard.first_row for shard in killed.shards][: len(before)] == before
    same(whole, killed)


@pytest.mark.parametrize("dtype", LOW_BITS)
def test_a_suspended_run_goes_on(tmp_path: Path, dtype: str) -> None:
    whole = logged(tmp_path / "whole", dtype)
    run, net = begun(tmp_path / "later", dtype)
    passed(run, net, list(range(28)))
    assert run._recorder is not None
    run._recorder.suspend()
    run, _ = begun(tmp_path / "later", dtype)
    assert run.is_logged(27)
    assert not run.is_logged(28)
    # Squares are added in blocks of 256 rows, which begin anew where the sums were saved.
    same(whole, logged(tmp_path / "later", dtype), sums=False)


def same(whole: Store, other: Store, sums: bool = True) -> None:
    """Equal bits of rows, sums and norms; the shards may be cut elsewhere.

    Without `sums` those in float64 need be equal to rounding only.
    """
    assert other.verify() == []
    assert other.ids.equals(whole.ids)
    for read in (
        lambda store: np.concatenate([shard.rows for shard in store.shards]),
        lambda store: np.concatenate([shard.row_scale for shard in store.shards]),
        lambda store: store.take(range(COUNT)),
    ):
        np.testing.assert_array_equal(read(whole), read(other))
    assert other.curvatures.keys() == whole.curvatures.keys()
    for name in whole.curvatures:
        left, right = (store.load_curvature(name) for store in (whole, other))
        if sums:
            assert left[1] == right[1]
        for key in left[0]:
            rounding = 0 if sums else 1e-14
            np.testing.assert_allclose(left[0][key], right[0][key], rtol=rounding, atol=0)
    if not whole.codec.faithful:
        found = []
        for store in (whole, other):
            cache = store.self_influence_cache(KEY, store.self_influence_keys()[0][1])
            found.append(np.concatenate([cache.read(i) for i in range(len(store.shards))]))
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("dtype", ["int8", *LOW_BITS])
def test_bits_do_not_depend_on_the_batches(tmp_path: Path, dtype: str) -> None:
    stores = [logged(tmp_path / str(batch), dtype, batch) for batch in (1, 7, 60)]
    for other in stores[1:]:
        same(stores[0], other)


def test_rows_without_a_pilot_are_refused(tmp_path: Path) -> None:
    net = model()
    run = Run("low", Config(root_dir=str(tmp_path), dtype="sign"))
    run.watch(net)
    run.add_lora()
    run.setup({"save": "grad"})
    with pytest.raises(ValueError, match="dtype: sign rows are of an eigenbasis, which whitens"):
        passed(run, net, [0, 1])
    assert not (tmp_path / "low" / "manifest.json").exists()
