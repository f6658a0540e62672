# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""Rows to and from fp16 with a power-of-two scale per row and an exponent per module, on a GPU.

The arithmetic is that of the reference: float64 products with powers of two, which are exact, then
one rounding to float16 (or float32). Module exponents are in [-126, 127], as in the reference.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton.launch import (
    check,
    check_floating,
    choose,
    last_axis_contiguous,
    launch,
    tile,
)

_LARGEST_EXPONENT = tl.constexpr(14)  # of a packed row's largest element, as in the reference


@triton.jit
def _power_of_two(exponent):
    """2**exponent as float64, exponent int32 in [-1022, 1023]."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["count"])
def _pack_kernel(
    rows,  # [R, D]
    exponents,  # [D] int32
    packed,  # [R, D] float16
    row_scale,  # [R] float32
    count,  # R
    dim,
    row_stride: tl.int64,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), dtype=tl.float64)
    odd = tl.zeros((BLOCK,), dtype=tl.int32)  # 1 where a value is infinite or NaN
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(rows + r * row_stride + d, mask=d < dim, other=0.0)
        value = value.to(tl.float32).to(tl.float64)
        exponent = tl.load(exponents + d, mask=d < dim, other=0)
        value = tl.abs(value * _power_of_two(-exponent))
        finite = value < float("inf")
        odd |= (finite == 0).to(tl.int32)
        largest = tl.maximum(largest, tl.where(finite, value, 0.0))
    most = tl.max(largest, axis=0)
    # Bits 52 to 62 of a positive float64 hold floor(log2) + 1023.
    log2 = ((most.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int32)
    shift = tl.minimum(tl.maximum(log2 - _LARGEST_EXPONENT, -126), 127)
    shift = tl.where((most > 0) & (tl.max(odd, axis=0) == 0), shift, 0)
    tl.store(row_scale + r, _power_of_two(shift).to(tl.float32))
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(rows + r * row_stride + d, mask=d < dim, other=0.0)
        value = value.to(tl.float32).to(tl.float64)
        exponent = tl.load(exponents + d, mask=d < dim, other=0)
        value = value * _power_of_two(-exponent) * _power_of_two(-shift)
        # It is rounded by way of float32, as torch does. float32 is exact down to 2**-126 and
        # float16's smallest number is 2**-24, so the value is rounded once.
        tl.store(packed + r * dim + d, value.to(tl.float32).to(tl.float16), mask=d < dim)


@triton.jit(do_not_specialize=["count", "scale_stride"])
def _unpack_kernel(
    packed,  # [R, D] float16
    row_scale,  # [R] float32
    exponents,  # [D] int32
    out,  # [R, D] float32
    count,  # R
    dim,
    row_stride: tl.int64,
    scale_stride: tl.int64,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(dim, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(packed + r * row_stride + d, mask=d < dim, other=0.0)
    exponent = tl.load(exponents + d, mask=d < dim, other=0)
    scale = tl.load(row_scale + r * scale_stride).to(tl.float64)
    value = value.to(tl.float32).to(tl.float64) * _power_of_two(exponent) * scale
    tl.store(out + r * dim + d, value.to(tl.float32), mask=d < dim)


def _column_exponents(
    sizes: Sequence[int], exponents: Sequence[int], device: torch.device
) -> Tensor:
    for exponent in exponents:
        if not -126 <= exponent <= 127:
            raise ValueError(f"module_exponents: expected -126 to 127, got {exponent}")
    counts = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    columns = torch.tensor(exponents, dtype=torch.int32, device="cpu").repeat_interleave(counts)
    return columns.to(device)  # [D]


def pack_rows(
    rows: Tensor, module_sizes: Sequence[int], module_exponents: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """rows [R, D] -> packed [R, D] float16, row_scale [R] float32."""
    check_floating(rows=rows)
    rows = last_axis_contiguous(rows)
    count, dim = rows.shape
    packed = torch.empty(count, dim, device=rows.device, dtype=torch.float16)
    row_scale = torch.empty(count, device=rows.device, dtype=torch.float32)
    if count == 0:
        return packed, row_scale
    config = choose("pack_rows", "half", rows)
    config["BLOCK"] = tile(dim, config["BLOCK"])
    launch(
        _pack_kernel,
        ("count",),
        rows,
        config,
        rows=rows,
        exponents=_column_exponents(module_sizes, module_exponents, rows.device),
        packed=packed,
        row_scale=row_scale,
        count=count,
        dim=dim,
        row_stride=rows.stride(0),
    )
    return packed, row_scale


def unpack_rows(
    packed: Tensor, row_scale: Tensor, module_sizes: Sequence[int], module_exponents: Sequence[int]
) -> Tensor:
    """packed [R, D], row_scale [R] -> [R, D] float32."""
    check(packed=packed, row_scale=row_scale)
    check_floating(packed=packed)
    packed = last_axis_contiguous(packed)
    count, dim = packed.shape
    out = torch.empty(count, dim, device=packed.device, dtype=torch.float32)
    if out.numel() == 0:
        return out
    config = choose("unpack_rows", "half", packed)
    config["BLOCK"] = tile(dim, config["BLOCK"])
    launch(
        _unpack_kernel,
        ("count", ("dim", "BLOCK")),
        packed,
        config,
        packed=packed,
        row_scale=row_scale,
        exponents=_column_exponents(module_sizes, module_exponents, packed.device),
        out=out,
        count=count,
        dim=dim,
        row_stride=packed.stride(0),
        scale_stride=row_scale.stride(0),
    )
    return out
