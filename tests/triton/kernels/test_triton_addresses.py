"""Rows so far apart that row number times stride, in elements, does not fit in 32 bits."""

import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from logra_kernels.triton import (
    covariance_update_,
    pack_rows,
    per_sample_gradients,
    project,
    projected_gradients,
    projected_gradients_grouped,
    scores,
    self_influence,
    topk_scores,
    unpack_rows,
)

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


def test_scores(far: Tensor) -> None:
    near, queries = far.clone(), torch.randn(2, WIDTH)
    assert torch.equal(scores(queries, far), scores(queries, near))
    assert torch.equal(scores(far, near), scores(near, near))
    for got, want in zip(topk_scores(queries, far, 3), topk_scores(queries, near, 3), strict=True):
        assert torch.equal(got, want)
    factor = torch.randn(5, WIDTH)
    assert torch.equal(self_influence(far, factor), self_influence(near, factor))
    assert torch.equal(self_influence(near, far), self_influence(near, near))


def test_gradients(far: Tensor) -> None:
    near, proj = far.clone(), torch.randn(4, WIDTH).half()
    for x, same in ((far[:, None], near[:, None]), (far[None], near[None])):
        assert torch.equal(project(x, proj), project(same, proj))
        assert torch.equal(project(same, far), project(same, near))
        want = projected_gradients(same, same, proj, None)
        assert torch.equal(projected_gradients(x, same, proj, None), want)
        assert torch.equal(projected_gradients(x, x, proj, None), want)
        grouped = projected_gradients_grouped([x, x], [x, x], [proj, proj], [])
        assert torch.equal(grouped[1], want)
    bounds = torch.tensor([0, 1, 3])
    assert torch.equal(
        per_sample_gradients(far, far, None, bounds), per_sample_gradients(near, near, None, bounds)
    )


def test_covariance(far: Tensor) -> None:
    got, want = (torch.zeros(WIDTH, WIDTH) for _ in range(2))
    covariance_update_(got, far)
    covariance_update_(want, far.clone())
    assert torch.equal(got, want)


def test_packed_rows(far: Tensor) -> None:
    near = far.clone()
    for got, want in zip(pack_rows(far, [WIDTH], [1]), pack_rows(near, [WIDTH], [1]), strict=True):
        assert torch.equal(got, want)
    scale = torch.ones(3)
    assert torch.equal(
        unpack_rows(far, scale, [WIDTH], [1]), unpack_rows(near, scale, [WIDTH], [1])
    )
