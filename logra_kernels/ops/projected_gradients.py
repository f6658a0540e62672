"""Projected per-sample gradients from raw activations, both projections fused."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from logra_kernels._checks import FLOATS, expect_same_device, expect_shape, operand
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view
from logra_kernels.ops._tokens import check_token_values, check_tokens, direct_gradients
from logra_kernels.reference._dtype import accumulator


def projected_gradients(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Sum each example's outer products of projected output gradient and projected activation.

    .. math:: G_n = \sum_t m_{nt} \, (P_o \, dy_{nt}) (P_i \, x_{nt})^\top

    The same, bit for bit, as `project` on both sides and then `per_sample_gradients`; the
    projected tokens stay in cache.

    Args:
        x: ``[N, T, I]`` activations; ``[N, I]`` stands for T = 1. float16, bfloat16, float32 or
            float64.
        dy: ``[N, T, O]`` output gradients, likewise; its dtype may differ from x's.
        proj_in: ``[Ki, I]`` P_i, or None for the identity (then Ki = I).
        proj_out: ``[Ko, O]`` P_o, or None for the identity (then Ko = O).
        mask: ``[N, T]`` 0 or 1 of any real dtype. A token masked by 0 is skipped, whatever it
            holds; None keeps all.
        cu_seqlens: ``[S+1]`` int32 or int64. Tokens are packed, ``x [T, I]``, ``dy [T, O]``,
            ``mask [T]``; segment s holds the tokens ``cu_seqlens[s]`` to ``cu_seqlens[s+1] - 1``.
        segment_ids: ``[T]`` or ``[N, T]`` int32 or int64, instead of cu_seqlens: each token's
            segment, -1 for none. Ids that do not grow along the tokens cost a sorted copy.
        num_segments: S for segment_ids; None for the largest id + 1.
        out_dtype: dtype of the result; None for the accumulator's.

    Returns:
        ``[N, Ko, Ki]`` (``[S, Ko, Ki]`` for segments), accumulated in float32 (float64 if an
        argument is float64).

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that disagree, segments out of range, a mask that is not
            0 or 1.

    Source: LoGra (Choe et al. 2024), Eq. 6.
    """
    if cu_seqlens is None and segment_ids is None and num_segments is None and out_dtype is None:
        out = direct_gradients(x, dy, proj_in, proj_out, mask)
        if out is not None:
            return out
    x, dy, mask, cu_seqlens = check_tokens(
        x, dy, mask, cu_seqlens, segment_ids, num_segments, out_dtype
    )
    return _call(x, dy, proj_in, proj_out, mask, cu_seqlens, out_dtype)


def check_gradients(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None = None,
    proj_out: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """The arguments for a kernel: tokens [N, T, *], or packed [T, *] with cu_seqlens."""
    if cu_seqlens is None:
        expect_shape("x", x, N=None, T=None, I=None)
    x, dy, mask, cu_seqlens = check_tokens(x, dy, mask, cu_seqlens, None, None, out_dtype)
    if proj_in is not None:
        proj_in = operand("proj_in", proj_in, FLOATS, Ki=None, I=x.shape[-1])
    if proj_out is not None:
        proj_out = operand("proj_out", proj_out, FLOATS, Ko=None, O=dy.shape[-1])
    expect_same_device(x=x, proj_in=proj_in, proj_out=proj_out)
    return x, dy, proj_in, proj_out, mask, cu_seqlens, out_dtype


def empty_gradients(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out_dtype: torch.dtype | None,
    *modules: int,
) -> Tensor:
    """Room for G [*modules, N, Ko, Ki] of these arguments."""
    num = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    ki = x.shape[-1] if proj_in is None else proj_in.shape[0]
    ko = dy.shape[-1] if proj_out is None else proj_out.shape[0]
    dtype = out_dtype or accumulator(x, dy, proj_in, proj_out)
    return x.new_empty((*modules, num, ko, ki), dtype=dtype)


def native_gradients(
    c: ModuleType,
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """G by the C++ kernel."""
    out = empty_gradients(x, dy, proj_in, proj_out, mask, cu_seqlens, torch.float32)
    mask = None if mask is None else mask.contiguous()
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    p_in = None if proj_in is None else view(proj_in)
    p_out = None if proj_out is None else view(proj_out)
    c.projected_gradients(view(x), view(dy), p_in, p_out, pointer(mask), pointer(bounds), view(out))
    return out.to(out_dtype or torch.float32)


_call = register(
    "projected_gradients(Tensor x, Tensor dy, Tensor? proj_in=None, Tensor? proj_out=None, "
    "Tensor? mask=None, Tensor? cu_seqlens=None, ScalarType? out_dtype=None) -> Tensor",
    check=check_gradients,
    fake=empty_gradients,
    native=native_gradients,
    check_values=check_token_values,
)
