"""Scans of rows in bit planes are exact in whole numbers: every kernel gives the same bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from op_cases import (
    LEVELS,
    TAILS,
    assert_threads_do_not_matter,
    layouts,
    misaligned,
    randn,
    same_bits,
    strided,
)
from torch import Tensor

from logra_kernels import ops, reference
from logra_kernels.reference.plane_scores import LARGEST_BYTE, plane_codes

# The levels of 1 to 4 planes; some are not antisymmetric, and the outermost ones are the extremes.
TABLES = [
    torch.tensor(levels, dtype=torch.int8)
    for levels in (
        [-1, 1],
        [-90, -31, 30, 90],
        [-128, -70, -40, -11, 12, 39, 70, 127],
        LEVELS.tolist(),
    )
]
WIDTHS = pytest.mark.parametrize("levels", TABLES, ids=["1 bit", "2 bits", "3 bits", "4 bits"])


def planes_of(codes: Tensor, count: int) -> list[Tensor]:
    """The planes of codes [R, D], by NumPy; the bits beyond D are ones."""
    missing = -codes.shape[1] % 8
    padded = np.pad(codes.numpy(), ((0, 0), (0, missing)), constant_values=2**count - 1)
    bits = [(padded >> (count - 1 - p)) & 1 for p in range(count)]
    return [torch.from_numpy(np.packbits(b, axis=1, bitorder="little")) for b in bits]


def some_codes(levels: Tensor, rows: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(levels), (rows, dim), generator=generator)


def some_planes(levels: Tensor, rows: int, dim: int, seed: int = 0) -> list[Tensor]:
    return planes_of(some_codes(levels, rows, dim, seed), len(levels).bit_length() - 1)


def check(
    queries: Tensor,
    planes: list[Tensor],
    levels: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    want = reference.plane_scores(queries, planes, levels, scale, bias)
    assert torch.equal(ops.plane_scores(queries, planes, levels, scale, bias), want)
    k = min(3, len(planes[0]))
    top = ops.topk_plane_scores(queries, planes, levels, k, scale, bias, row_offset=5)
    assert same_bits(
        top, reference.topk_plane_scores(queries, planes, levels, k, scale, bias, row_offset=5)
    )


@WIDTHS
def test_the_reference_against_float64(levels: Tensor) -> None:
    codes, queries = some_codes(levels, 30, 501), randn(20, 501) ** 3
    planes = planes_of(codes, len(levels).bit_length() - 1)
    assert torch.equal(plane_codes(planes, 501), codes)
    rows = levels.double()[codes]
    exact = queries.double() @ rows.T
    step = queries.double().abs().amax(dim=1, keepdim=True) / LARGEST_BYTE
    bound = 0.5 * step * rows.abs().sum(dim=1) + 2.0**-24 * exact.abs()
    got = reference.plane_scores(queries, planes, levels)
    assert ((got - exact).abs() <= bound * (1 + 1e-9)).all()
    whole = torch.randint(-127, 128, (20, 501)).float()
    whole[:, 0] = 127
    assert torch.equal(ops.plane_scores(whole, planes, levels), (whole.double() @ rows.T).float())
    wide = ops.plane_scores(queries.double(), planes, levels)  # float64 queries are not rounded
    torch.testing.assert_close(wide, exact, rtol=1e-12, atol=1e-9)


@WIDTHS
@pytest.mark.parametrize("size", TAILS)
@pytest.mark.usefixtures("isa")
def test_every_instruction_set_gives_the_references_bits(size: int, levels: Tensor) -> None:
    for dim, count, asked in ((size, 7, 5), (150, size, 3), (150, 7, size), (2100 + size, 7, 1)):
        scale = torch.rand(count, generator=torch.Generator().manual_seed(2)) + 0.1
        check(randn(asked, dim, seed=1), some_planes(levels, count, dim), levels, scale)


@WIDTHS
@pytest.mark.parametrize("asked", [1, 2, 3, 4, 5, 6, 9, 40])
@pytest.mark.usefixtures("isa")
def test_few_and_many_queries(asked: int, levels: Tensor) -> None:
    queries = randn(asked, 4200, seed=1)
    check(queries, some_planes(levels, 27, 4200), levels, torch.rand(27) + 0.1, torch.rand(27))


@WIDTHS
@pytest.mark.usefixtures("isa")
def test_the_largest_sums(levels: Tensor) -> None:
    """140,001 products of 127 and 127 or -128, all of one sign."""
    codes = torch.zeros(3, 140_001, dtype=torch.int64)
    codes[1], codes[2, ::2] = len(levels) - 1, len(levels) - 1
    planes = planes_of(codes, len(levels).bit_length() - 1)
    for asked in (1, 9):
        queries = torch.ones(asked, 140_001)
        queries[-1, ::2] = -1
        check(queries, planes, levels)


@WIDTHS
@pytest.mark.usefixtures("isa")
def test_threads_splits_and_layouts_do_not_change_a_bit(
    levels: Tensor, set_threads: Callable[[int], None]
) -> None:
    queries, planes = randn(67, 2500), some_planes(levels, 131, 2500)
    assert_threads_do_not_matter(lambda: ops.plane_scores(queries, planes, levels))
    assert_threads_do_not_matter(lambda: ops.plane_scores(queries[:1], planes, levels))
    assert_threads_do_not_matter(lambda: ops.topk_plane_scores(queries, planes, levels, 5))
    whole = ops.plane_scores(queries, planes, levels)
    cut = [
        ops.plane_scores(queries, list(part), levels)
        for part in zip(*(plane.split(13) for plane in planes), strict=True)
    ]
    assert torch.equal(torch.cat(cut, 1), whole)
    by_queries = [ops.plane_scores(part, planes, levels) for part in queries.split(9)]
    assert torch.equal(torch.cat(by_queries), whole)
    assert torch.equal(ops.plane_scores(queries[:1], planes, levels), whole[:1])
    for other in layouts(queries):
        assert torch.equal(ops.plane_scores(other, planes, levels), whole)
    for way in (misaligned, spread, lambda plane: plane.T.contiguous().T):
        others = [way(plane) for plane in planes]
        assert torch.equal(ops.plane_scores(queries, others, levels), whole)
        assert torch.equal(ops.plane_scores(queries[:2], others, levels), whole[:2])
    state = ops.topk_plane_scores(queries, [plane[:50] for plane in planes], levels, 5)
    rest = [plane[50:] for plane in planes]
    folded = ops.topk_plane_scores(queries, rest, levels, 5, state=state, row_offset=50)
    assert same_bits(folded, ops.topk_plane_scores(queries, planes, levels, 5))


def spread(plane: Tensor) -> Tensor:
    """Rows with other bytes between them, as of a file whose rows are padded."""
    wide = torch.full((len(plane), plane.shape[1] + 7), 0xA5, dtype=torch.uint8)
    wide[:, 3:-4] = plane
    return wide[:, 3:-4]


@WIDTHS
@pytest.mark.usefixtures("isa")
def test_nothing_beyond_the_columns_is_read(levels: Tensor) -> None:
    """Bits beyond D are ones or zeros, and what lies around a query is NaN."""
    codes = some_codes(levels, 9, 203)
    planes = planes_of(codes, len(levels).bit_length() - 1)
    cleared = [plane.clone() for plane in planes]
    for plane in cleared:
        plane[:, -1] &= 0b111
    for asked in (1, 5):
        queries = strided(randn(asked, 203))
        want = reference.plane_scores(queries, planes, levels)
        assert torch.equal(ops.plane_scores(queries, planes, levels), want)
        assert torch.equal(ops.plane_scores(queries, cleared, levels), want)


@WIDTHS
@pytest.mark.usefixtures("isa")
def test_zero_tiny_huge_and_wrong_queries(levels: Tensor) -> None:
    planes = some_planes(levels, 5, 40)
    queries = randn(6, 40)
    queries[0] = 0
    queries[1] *= 1e-42  # subnormal
    queries[2] *= 1e37
    queries[3, 7], queries[4, 3] = torch.nan, torch.inf
    scale = torch.full((5,), 1e-3)
    want = reference.plane_scores(queries, planes, levels, scale)
    got = ops.plane_scores(queries, planes, levels, scale)
    assert not got[0].any()
    assert got[[3, 4]].isnan().all()
    assert got[[1, 2, 5]].isfinite().all()
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    for n in range(6):
        alone = ops.plane_scores(queries[n : n + 1], planes, levels, scale)
        assert torch.equal(alone.nan_to_num(7)[0], got[n].nan_to_num(7))
    top = ops.topk_plane_scores(queries, planes, levels, 2)
    assert torch.equal(top.top_ids[3], torch.tensor([-1, -1]))
    none = [plane[:0] for plane in planes]
    assert ops.plane_scores(queries, none, levels).shape == (6, 0)
    assert ops.plane_scores(queries[:0], planes, levels).shape == (0, 5)
    empty = [torch.zeros(3, 0, dtype=torch.uint8) for _ in planes]
    assert not ops.plane_scores(torch.ones(2, 0), empty, levels).any()
