"""Projected per-sample gradients from raw activations (LoGra Eq. 6), both projections fused."""

import torch
from torch import Tensor

from logra_kernels.reference.per_sample_gradients import per_sample_gradients
from logra_kernels.reference.project import project


def projected_gradients(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """G = sum_t m_t (P_o dy_t) (P_i x_t)^T; None stands for the identity.

    x [N, T, I], dy [N, T, O], proj_in [Ki, I], proj_out [Ko, O], mask [N, T] -> [N, Ko, Ki];
    with cu_seqlens [S+1] the tokens are packed: x [T, I], dy [T, O], mask [T] -> [S, Ko, Ki].
    """
    x = x if proj_in is None else project(x, proj_in)
    dy = dy if proj_out is None else project(dy, proj_out)
    return per_sample_gradients(x, dy, mask, cu_seqlens, out_dtype)
