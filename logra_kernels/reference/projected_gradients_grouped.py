"""Projected per-sample gradients of several modules of one shape."""

from collections.abc import Sequence

import torch
from torch import Tensor

from logra_kernels.reference.projected_gradients import projected_gradients


def projected_gradients_grouped(
    xs: Sequence[Tensor],
    dys: Sequence[Tensor],
    projs_in: Sequence[Tensor],
    projs_out: Sequence[Tensor],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """[M, N, Ko, Ki]: `projected_gradients` of each module; no projections stand for identities.

    xs M tensors [N, T, I], dys [N, T, O], projs_in [Ki, I] or none, projs_out [Ko, O] or none;
    mask [N, T] and cu_seqlens [S+1] are shared.
    """
    none = [None] * len(xs)
    modules = zip(xs, dys, projs_in or none, projs_out or none, strict=True)
    return torch.stack([projected_gradients(*one, mask, cu_seqlens, out_dtype) for one in modules])
