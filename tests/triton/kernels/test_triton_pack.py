"""The packed and unpacked bits equal those of the reference."""

import pytest
import torch
from torch import Tensor

from logra_kernels import reference
from logra_kernels.triton import pack_rows, unpack_rows


def equal_bits(got: Tensor, want: Tensor) -> bool:
    """NaN equals NaN whatever its payload; zeros differ by sign."""
    kind = {torch.float16: torch.int16, torch.float32: torch.int32}[want.dtype]
    same = (got.view(kind) == want.view(kind)) | (got.isnan() & want.isnan())
    return got.dtype == want.dtype and bool(same.all())


def check(rows: Tensor, sizes: list[int], exponents: list[int]) -> tuple[Tensor, Tensor]:
    packed, scale = pack_rows(rows, sizes, exponents)
    want, want_scale = reference.pack_rows(rows, sizes, exponents)
    assert equal_bits(scale, want_scale)
    assert equal_bits(packed, want)
    back = unpack_rows(packed, scale, sizes, exponents)
    assert equal_bits(back, reference.unpack_rows(want, want_scale, sizes, exponents))
    return packed, scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [[1], [7, 0, 20], [1000, 30]])
def test_same_bits(dtype: torch.dtype, sizes: list[int]) -> None:
    rows = torch.randn(3, sum(sizes)).to(dtype)
    check(rows, sizes, list(range(-3, -3 + len(sizes))))


def test_every_power_of_two() -> None:
    """From float32's smallest subnormal to its largest power, alone and beside a 1.0."""
    powers = torch.exp2(torch.arange(-149, 128, 4, dtype=torch.float64)).float()
    powers = torch.stack((powers, 1.25 * powers), dim=1).flip(0)
    check(powers, [2], [0])
    check(torch.cat((powers, torch.ones_like(powers)), dim=1), [4], [0])


@pytest.mark.parametrize("exponent", [-126, -30, 30, 127])
def test_module_exponents(exponent: int) -> None:
    rows = torch.randn(3, 40)
    rows[1] *= 2.0**-100
    rows[2] *= 2.0**100
    check(rows, [10, 30], [exponent, 0])
    check(rows, [10, 30], [exponent, exponent])


def test_rows_that_are_zero_or_not_finite() -> None:
    rows = torch.randn(5, 6)
    rows[0] = 0
    rows[1, 2] = torch.nan
    rows[2, 3] = torch.inf
    rows[3, 4] = -torch.inf
    rows[4, 0] = -0.0
    packed, scale = check(rows, [2, 4], [1, -1])
    assert scale[:4].tolist() == [1, 1, 1, 1]
    assert packed[1, 2].isnan()
    assert packed[2, 3] == torch.inf


def test_tiny_and_huge_rows_survive() -> None:
    rows = torch.tensor([[1e-30, -3e-31], [1e30, -3e29]])
    back = unpack_rows(*check(rows, [2], [0]), [2], [0])
    torch.testing.assert_close(back, rows, rtol=2.0**-11, atol=0)  # fp16's rounding


def test_strides() -> None:
    check(torch.randn(8, 50)[::2, 3:40], [30, 7], [2, -2])
    check(torch.randn(37, 4).T, [30, 7], [2, -2])
    packed = torch.randn(8, 50).half()[::2, 3:40]
    scale = torch.exp2(torch.arange(8.0))[::2]
    got = unpack_rows(packed, scale, [37], [1])
    assert equal_bits(got, reference.unpack_rows(packed, scale, [37], [1]))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    check(torch.ones(shape), [shape[1]], [0])


def test_exponent_out_of_range() -> None:
    with pytest.raises(ValueError, match="module_exponents: expected -126 to 127, got 200"):
        pack_rows(torch.ones(1, 1), [1], [200])


def test_torchs_default_device_is_not_asked() -> None:
    rows = torch.randn(3, 5)
    with torch.device("meta"):
        packed, scale = pack_rows(rows, [2, 3], [1, -1])
        back = unpack_rows(packed, scale, [2, 3], [1, -1])
    assert equal_bits(back, unpack_rows(*pack_rows(rows, [2, 3], [1, -1]), [2, 3], [1, -1]))
