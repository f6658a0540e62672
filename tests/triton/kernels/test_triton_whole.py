"""Int8 rows and rows in bit planes: the sums are exact, so every bit is the reference's."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from logra_kernels import reference, triton
from logra_kernels.triton import launch

module = importlib.import_module("logra_kernels.triton.topk_scores")


def whole_rows(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape).to(torch.int8)


def random_planes(number: int, r: int, d: int) -> list[Tensor]:
    """Bits beyond D are random too: nothing may look at them."""
    return [torch.randint(256, (r, (d + 7) // 8)).to(torch.uint8) for _ in range(number)]


def random_levels(number: int) -> Tensor:
    return whole_rows(2**number).cpu()


def same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got.nan_to_num(nan=7e37), want.nan_to_num(nan=7e37)), (
        (got - want).abs().max()
    )


def check(op: str, *arguments: Any) -> None:
    same(getattr(triton, op)(*arguments), getattr(reference, op)(*arguments))


def check_top(op: str, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    got: tuple[Tensor, ...] = getattr(triton, op)(*arguments, **options)
    want = getattr(reference, op)(*arguments, **options)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    return got


SHAPES = [(1, 1, 1), (17, 65, 33), (40, 130, 150)]


@pytest.mark.parametrize(("q", "r", "d"), SHAPES)
def test_int8_rows(q: int, r: int, d: int) -> None:
    queries, rows, scale = torch.randn(q, d), whole_rows(r, d), torch.rand(r)
    check("scores", queries, rows)
    check("scores", queries, rows, scale)
    check("scores", queries, rows, None, scale)
    check("scores", queries, rows, scale, torch.randn(r))
    check("scores", queries.half(), rows, scale)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize(("q", "r", "d"), SHAPES)
def test_planes(number: int, q: int, r: int, d: int) -> None:
    coded = random_planes(number, r, d), random_levels(number)
    queries, scale = torch.randn(q, d), torch.rand(r)
    check("plane_scores", queries, *coded)
    check("plane_scores", queries, *coded, scale, torch.randn(r))


def test_queries_that_are_large_small_or_not_finite() -> None:
    queries = torch.randn(7, 30)
    queries[0] *= 2.0**120
    queries[1] *= 2.0**-140
    queries[2] = 0
    queries[3, 4], queries[4, 5] = torch.nan, torch.inf
    queries[5] = torch.finfo(torch.float32).max
    scale, bias = torch.rand(9) * 2.0**-20, torch.randn(9)
    check("scores", queries, whole_rows(9, 30), scale, bias)
    coded = random_planes(4, 9, 30), random_levels(4)
    check("plane_scores", queries, *coded, scale, bias)


def test_sums_beyond_32_bits() -> None:
    """More columns than an int32 sum holds, at the largest and the smallest products."""
    d, wide = 140_000, {"ROWS": 16, "QUERIES": 16, "num_warps": 4, "num_stages": 1}
    queries = torch.ones(1, d)
    with (
        launch.trying("whole_scores", wide | {"DIM": 1024}),
        launch.trying("plane_scores", wide | {"DIM": 512}),
    ):
        check("scores", queries, torch.full((1, d), -128).to(torch.int8))
        planes = [torch.full((1, d // 8), 255).to(torch.uint8)]
        check("plane_scores", queries, planes, torch.tensor([0, -128], device="cpu").to(torch.int8))


def test_strides() -> None:
    """A module's columns of every other row; planes of one stride, and of several."""
    check("scores", torch.randn(3, 90)[:, 11:54], whole_rows(80, 90)[::2, 11:54])
    first, second = random_planes(2, 80, 160)
    queries, levels = torch.randn(3, 43), random_levels(2)
    check("plane_scores", queries, [first[::2, 3:9], second[::2, 3:9]], levels)
    check("plane_scores", queries, [first[:40, 3:9], second[::2, 3:9].contiguous()], levels)


@pytest.mark.parametrize(("q", "r", "d"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(q: int, r: int, d: int) -> None:
    queries, scale = torch.ones(q, d), torch.ones(r)
    rows, coded = whole_rows(r, d), (random_planes(2, r, d), random_levels(2))
    check("scores", queries, rows, scale, scale)
    check("plane_scores", queries, *coded, scale, scale)
    check_top("topk_scores", queries, rows, 2, scale, scale)
    check_top("topk_plane_scores", queries, *coded, 2, scale, scale)


@pytest.mark.parametrize("k", [3, 130])
def test_top_k(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, a state, and more rows than a block."""
    monkeypatch.setattr(module, "_SMALLEST_BLOCK", 64)
    monkeypatch.setattr(module, "_WORKSPACE_BYTES", 1)
    queries, scale, bias = torch.randn(3, 21), torch.rand(150), torch.randn(150)
    rows, coded = whole_rows(75, 21).repeat(2, 1), random_planes(4, 150, 21)
    levels = random_levels(4)
    check_top("topk_scores", queries, rows, k)
    check_top("topk_plane_scores", queries, coded, levels, k)
    state = check_top("topk_scores", queries, rows[:100], k, scale[:100], bias[:100])
    check_top("topk_scores", queries, rows[100:], k, scale[100:], state=state, row_offset=100)
    check_top("topk_plane_scores", queries, coded, levels, k, scale, bias, state, 500)
