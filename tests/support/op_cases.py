"""What the ops' tests share: sizes, layouts and error bounds."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from logra_kernels import ops

# around every vector width, and the tiles of 2, 4 and 6
TAILS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gamma(terms: int) -> float:
    """Higham's gamma_n: a sum of n products, in any order, is off by at most gamma_n |a|.|b|."""
    unit = 2.0**-24
    return terms * unit / (1 - terms * unit)


def assert_within(got: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|got - exact| <= bound, element by element; exact and bound are float64."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs()
    assert not got.isnan().any()
    worst = (error / bound.clamp_min(1e-300)).max() if error.numel() else torch.tensor(0.0)
    assert bool((error <= bound).all()), f"error {float(worst):.2f} times its bound"


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between the rows; the gaps hold NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan)
    wide[..., 2:-3] = tensor
    return wide[..., 2:-3]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, at an odd address."""
    data = tensor.contiguous().view(torch.uint8).flatten()
    raw = bytearray(1 + data.numel())
    raw[1:] = data.numpy().tobytes()
    if not data.numel():
        return tensor
    return torch.frombuffer(raw, dtype=tensor.dtype, offset=1).view(tensor.shape)


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    yield strided(tensor)
    yield misaligned(tensor)


def same_bits(one: Any, other: Any) -> bool:
    one = (one,) if isinstance(one, Tensor) else one
    other = (other,) if isinstance(other, Tensor) else other
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_same(one: Any, other: Any) -> None:
    """The same bits from the C++ kernels; nearly so from torch, whose sums depend on layout."""
    one = (one,) if isinstance(one, Tensor) else one
    other = (other,) if isinstance(other, Tensor) else other
    tolerance = 1e-4 if ops.isa() is None else 0.0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_threads_do_not_matter(call: Callable[[], Any]) -> None:
    """The caller restores the number of threads (fixture set_threads)."""
    torch.set_num_threads(1)
    alone = call()
    torch.set_num_threads(2)
    assert same_bits(alone, call())
