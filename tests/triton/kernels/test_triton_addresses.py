"""Rows so far apart that row number times stride, in elements, does not fit in 32 bits."""

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from logra_kernels import triton as kernels

STRIDE = 2**30 + 16  # elements: row 2 begins beyond 2**31
WIDTH = 32
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python has from 3.14 on


@pytest.fixture
def far() -> Iterator[Tensor]:
    """float16 [3, 32], rows 2 GiB apart. The memory between them is never touched."""
    values = torch.randn(3, WIDTH).half()
    count = 2 * STRIDE + WIDTH
    if values.device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        memory = mmap.mmap(-1, 2 * count, flags=flags)
        base = torch.frombuffer(memory, dtype=torch.float16)
    else:
        base = torch.zeros(count, dtype=torch.float16)
    rows = base.as_strided((3, WIDTH), (STRIDE, 1))
    rows.copy_(values)
    yield rows
    del base, rows


def covariance(rows: Tensor) -> Tensor:
    cov = torch.zeros(WIDTH, WIDTH)
    kernels.covariance_update_(cov, rows)
    return cov


# Each of rows that lie far apart or near, beside a tensor [5, 32] float16 that lies near.
CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scores of rows": lambda rows, other: kernels.scores(other.float(), rows),
    "scores of queries": lambda rows, other: kernels.scores(rows, other),
    "topk_scores": lambda rows, other: kernels.topk_scores(other.float(), rows, 3),
    "self_influence of rows": lambda rows, other: kernels.self_influence(rows, other.float()),
    "self_influence of a factor": lambda rows, other: kernels.self_influence(other, rows),
    "project tokens": lambda rows, other: kernels.project(rows[None], other),
    "project examples": lambda rows, other: kernels.project(rows[:, None], other),
    "project by": lambda rows, other: kernels.project(other, rows),
    "x": lambda x, p: kernels.projected_gradients(x[None], p[None, :3], p, None),
    "x of examples": lambda x, p: kernels.projected_gradients(x[:, None], p[:3, None], p, None),
    "x and dy": lambda x, p: kernels.projected_gradients(x[None], x[None], p, None),
    "x and dy of examples": lambda x, p: kernels.projected_gradients(
        x[:, None], x[:, None], p, None
    ),
    "grouped": lambda x, p: kernels.projected_gradients_grouped(
        [x[None]] * 2, [x[None]] * 2, [p] * 2, []
    ),
    "grouped examples": lambda x, p: kernels.projected_gradients_grouped(
        [x[:, None]] * 2, [x[:, None]] * 2, [p] * 2, []
    ),
    "packed": lambda x, p: kernels.per_sample_gradients(x, x, None, torch.tensor([0, 1, 3])),
    "covariance_update_": lambda rows, other: covariance(rows),
    "pack_rows": lambda rows, other: kernels.pack_rows(rows, [WIDTH], [1]),
    "unpack_rows": lambda rows, other: kernels.unpack_rows(rows, torch.ones(3), [WIDTH], [1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_far_apart(far: Tensor, name: str) -> None:
    other = torch.randn(5, WIDTH).half()
    results = CALLS[name](far, other), CALLS[name](far.clone(), other)
    got, want = ([one] if isinstance(one, Tensor) else one for one in results)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
