from typing import Any

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from logra_kernels import reference
from logra_kernels.triton import per_sample_gradients, projected_gradients

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def wide(tensor: Tensor | None, absolute: bool = False) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.double().abs() if absolute else tensor.double()


def check(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    got = projected_gradients(x, dy, proj_in, proj_out, mask, cu_seqlens)
    assert got.dtype == torch.float32
    tensors = (x, dy, proj_in, proj_out)
    exact: list[Any] = [*map(wide, tensors), mask, cu_seqlens]
    want = reference.projected_gradients(*exact)
    sizes: list[Any] = [*(wide(t, absolute=True) for t in tensors), mask, cu_seqlens]
    magnitude = reference.projected_gradients(*sizes)
    assert_within(got, want, magnitude, terms=x.shape[-1] + dy.shape[-1] + x.shape[-2])
    return got


def tokens(*shape: int, dtype: torch.dtype = HALF, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (BRAIN, BRAIN), (FULL, FULL), (FULL, BRAIN)])
@pytest.mark.parametrize(
    ("n", "t", "i", "o", "ki", "ko"),
    [(2, 1, 1, 1, 1, 1), (3, 70, 33, 65, 17, 5), (1, 300, 20, 70, 16, 33)],
)
def test_equals_reference(
    device: str, dtypes: tuple[torch.dtype, torch.dtype], n: int, t: int, i: int, o: int,
    ki: int, ko: int,
) -> None:  # fmt: skip
    x = tokens(n, t, i, dtype=dtypes[0], device=device)
    dy = tokens(n, t, o, dtype=dtypes[1], device=device)
    proj_in = tokens(ki, i, dtype=dtypes[0], device=device)
    check(x, dy, proj_in, tokens(ko, o, dtype=dtypes[1], device=device))


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (FULL, BRAIN), (HALF, FULL), (BRAIN, HALF)])
@pytest.mark.parametrize("sides", ["in", "out", "neither"])
def test_identity(device: str, dtypes: tuple[torch.dtype, torch.dtype], sides: str) -> None:
    x, dy = (
        tokens(2, 40, 21, dtype=dtypes[0], device=device),
        tokens(2, 40, 70, dtype=dtypes[1], device=device),
    )
    proj_in = tokens(9, 21, dtype=dtypes[0], device=device) if sides == "in" else None
    proj_out = tokens(9, 70, dtype=dtypes[1], device=device) if sides == "out" else None
    got = check(x, dy, proj_in, proj_out)
    if sides == "neither":
        assert torch.equal(got, per_sample_gradients(x, dy))


def test_projects_once_where_the_gradient_has_many_tiles(device: str) -> None:
    """Three tiles of 64 on the other side: the launcher projects first."""
    x, dy = tokens(1, 20, 30, device=device), tokens(1, 20, 190, device=device)
    check(x, dy, tokens(10, 30, device=device), None)
    check(dy, x, None, tokens(10, 30, device=device))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_a_masked_token_may_hold_nan(device: str, kind: torch.dtype) -> None:
    x, dy = tokens(2, 150, 20, device=device), tokens(2, 150, 18, device=device)
    proj = tokens(6, 20, device=device)
    mask = torch.rand(2, 300, device=device)[:, ::2] > 0.4  # strided
    mask[0, :80] = False
    x[~mask], dy[~mask] = torch.nan, torch.inf
    got = projected_gradients(x, dy, proj, None, mask.to(kind))
    clean = x.masked_fill(~mask[..., None], 0), dy.masked_fill(~mask[..., None], 0)
    assert torch.equal(got, projected_gradients(*clean, proj, None))
    check(*clean, proj, None)
    assert torch.equal(per_sample_gradients(x, dy, mask.to(kind)), per_sample_gradients(*clean))


def test_nan_in_a_token_that_counts_is_not_hidden(device: str) -> None:
    x, dy = tokens(2, 40, 20, device=device), tokens(2, 40, 20, device=device)
    x[1, 3, 4] = torch.nan
    got = projected_gradients(x, dy, None, None)
    assert got[1, :, 4].isnan().all()
    assert got[0].isfinite().all()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_segments(device: str, kind: torch.dtype) -> None:
    """Segments within, across and beyond a chunk of 128 tokens; empty ones; tokens in none."""
    x, dy = tokens(520, 20, device=device), tokens(520, 18, device=device)
    bounds = torch.tensor([3, 3, 10, 138, 139, 500, 500], device=device, dtype=kind)
    mask = torch.rand(520, device=device) > 0.2
    x[:3] = torch.nan
    for m in (None, mask):
        check(x, dy, tokens(5, 20, device=device), tokens(7, 18, device=device), m, bounds)
    assert (per_sample_gradients(x, dy, None, bounds)[[0, 5]] == 0).all()


def test_packed_equals_padded_bit_for_bit(device: str) -> None:
    lengths = [130, 1, 257, 64]
    x, dy = tokens(4, 257, 20, device=device), tokens(4, 257, 18, device=device)
    proj = tokens(5, 20, device=device)
    mask = torch.arange(257, device=device) < torch.tensor(lengths, device=device)[:, None]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    padded = projected_gradients(x, dy, proj, None, mask)
    assert torch.equal(projected_gradients(x[mask], dy[mask], proj, None, None, bounds), padded)


def test_an_example_does_not_depend_on_its_batch(device: str) -> None:
    # Four chunks, because the order of two does not change their sum.
    x, dy = tokens(5, 400, 20, device=device), tokens(5, 400, 18, device=device)
    proj = tokens(5, 20, device=device)
    whole = projected_gradients(x, dy, proj, None)
    assert torch.equal(whole[3:], projected_gradients(x[3:], dy[3:], proj, None))


def test_strides(device: str) -> None:
    x = tokens(6, 90, 50, device=device)[::2, ::3, 7:40]
    dy = tokens(30, 3, 20, device=device).transpose(0, 1)
    check(x, dy, tokens(5, 60, device=device)[:, 9:42], None)
    check(x, tokens(3, 20, 30, device=device).transpose(1, 2), None, None)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)])
def test_empty(device: str, shape: tuple[int, int, int, int]) -> None:
    n, t, i, o = shape
    x, dy = torch.ones(n, t, i, device=device), torch.ones(n, t, o, device=device)
    got = projected_gradients(x, dy, torch.ones(3, i, device=device), None)
    assert torch.equal(got, reference.projected_gradients(x, dy, x.new_ones(3, i), None))
    assert torch.equal(per_sample_gradients(x, dy), reference.per_sample_gradients(x, dy))
    none = torch.zeros(1, device=device, dtype=torch.int64)
    packed = projected_gradients(x.flatten(0, 1), dy.flatten(0, 1), None, None, None, none)
    assert packed.shape == (0, o, i)


def test_extremes(device: str) -> None:
    """Products of fp16's largest, and of its smallest with the largest, in float32."""
    x = torch.tensor([65504.0, 2.0**-24], device=device).half().expand(1, 3, 2)
    dy = torch.full((1, 3, 1), 65504.0, device=device).half()
    want = [3 * 65504.0**2, 3 * 65504.0 * 2.0**-24]
    assert per_sample_gradients(x, dy).flatten().tolist() == pytest.approx(want, rel=3 * 2.0**-23)
    eye = torch.eye(2, device=device).half()
    got = projected_gradients(x, dy, eye, eye[:1, :1])
    assert got.flatten().tolist() == pytest.approx(want, rel=3 * 2.0**-23 + 2.0**-19)


def test_pieces_hold_24_bits(device: str) -> None:
    """float32 times a bfloat16 1.0: a sum of one product loses only what the pieces lose."""
    values = torch.randn(3, 1, 20, device=device)
    ones = torch.ones(3, 1, 1, device=device).bfloat16()
    for got in (per_sample_gradients(ones, values), per_sample_gradients(values, ones)):
        torch.testing.assert_close(got.flatten(1), values[:, 0], rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("t", [10, 200])
def test_out_dtype(device: str, dtype: torch.dtype, t: int) -> None:
    x, dy = tokens(2, t, 20, device=device), tokens(2, t, 18, device=device)
    got = per_sample_gradients(x, dy, out_dtype=dtype)
    assert got.dtype == dtype
    # The bound is one unit in the last place, because the interpreter truncates to bfloat16.
    unit = 2.0**-10 if dtype == HALF else 2.0**-7
    torch.testing.assert_close(got.float(), per_sample_gradients(x, dy), rtol=unit, atol=1e-5)
