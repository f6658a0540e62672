import pytest
import torch
from op_cases import DTYPES, TAILS, assert_within, gamma, mask_of, randn
from torch import Tensor

from logra_kernels.ops import per_sample_gradients

pytestmark = pytest.mark.usefixtures("poison")


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
        check(x, dy, mask_of(n, t))
    for other in DTYPES:
        check(randn(3, 4, 20, dtype=dtype), randn(3, 4, 6, dtype=other, seed=1))
    # rows that end within a vector and go through a copy, some at a time
    check(randn(2, 67, 701, dtype=dtype), randn(2, 67, 97, dtype=dtype, seed=1))


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
    x, dy, mask = randn(3, 20, 8), randn(3, 20, 5, seed=1), mask_of(3, 20)
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


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_segments_are_examples(isa: str, index_dtype: torch.dtype) -> None:
    x, dy, mask = randn(50, 12), randn(50, 9, seed=1), mask_of(1, 50)[0]
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
