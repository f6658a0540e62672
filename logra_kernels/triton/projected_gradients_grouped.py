"""Projected per-sample gradients of several modules of one shape on a GPU, in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from logra_kernels.triton.launch import check, check_floating
from logra_kernels.triton.projected_gradients import Examples, Side, gradients_of_modules


def projected_gradients_grouped(
    xs: Sequence[Tensor],
    dys: Sequence[Tensor],
    projs_in: Sequence[Tensor],
    projs_out: Sequence[Tensor],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    input_precision: str | None = None,
) -> Tensor:
    """xs M tensors [N, T, I], dys [N, T, O], mask [N, T] -> [M, N, Ko, Ki].

    The bits are those of `projected_gradients` for each module. Modules in a row whose tensors have
    the same strides share a launch.
    """
    named = {"xs": xs, "dys": dys, "projs_in": projs_in, "projs_out": projs_out}
    check_floating(
        **{f"{name}[{m}]": t for name, side in named.items() for m, t in enumerate(side)}
    )
    check(x=xs[0], mask=mask, cu_seqlens=cu_seqlens)
    sides = Side(xs, projs_in), Side(dys, projs_out)
    examples = Examples.of(mask, cu_seqlens)
    return gradients_of_modules(*sides, examples, out_dtype, input_precision)
