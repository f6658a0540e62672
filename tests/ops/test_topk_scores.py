import pytest
import torch
from op_cases import DTYPES, randn, same_bits
from torch import Tensor

from logra_kernels.ops import TopK, scores, topk_scores

pytestmark = pytest.mark.usefixtures("poison")


def sorted_scores(values: Tensor, k: int, first_id: int = 0) -> TopK:
    """What top k means: a stable sort by score keeps the lower id first; NaN takes no part."""
    ends = []
    for sign in (1, -1):
        best = torch.full((len(values), k), -sign * torch.inf)
        ids = torch.full((len(values), k), -1)
        for q, row in enumerate(values):
            order = (-sign * row).argsort(stable=True)
            order = order[~row[order].isnan()][:k]
            best[q, : len(order)], ids[q, : len(order)] = row[order], order + first_id
        ends += [best, ids]
    return TopK(*ends)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_a_stable_sort(isa: str, dtype: torch.dtype) -> None:
    for num_queries, num_rows, dim, k in (
        (1, 1, 3, 1),
        (3, 50, 7, 5),
        (9, 500, 33, 17),
        (66, 130, 8, 130),
        (2, 300, 4, 1),
        (2, 2000, 8, 127),  # one chunk of 128 entries, two, and more than are sorted by counting
        (2, 2000, 8, 129),
        (1, 3000, 8, 700),
    ):
        queries, rows = randn(num_queries, dim), randn(num_rows, dim, dtype=dtype, seed=1)
        scale, bias = torch.rand(num_rows), randn(num_rows, seed=2)
        values = scores(queries, rows, scale, bias)
        assert same_bits(topk_scores(queries, rows, k, scale, bias), sorted_scores(values, k))


def test_ties_go_to_the_lower_id(isa: str) -> None:
    """Scores of a few values only, so that ties cross every border, also between calls."""
    queries = torch.eye(3)
    rows = torch.randint(-2, 3, (700, 3), generator=torch.Generator().manual_seed(0)).half()
    for k in (100, 260):
        expected = sorted_scores(rows.float().T, k)
        assert same_bits(topk_scores(queries, rows, k), expected)
        state = None
        for a, b in ((300, 700), (0, 1), (1, 300)):  # in any order
            state = topk_scores(queries, rows[a:b], k, state=state, row_offset=a)
        assert same_bits(state, expected)


def test_every_row_better_than_those_before(isa: str) -> None:
    """Each replaces the worst of what is kept; the infinities fill places like any score."""
    rows = torch.arange(1000.0)[:, None]
    rows[-3:] = torch.inf
    for k in (3, 5, 130):
        expected = sorted_scores(torch.cat([rows, -rows], 1).T, k)
        assert same_bits(topk_scores(torch.tensor([[1.0], [-1.0]]), rows, k), expected)


def test_k_above_the_number_of_rows(isa: str) -> None:
    out = topk_scores(randn(2, 5), randn(3, 5, seed=1), 6, row_offset=10)
    assert out.top_scores.shape == (2, 6)
    assert (out.top_ids[:, 3:] == -1).all()
    assert (out.bottom_ids[:, 3:] == -1).all()
    assert (out.top_scores[:, 3:] == -torch.inf).all()
    assert (out.bottom_scores[:, 3:] == torch.inf).all()
    assert torch.equal(out.top_ids[:, :3].sort().values, torch.tensor([[10, 11, 12]] * 2))


def test_nan_is_never_selected_and_infinity_is(isa: str) -> None:
    rows = torch.tensor([[1.0], [torch.nan], [torch.inf], [-torch.inf], [2.0]])
    out = topk_scores(torch.ones(1, 1), rows, 5)
    assert out.top_ids.tolist() == [[2, 4, 0, 3, -1]]
    assert out.bottom_ids.tolist() == [[3, 0, 4, 2, -1]]
    state = out._replace(top_scores=torch.full((1, 5), torch.nan))
    again = topk_scores(torch.ones(1, 1), rows[:1], 5, state=state, row_offset=7)
    assert again.top_ids.tolist() == [[7, -1, -1, -1, -1]]


def test_large_queries_are_ranked_by_their_scores(isa: str) -> None:
    """As if they were small, with each query's own bias, also where sums pass float32's range."""
    queries, rows = randn(70, 40), randn(300, 40, seed=1).half()
    queries[3::7] *= 2.0**120
    queries[5] = 1.5 * 2.0**127 * torch.tensor([1.0, -1.0]).repeat_interleave(20)
    rows[7], rows[9] = 1, 2.0**15
    scale, bias = torch.rand(300) * 2.0**-20, randn(300, seed=2)
    for row_scale, row_bias in ((None, None), (scale, None), (scale, bias), (None, bias)):
        values = scores(queries, rows, row_scale, row_bias)
        got = topk_scores(queries, rows, 300, row_scale, row_bias)
        assert same_bits(got, sorted_scores(values, 300))
        if row_bias is None:
            assert values[5, [7, 9]].tolist() == [0.0, 0.0]
            assert (got.top_ids >= 0).all()


def test_empty(isa: str) -> None:
    none = topk_scores(randn(2, 5), randn(0, 5), 3)
    assert (none.top_ids == -1).all()
    assert (none.bottom_scores == torch.inf).all()
    assert topk_scores(randn(0, 5), randn(4, 5), 3).top_ids.shape == (0, 3)
    state = topk_scores(randn(2, 5), randn(9, 5, seed=1), 3)
    assert same_bits(topk_scores(randn(2, 5), randn(0, 5), 3, state=state, row_offset=9), state)


def test_state_is_not_written_to(isa: str) -> None:
    state = topk_scores(randn(2, 5), randn(9, 5, seed=1), 3)
    before = [t.clone() for t in state]
    topk_scores(randn(2, 5), 9 * randn(9, 5, seed=2), 3, state=state, row_offset=9)
    assert same_bits(state, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("native")
def test_blocks_of_rows_do_not_change_bits(isa: str, dtype: torch.dtype) -> None:
    queries, rows = randn(40, 300), randn(500, 300, dtype=dtype, seed=1)
    whole = topk_scores(queries, rows, 20)
    state = None
    for a, b in ((0, 3), (3, 77), (77, 78), (78, 500)):
        state = topk_scores(queries, rows[a:b], 20, state=state, row_offset=a)
    assert same_bits(state, whole)
