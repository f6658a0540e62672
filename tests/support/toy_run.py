"""Runs over a toy model of twelve examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refuse as refuse
from refusals import refused as refused
from torch import Tensor, nn
from toy_models import Mlp

import logra_kernels as logix
from logra_kernels import Covariance, Run
from logra_kernels.integrations.logix.run import LogixRun

Data = tuple[Tensor, Tensor]  # inputs, classes

COUNT = 12
RAW = {"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, 7, generator=generator)
    return x, torch.randint(4, (COUNT,), generator=generator)


@pytest.fixture
def model() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def loss_of(model: nn.Module, data: Data, part: slice | list[int]) -> Tensor:
    x, y = data
    return nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum")


def make_run(folder: Path, model: nn.Module, rank: int | None = 3, **options: Any) -> LogixRun:
    run = logix.init("toy", root_dir=str(folder), **options)
    run.watch(model)
    if rank is not None:
        run.add_lora(rank=rank)
    return run


def log_all(
    run: Run,
    model: nn.Module,
    data: Data,
    size: int = 5,
    order: list[int] | None = None,
    **call: Any,
) -> None:
    order = list(range(COUNT)) if order is None else order
    for begin in range(0, COUNT, size):
        part = order[begin : begin + size]
        with run(data_id=[f"row{n}" for n in part], **call):
            loss_of(model, data, part).backward()


def log_queries(run: Run, model: nn.Module, data: Data, part: slice) -> None:
    run.eval()
    with run(data_id=[f"query{n}" for n in range(COUNT)[part]]):
        loss_of(model, data, part).backward()


def begun(folder: Path, model: nn.Module, **options: Any) -> LogixRun:
    """A run that saves rows and sums their covariance."""
    run = make_run(folder, model, **options)
    run.setup(RAW)
    return run


def finished(folder: Path, model: nn.Module, data: Data, size: int = 5, **options: Any) -> LogixRun:
    run = begun(folder, model, **options)
    log_all(run, model, data, size)
    run.finalize()
    return run
