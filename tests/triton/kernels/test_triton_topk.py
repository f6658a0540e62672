import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from logra_kernels import reference
from logra_kernels.triton import launch, topk_scores

module = importlib.import_module("logra_kernels.triton.topk_scores")


def whole_numbers(*shape: int, largest: int = 3) -> Tensor:
    """Small integers, so that every score is exact and many are equal."""
    return torch.randint(-largest, largest + 1, shape).float()


def check(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    got = topk_scores(*args, **kwargs)
    for name, mine, theirs in zip(
        ("top_scores", "top_ids", "bottom_scores", "bottom_ids"),
        got,
        reference.topk_scores(*args, **kwargs),
        strict=True,
    ):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), f"{name}: got {mine.tolist()}, want {theirs.tolist()}"
    return got


@pytest.mark.parametrize(
    ("q", "r", "d", "k", "dtype"),
    [
        (1, 1, 1, 1, torch.float16),
        (17, 65, 9, 3, torch.float16),
        (17, 65, 9, 3, torch.bfloat16),
        (17, 65, 9, 3, torch.float32),
        (3, 200, 4, 70, torch.float16),
        (2, 5, 3, 9, torch.float16),
        (2, 130, 2, 128, torch.float16),
        (40, 70, 2, 2, torch.float16),
    ],
)
def test_equals_reference_among_many_ties(
    dtype: torch.dtype, q: int, r: int, d: int, k: int
) -> None:
    queries = whole_numbers(q, d)
    rows = whole_numbers(r, d).to(dtype)
    check(queries, rows, k)
    check(queries, rows, k, row_scale=whole_numbers(r), row_offset=11)
    check(queries, rows, k, row_bias=whole_numbers(r), row_offset=2**31 - 3)


@pytest.mark.parametrize("k", [5, 20, 130])
def test_state_carries_over_calls_in_any_order(k: int) -> None:
    queries = whole_numbers(3, 4)
    rows = whole_numbers(150, 4).half()
    want = check(queries, rows, k)
    for order in ((0, 20, 90), (90, 0, 20)):
        state = None
        for begin in order:
            end = {0: 20, 20: 90, 90: 150}[begin]
            state = check(queries, rows[begin:end], k, state=state, row_offset=begin)
        assert state is not None
        assert all(torch.equal(a, b) for a, b in zip(state, want, strict=True))


@pytest.mark.parametrize("k", [4, 20])
def test_places_that_stay_empty_over_calls(k: int) -> None:
    queries = whole_numbers(2, 3)
    state = None
    for call in range(3):
        rows = whole_numbers(1, 3)
        state = check(queries, rows, k, state=state, row_offset=call)


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a block, by both ways of selecting, and more keys than one merge takes."""
    monkeypatch.setattr(module, "_SMALLEST_BLOCK", 64)
    monkeypatch.setattr(module, "_WORKSPACE_BYTES", 1)
    queries = whole_numbers(2, 3)
    rows = whole_numbers(300, 3).half()
    scale = whole_numbers(300)
    with launch.trying("merge_topk", {"MERGE": 32, "num_warps": 4}):
        check(queries, rows, 7, scale, scale)
    monkeypatch.setattr(module, "_LARGEST_K", 6)
    check(queries, rows, 7, scale, scale)


def test_merges_in_several_passes() -> None:
    with launch.trying("merge_topk", {"MERGE": 16, "num_warps": 4}):
        check(whole_numbers(2, 3), whole_numbers(700, 3).half(), 3)


@pytest.mark.parametrize("k", [4, 200])
def test_nan_is_never_selected_and_infinity_is(k: int) -> None:
    queries = torch.ones(2, 1)
    rows = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 0.0])[:, None]
    got = check(queries, rows, k)
    assert got[1][0, :4].tolist() == [2, 0, 4, 3]
    assert got[3][0, :4].tolist() == [3, 4, 0, 2]
    # The -inf of a row comes before the -inf of an empty place, in a call and in a state.
    check(queries, rows[3:4], k, state=got)
    poor = check(queries, rows[[1, 3]], k)
    assert poor[1][0, :2].tolist() == [1, -1]
    check(queries, rows[:2], k, state=poor, row_offset=5)
    poor[0][0, 0] = torch.nan  # a state may hold one; it is dropped
    check(queries, rows[:2], k, state=poor, row_offset=5)


@pytest.mark.parametrize("k", [3, 130])
def test_zeros_of_both_signs_are_equal(k: int) -> None:
    rows = torch.tensor([[0.0], [-0.0], [0.0], [-0.0]])
    got = topk_scores(torch.ones(1, 1), rows, k)
    assert got[1][0, :3].tolist() == got[3][0, :3].tolist() == [0, 1, 2]


def test_rounded_scores() -> None:
    """For real numbers the selected scores are the kernel's best, in order, with none missed."""
    queries = torch.randn(5, 90)
    rows = torch.randn(300, 90).half()
    scale = torch.rand(300)
    got = topk_scores(queries, rows, 20, scale)
    exact = reference.scores(queries.double(), rows.double(), scale.double())
    # 180 additions of two pieces, and 2**-22 for the pieces, of magnitudes of about 90 * 4.
    close: dict[str, Any] = {"rtol": 0.0, "atol": 182 * 2.0**-23 * 360}
    for values, ids, largest in ((got[0], got[1], True), (got[2], got[3], False)):
        torch.testing.assert_close(values.double(), exact.gather(1, ids), **close)
        torch.testing.assert_close(values.double(), exact.topk(20, largest=largest)[0], **close)
        assert torch.equal(values, values.sort(dim=1, descending=largest)[0])


@pytest.mark.parametrize("k", [2, 130])
@pytest.mark.parametrize(("q", "r"), [(0, 3), (3, 0), (0, 0)])
def test_empty(q: int, r: int, k: int) -> None:
    queries, rows = torch.ones(q, 4), torch.ones(r, 4).half()
    state = check(queries, rows, k)
    if q:
        check(queries, rows, k, state=check(queries, torch.ones(3, 4), k))
    assert state[0].shape == (q, k)


def test_strides() -> None:
    queries = whole_numbers(4, 9)[::2, 2:8]
    rows = whole_numbers(90, 20).half()[::2, 7:13]
    check(queries, rows, 5, whole_numbers(90)[::2])
