"""Scans of int8 rows: exact in whole numbers, so that every kernel gives the reference's bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import TAILS, assert_threads_do_not_matter, layouts, randn
from torch import Tensor

from logra_kernels import ops, reference
from logra_kernels.reference.scores import LARGEST_NUMBER


def codes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def same(queries: Tensor, rows: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    want = reference.scores(queries, rows, scale, bias)
    assert torch.equal(ops.scores(queries, rows, scale, bias), want)
    k = min(3, len(rows))
    top = ops.topk_scores(queries, rows, k, scale, bias)
    assert torch.equal(top.top_scores, want.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(top.bottom_scores, want.sort(dim=1).values[:, :k])


@pytest.mark.parametrize("size", TAILS)
@pytest.mark.usefixtures("isa")
def test_every_instruction_set_gives_the_references_bits(size: int) -> None:
    for dim, count, asked in ((size, 7, 5), (150, size, 3), (150, 7, size)):
        scale = torch.rand(count, generator=torch.Generator().manual_seed(2)) + 0.1
        same(randn(asked, dim, seed=1), codes(count, dim), scale, None)


@pytest.mark.usefixtures("isa")
def test_long_rows_whose_sums_leave_32_bits() -> None:
    """140,000 products of 127 and 32639 are 5.8e11: every code and every query at its largest."""
    rows = torch.full((3, 140_001), 127, dtype=torch.int8)
    rows[1], rows[2, ::2] = -127, -127
    queries = torch.ones(2, 140_001)
    queries[1, ::2] = -1
    got = ops.scores(queries, rows)
    assert torch.equal(got, (queries.double() @ rows.double().T).float())
    same(queries, rows, None, None)


@pytest.mark.usefixtures("isa")
def test_threads_splits_and_layouts_do_not_change_a_bit(
    set_threads: Callable[[int], None],
) -> None:
    queries, rows = randn(67, 2500), codes(131, 2500)
    assert_threads_do_not_matter(lambda: ops.scores(queries, rows))
    assert_threads_do_not_matter(lambda: ops.topk_scores(queries, rows, 5))
    whole = ops.scores(queries, rows)
    assert torch.equal(torch.cat([ops.scores(queries, part) for part in rows.split(13)], 1), whole)
    assert torch.equal(torch.cat([ops.scores(part, rows) for part in queries.split(9)]), whole)
    for other in layouts(queries):
        assert torch.equal(ops.scores(other, rows), whole)
    wide = torch.full((131, 2507), -128, dtype=torch.int8)
    wide[:, 3:-4] = rows
    assert torch.equal(ops.scores(queries, wide[:, 3:-4]), whole)
    assert torch.equal(ops.scores(queries, rows.T.contiguous().T), whole)


def test_a_query_loses_half_of_its_scale() -> None:
    queries, rows = randn(20, 500) ** 3, codes(30, 500)
    exact = queries.double() @ rows.double().T
    step = queries.double().abs().amax(dim=1, keepdim=True) / LARGEST_NUMBER
    bound = 0.5 * step * rows.double().abs().sum(dim=1) + 2.0**-24 * exact.abs()
    assert ((ops.scores(queries, rows) - exact).abs() <= bound * (1 + 1e-9)).all()
    wide = ops.scores(queries.double(), rows)  # float64 queries are not rounded
    torch.testing.assert_close(wide, exact, rtol=1e-12, atol=1e-9)


@pytest.mark.usefixtures("isa")
def test_zero_tiny_huge_and_wrong_queries() -> None:
    rows = codes(5, 40)
    queries = randn(6, 40)
    queries[0] = 0
    queries[1] *= 1e-42  # subnormal
    queries[2] *= 1e37
    queries[3, 7], queries[4, 3] = torch.nan, torch.inf
    got = ops.scores(queries, rows, torch.full((5,), 1e-3))
    assert not got[0].any()
    assert got[[3, 4]].isnan().all()
    assert got[[1, 2, 5]].isfinite().all()
    want = reference.scores(queries, rows, torch.full((5,), 1e-3))
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert torch.equal(ops.topk_scores(queries, rows, 2).top_ids[3], torch.tensor([-1, -1]))
    assert ops.scores(queries, rows[:0]).shape == (6, 0)
    assert not ops.scores(torch.ones(2, 0), torch.ones(3, 0, dtype=torch.int8)).any()


def test_only_scans_take_int8() -> None:
    rows = codes(4, 10)
    with pytest.raises(TypeError, match=r"rows: expected .* got int8"):
        ops.self_influence(rows, torch.eye(10))
    with pytest.raises(TypeError, match=r"rows: expected .* got int8"):
        ops.covariance_update_(torch.zeros(10, 10), rows)
    with pytest.raises(TypeError, match=r"queries: expected .* got int8"):
        ops.scores(rows, rows)
