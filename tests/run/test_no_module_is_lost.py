"""float16 stores keep every finite gradient, whatever the first row is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import causal_loss, ragged_batch, tiny_llama

import logra_kernels as logix
from logra_kernels import Covariance, RawCurvature, Store
from logra_kernels.run import Run


def kept(store: Store, want: Tensor) -> None:
    """Every element is within 2**-11 of the largest of its module in its row."""
    got = torch.from_numpy(store.take(range(store.num_rows))).double()
    parts = zip(store.layout.names, store.layout.split(got), store.layout.split(want), strict=True)
    for name, one, other in parts:
        largest = other.double().abs().amax(dim=1, keepdim=True)
        assert ((one - other.double()).abs() <= 2.0**-11 * largest).all(), name
        assert torch.equal(one.abs().amax(dim=1) == 0, largest[:, 0] == 0), name
    assert store.verify() == []


class TwoInputs(nn.Module):
    """`a` sees the first three features, `b` the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.a(x[:, :3]).square().sum() + self.b(x[:, 3:]).square().sum()
        return loss


def open_run(folder: Path, model: nn.Module, **options: Any) -> Run:
    run = logix.init("toy", root_dir=str(folder), **options)
    run.watch(model)
    run.setup({"save": "grad", "statistic": {"grad": Covariance}})
    return run


def test_a_module_that_is_zero_in_the_first_row_of_a_tiny_loss(tmp_path: Path) -> None:
    model = TwoInputs()
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    x[0, :3] = 0
    run = open_run(tmp_path, model)
    with run(data_id=range(4)) as logged:
        (model(x) * 1e-12).backward()
    run.finalize()
    store = Store.open(tmp_path / "toy")
    kept(store, logged.rows())
    assert store.manifest["version"] == 1  # the exponents of the first row suit the others


def test_a_first_example_of_two_tokens(tmp_path: Path) -> None:
    """The gradients of its queries and keys are zero: its one prediction sees one token."""
    model = tiny_llama()
    ids, mask = ragged_batch(61, [2, 9, 5, 7], "right")
    run = open_run(tmp_path, model)
    run.add_lora(rank=3)
    rows = []
    for n in range(4):
        with run(data_id=[n], mask=mask[n : n + 1]) as logged:
            (causal_loss(model, ids[n : n + 1], mask[n : n + 1]) * 1e-9).backward()
        rows.append(logged.rows())
    run.finalize()
    kept(Store.open(tmp_path / "toy"), torch.cat(rows))


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("sizes", [(1e30, 1e-30), (1e-30, 1e30)])
def test_gradients_of_any_size_after_any_other(
    tmp_path: Path, sizes: tuple[float, float], on_nonfinite: str
) -> None:
    model = TwoInputs()
    run = open_run(tmp_path, model, on_nonfinite=on_nonfinite)
    x = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    rows = []
    for n, size in enumerate(sizes):
        with run(data_id=[n]) as logged:
            (model(x[n : n + 1]) * size).backward()
        rows.append(logged.rows())
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert store.num_rows == 2
    kept(store, torch.cat(rows))


def test_the_size_of_the_loss_is_in_the_row_scales_alone(tmp_path: Path) -> None:
    model = TwoInputs()
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(1))
    stores = []
    for power in (0, 50, -60):
        run = open_run(tmp_path / str(power), model)
        with run(data_id=range(9)):
            (model(x) * 2.0**power).backward()
        run.finalize()
        stores.append(Store.open(tmp_path / str(power) / "toy"))
        assert stores[-1].module_exponents == stores[0].module_exponents
        assert max(stores[-1].module_exponents) == 0
        assert stores[-1].shards[0].rows.tobytes() == stores[0].shards[0].rows.tobytes()
        scales = stores[-1].shards[0].row_scale, stores[0].shards[0].row_scale
        assert (scales[0] == scales[1] * 2.0**power).all()


@pytest.mark.parametrize("power", [40, -40])
def test_a_first_row_that_is_not_like_the_others(tmp_path: Path, power: int) -> None:
    """In it one module is 2**40 times larger, or smaller, beside the other than it is later."""
    model = TwoInputs()
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    x[0, :3] *= 2.0 ** (power / 2)  # the gradient is quadratic in x
    stores = []
    for size in (1, 4, 6):
        run = open_run(tmp_path / str(size), model)
        rows = []
        for first in range(0, 6, size):
            here = slice(first, min(first + size, 6))
            with run(data_id=range(6)[here]) as logged:
                model(x[here]).backward()
            rows.append(logged.rows())
        run.finalize()
        stores.append(Store.open(tmp_path / str(size) / "toy"))
        kept(stores[-1], torch.cat(rows))
        assert stores[-1].manifest["version"] == 1  # only the first row's exponent is off, by 14
        assert stores[-1].module_exponents == ([0, -14] if power > 0 else [-14, 0])
    for store in stores[1:]:  # in equal bits
        assert store.module_exponents == stores[0].module_exponents
        assert store.shards[0].rows.tobytes() == stores[0].shards[0].rows.tobytes()


def test_rows_with_exponents_do_not_depend_on_batches_or_flushes(tmp_path: Path) -> None:
    """Their curvature neither; it is that of the rows as stored."""
    model = TwoInputs()
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    x[1::3, :3] *= 1e-15
    x[2::5, 3:] *= 1e-12
    stores, rows = [], []
    for name, size in (("one", 40), ("other", 7)):
        folder = tmp_path / name
        run = open_run(folder, model)
        for first in range(0, 40, size):
            if first == 21:  # what a run that ends early leaves is committed
                assert run._recorder is not None
                run._recorder.suspend()
                run = open_run(folder, model, resume=True)
            here = slice(first, min(first + size, 40))
            with run(data_id=range(40)[here]) as logged:
                model(x[here]).backward()
            rows.append(logged.rows())
        run.finalize()
        stores.append(Store.open(folder / "toy"))
    kept(stores[0], rows[0])
    assert stores[0].manifest["version"] == stores[1].manifest["version"] == 2
    assert torch.equal(*(torch.from_numpy(store.take(range(40))) for store in stores))
    curvatures = [RawCurvature.load(store).checksum for store in stores]
    assert curvatures[0] == curvatures[1] == RawCurvature.rebuild(stores[1]).checksum
