from typing import Any

import pytest
import torch
from op_cases import (
    DTYPES,
    TAILS,
    assert_same,
    assert_threads_do_not_matter,
    assert_within,
    gamma,
    layouts,
    randn,
)
from torch import Tensor

from logra_kernels.ops import per_sample_gradients

pytestmark = pytest.mark.usefixtures("poison")


def ragged_mask(n: int, t: int) -> Tensor:
    return torch.rand(n, t, generator=torch.Generator().manual_seed(3)) > 0.3


def check(x: Tensor, dy: Tensor, mask: Tensor | None = None) -> None:
    keep = torch.ones(x.shape[:2]).double() if mask is None else mask.double()
    wide, left = x.double(), dy.double() * keep[..., None]
    exact = torch.einsum("nto,nti->noi", left, wide)
    size = torch.einsum("nto,nti->noi", left.abs(), wide.abs())
    assert_within(per_sample_gradients(x, dy, mask), exact, gamma(x.shape[1] + 1) * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(isa: str, dtype: torch.dtype) -> None:
    sizes = (
        [(2, 5, k, 3) for k in TAILS]
        + [(2, 5, 3, k) for k in TAILS]
        + [(2, t, 5, 4) for t in TAILS]
    )
    for n, t, ki, ko in [*sizes, (1, 700, 70, 65), (60, 2, 9, 10)]:
        x, dy = randn(n, t, ki, dtype=dtype), randn(n, t, ko, seed=1)
        check(x, dy)
        check(x, dy, ragged_mask(n, t))


def test_mixed_dtypes(isa: str) -> None:
    for one in DTYPES:
        for other in DTYPES:
            check(randn(3, 4, 20, dtype=one), randn(3, 4, 6, dtype=other, seed=1))


def test_empty(isa: str) -> None:
    assert per_sample_gradients(randn(0, 4, 5), randn(0, 4, 3)).shape == (0, 3, 5)
    assert per_sample_gradients(randn(2, 0, 5), randn(2, 0, 3)).equal(torch.zeros(2, 3, 5))
    assert per_sample_gradients(randn(2, 4, 0), randn(2, 4, 3)).shape == (2, 3, 0)
    masked = per_sample_gradients(randn(2, 4, 5), randn(2, 4, 3), torch.zeros(2, 4))
    assert masked.equal(torch.zeros(2, 3, 5))


def test_one_token_each(isa: str) -> None:
    x, dy = randn(6, 5), randn(6, 3, seed=1)
    expected = per_sample_gradients(x[:, None], dy[:, None])
    assert torch.equal(per_sample_gradients(x, dy), expected)
    keep = torch.tensor([1, 0, 1, 1, 0, 1])
    assert torch.equal(per_sample_gradients(x, dy, keep), expected * keep[:, None, None])


@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16]
)
def test_a_masked_token_may_hold_anything(isa: str, mask_dtype: torch.dtype) -> None:
    x, dy, mask = randn(3, 20, 8), randn(3, 20, 5, seed=1), ragged_mask(3, 20)
    expected = per_sample_gradients(x.where(mask[..., None], 0.0), dy, mask)
    x[~mask], dy[~mask] = torch.nan, torch.inf
    assert torch.equal(per_sample_gradients(x, dy, mask.to(mask_dtype)), expected)


@pytest.mark.usefixtures("native")
def test_padding_does_not_change_bits(isa: str) -> None:
    """Only the tokens that are kept are summed: left, right and no padding are the same sum."""
    x, dy = randn(1, 200, 40), randn(1, 200, 24, seed=1)
    expected = per_sample_gradients(x, dy)
    for before, after in ((0, 77), (77, 0), (13, 51)):
        pad = (0, 0, before, after)
        padded_x, padded_dy = (torch.nn.functional.pad(t, pad, value=9.0) for t in (x, dy))
        mask = torch.nn.functional.pad(torch.ones(1, 200), (before, after))
        assert torch.equal(per_sample_gradients(padded_x, padded_dy, mask), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_change_bits(isa: str, dtype: torch.dtype) -> None:
    x, dy = randn(3, 9, 70, dtype=dtype), randn(3, 9, 33, seed=1)
    expected = per_sample_gradients(x, dy)
    for view in layouts(x):
        assert_same(per_sample_gradients(view, dy), expected)
    for view in layouts(dy):
        assert_same(per_sample_gradients(x, view), expected)
    by_token = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(per_sample_gradients(by_token, dy), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_that_end_within_a_vector(isa: str, dtype: torch.dtype) -> None:
    """The result's rows go through a copy, some at a time."""
    x, dy = randn(2, 67, 701, dtype=dtype), randn(2, 67, 97, dtype=dtype, seed=1)
    exact = dy.double().transpose(1, 2) @ x.double()
    size = dy.double().abs().transpose(1, 2) @ x.double().abs()
    assert_within(per_sample_gradients(x, dy), exact, gamma(67) * size)


@pytest.mark.usefixtures("native", "set_threads")
def test_threads_and_splits_do_not_change_bits(isa: str) -> None:
    x, dy, mask = randn(7, 400, 70), randn(7, 400, 65, seed=1), ragged_mask(7, 400)
    assert_threads_do_not_matter(lambda: per_sample_gradients(x, dy, mask))
    whole = per_sample_gradients(x, dy, mask)
    parts = [per_sample_gradients(x[a:b], dy[a:b], mask[a:b]) for a, b in ((0, 1), (1, 5), (5, 7))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_segments_are_examples(isa: str, index_dtype: torch.dtype) -> None:
    x, dy, mask = randn(50, 12), randn(50, 9, seed=1), ragged_mask(1, 50)[0]
    bounds = torch.tensor([2, 9, 9, 30, 47], dtype=index_dtype)  # the rest is in no segment
    out = per_sample_gradients(x, dy, mask, cu_seqlens=bounds)
    assert out.shape == (4, 9, 12)
    for s, (a, b) in enumerate(((2, 9), (9, 9), (9, 30), (30, 47))):
        alone = per_sample_gradients(x[None, a:b], dy[None, a:b], mask[None, a:b])
        torch.testing.assert_close(out[s], alone[0], rtol=gamma(25), atol=1e-6)
    ids = torch.full((50,), -1, dtype=index_dtype)
    for s, (a, b) in enumerate(((2, 9), (9, 9), (9, 30), (30, 47))):
        ids[a:b] = s
    assert torch.equal(per_sample_gradients(x, dy, mask, segment_ids=ids), out)
    more = per_sample_gradients(x, dy, mask, segment_ids=ids, num_segments=6)
    assert torch.equal(more[:4], out)
    assert not more[4:].any()


def test_segment_ids_in_any_order(isa: str) -> None:
    x, dy = randn(3, 4, 5), randn(3, 4, 2, seed=1)
    ids = torch.tensor([[3, 0, -1, 0], [0, 2, 2, -1], [-1, 0, 3, 3]])
    out = per_sample_gradients(x, dy, segment_ids=ids, num_segments=5)
    for s in range(5):
        tokens = ids == s
        exact = dy[tokens].double().T @ x[tokens].double()
        torch.testing.assert_close(out[s].double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_out_dtype(isa: str, dtype: torch.dtype) -> None:
    x, dy = randn(2, 3, 5), randn(2, 3, 4, seed=1)
    out = per_sample_gradients(x, dy, out_dtype=dtype)
    assert out.dtype == dtype
    assert torch.equal(out, per_sample_gradients(x, dy).to(dtype))


X, DY = randn(2, 6, 5), randn(2, 6, 3, seed=1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, DY[:, :5]), {}, ValueError, "dy: expected [N=2, T=6, O], got [2, 5, 3]"),
        ((X, DY, torch.ones(6, 2)), {}, ValueError, "mask: expected [N=2, T=6], got [6, 2]"),
        ((X, DY, torch.ones(2, 6) / 2), {}, ValueError, "mask: expected only 0 and 1, got 0.5"),
        (
            (X, DY, torch.ones(2, 6).to(torch.complex64)),
            {},
            TypeError,
            "mask: expected bool, integer or float, got complex64",
        ),
        ((X[0, 0], DY), {}, ValueError, "x: expected [N, T, I], [N, I] or packed [T, I], got [5]"),
        (
            (X, DY),
            {"out_dtype": torch.int32},
            TypeError,
            "out_dtype: expected float16, bfloat16, float32 or float64, got int32",
        ),
        (
            (X[0], DY[0]),
            {"cu_seqlens": torch.tensor([0, 4, 3])},
            ValueError,
            "cu_seqlens: expected values that never fall, from 0 to 6 at most, got [0, 4, 3]",
        ),
        (
            (X[0], DY[0]),
            {"cu_seqlens": torch.tensor([0, 7])},
            ValueError,
            "cu_seqlens: expected values that never fall, from 0 to 6 at most, got [0, 7]",
        ),
        (
            (X[0], DY[0]),
            {"cu_seqlens": torch.tensor([0.0, 6.0])},
            TypeError,
            "cu_seqlens: expected int32 or int64, got float32",
        ),
        (
            (X, DY),
            {"cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            "x: expected [T, I], got [2, 6, 5]",
        ),
        (
            (X[0], DY[0]),
            {"segment_ids": torch.tensor([0, 0, 1, 1, 2, 2]), "num_segments": 2},
            ValueError,
            "segment_ids: expected -1 to 1 (num_segments=2), got 0 to 2",
        ),
        (
            (X[0], DY[0]),
            {"segment_ids": torch.zeros(6).long(), "cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            "segment_ids: expected None beside cu_seqlens, got both",
        ),
        (
            (X, DY),
            {"num_segments": 3},
            ValueError,
            "num_segments: expected None without segment_ids",
        ),
    ],
)
def test_bad_input(
    arguments: tuple[Tensor, Tensor], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        per_sample_gradients(*arguments, **options)
    assert str(caught.value) == message
