"""Projected per-sample gradients of several modules of one shape on a GPU, in one launch."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from logra_kernels.triton._common import check, check_floating, last_axis_contiguous, precision
from logra_kernels.triton.projected_gradients import gradients_of_modules, is_aligned


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
    count = len(xs)
    named = {"xs": xs, "dys": dys, "projs_in": projs_in, "projs_out": projs_out}
    check_floating(
        **{f"{name}[{m}]": t for name, side in named.items() for m, t in enumerate(side)}
    )
    check(x=xs[0], mask=mask, cu_seqlens=cu_seqlens)
    ki = projs_in[0].shape[0] if projs_in else xs[0].shape[-1]
    ko = projs_out[0].shape[0] if projs_out else dys[0].shape[-1]
    num = xs[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = out_dtype or torch.float32
    out = torch.empty(count, num, ko, ki, device=xs[0].device, dtype=dtype)

    def plain(tensors: Sequence[Tensor]) -> list[Any]:
        return [last_axis_contiguous(t) for t in tensors] or [None] * count

    sides = plain(xs), plain(dys), plain(projs_in), plain(projs_out)

    def launch_key(m: int) -> tuple[Any, ...]:
        members = [side[m] for side in sides if side[m] is not None]
        return (
            *((t.dtype, t.shape, t.stride()) for t in members),
            all(is_aligned(t) for t in members),
        )

    for _, run in groupby(range(count), launch_key):
        members = list(run)
        span = slice(members[0], members[-1] + 1)
        gradients_of_modules(
            *(sides[0][span], sides[1][span], sides[2][span], sides[3][span]),
            mask,
            cu_seqlens,
            out[span],
            precision(input_precision),
        )
    return out
