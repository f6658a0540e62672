"""Per-sample gradients (LoGra Eq. 6) on a GPU: projected_gradients with nothing to project."""

import torch
from torch import Tensor

from logra_kernels.triton.projected_gradients import projected_gradients


def per_sample_gradients(
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    input_precision: str | None = None,
) -> Tensor:
    """x [N, T, Ki], dy [N, T, Ko], mask [N, T] -> [N, Ko, Ki]; packed as in projected_gradients."""
    return projected_gradients(
        x, dy, None, None, mask, cu_seqlens, out_dtype, input_precision=input_precision
    )
