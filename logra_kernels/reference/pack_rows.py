"""Rows as fp16 with a power-of-two scale per row and a fixed exponent per module.

row[r, d] = packed[r, d] * row_scale[r] * 2**module_exponent(d)

The row's scale puts its largest element in [2**14, 2**15), so that nothing overflows and the
smallest elements lose least: 39 powers of two lie between it and fp16's smallest subnormal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_EXPONENT = 14


def pack_rows(
    rows: Tensor, module_sizes: Sequence[int], module_exponents: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """rows [R, D] -> packed [R, D] float16, row_scale [R] float32.

    A row that is all zero, or holds a value that is not finite, has scale 1; such a value stays
    as it is (infinite or NaN).
    """
    exponents = _column_exponents(rows, module_sizes, module_exponents)  # [D]
    wide = torch.ldexp(rows.double(), -exponents)  # [R, D]
    largest = wide.abs().amax(dim=1) if rows.shape[1] else wide.new_zeros(rows.shape[0])  # [R]
    shift = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
    shift = torch.where(largest.isfinite() & (largest > 0), shift, 0).clamp(-126, 127)
    packed = torch.ldexp(wide, -shift[:, None]).to(torch.float16)
    return packed, torch.ldexp(torch.ones_like(largest), shift).float()


def unpack_rows(
    packed: Tensor, row_scale: Tensor, module_sizes: Sequence[int], module_exponents: Sequence[int]
) -> Tensor:
    """packed [R, D], row_scale [R] -> [R, D] float32."""
    exponents = _column_exponents(packed, module_sizes, module_exponents)
    return (torch.ldexp(packed.double(), exponents) * row_scale.double()[:, None]).float()


def _column_exponents(
    rows: Tensor, module_sizes: Sequence[int], module_exponents: Sequence[int]
) -> Tensor:
    sizes = torch.tensor(module_sizes, device=rows.device, dtype=torch.int64)
    exponents = torch.tensor(module_exponents, device=rows.device, dtype=torch.int32)
    return exponents.repeat_interleave(sizes)
