"""Per-sample gradients from projected activations (LoGra Eq. 6): G = sum_t m_t dy_t x_t^T."""

import itertools

import torch
from torch import Tensor

from logra_kernels.reference._dtype import accumulator


def per_sample_gradients(
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [N, T, Ki], dy [N, T, Ko], mask [N, T] -> [N, Ko, Ki].

    With cu_seqlens [S+1]: x [T, Ki], dy [T, Ko], mask [T] -> [S, Ko, Ki]; segment s holds the
    tokens cu_seqlens[s] to cu_seqlens[s+1]-1, and tokens outside every segment are ignored.
    """
    dtype = accumulator(x, dy)
    x, dy = x.to(dtype), dy.to(dtype)
    if mask is not None:
        # where, not a product: a masked token contributes nothing even if it holds NaN
        keep = (mask != 0).unsqueeze(-1)
        x, dy = torch.where(keep, x, 0), torch.where(keep, dy, 0)
    if cu_seqlens is None:
        gradients = torch.einsum("nto,nti->noi", dy, x)  # [N, Ko, Ki]
    else:
        bounds = cu_seqlens.tolist()
        gradients = x.new_zeros(len(bounds) - 1, dy.shape[-1], x.shape[-1])  # [S, Ko, Ki]
        for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
            gradients[s] = dy[begin:end].T @ x[begin:end]
    return gradients.to(out_dtype or dtype)
