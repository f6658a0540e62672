"""Per-sample gradients from projected activations."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from logra_kernels import reference
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view
from logra_kernels.ops._tokens import (
    check_operands,
    check_token_values,
    check_tokens,
    direct_gradients,
)
from logra_kernels.reference._dtype import accumulator


def per_sample_gradients(
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Sum each example's outer products of output gradient and activation.

    .. math:: G_n = \sum_t m_{nt} \, dy_{nt} \, x_{nt}^\top

    Args:
        x: ``[N, T, Ki]`` activations, already projected; ``[N, Ki]`` stands for T = 1. float16,
            bfloat16, float32 or float64.
        dy: ``[N, T, Ko]`` output gradients, likewise; its dtype may differ from x's.
        mask: ``[N, T]`` 0 or 1 of any real dtype. A token masked by 0 is skipped, whatever it
            holds; None keeps all.
        cu_seqlens: ``[S+1]`` int32 or int64. Tokens are packed, ``x [T, Ki]``, ``dy [T, Ko]``,
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
        out = direct_gradients(x, dy, None, None, mask)
        if out is not None:
            return out
    tokens = check_tokens(x, dy, mask, cu_seqlens, segment_ids, num_segments, out_dtype)
    return _call(*tokens, out_dtype)


def _fake(
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    num = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((num, dy.shape[-1], x.shape[-1]), dtype=out_dtype or accumulator(x, dy))


def _native(
    c: ModuleType,
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    out = _fake(x, dy, mask, cu_seqlens, torch.float32)
    mask = None if mask is None else mask.contiguous()
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    c.per_sample_gradients(view(x), view(dy), pointer(mask), pointer(bounds), view(out))
    return out.to(out_dtype or torch.float32)


def _reference(x: Tensor, dy: Tensor, mask: Any, cu_seqlens: Any, out_dtype: Any) -> Tensor:
    return reference.per_sample_gradients(x, dy, mask, cu_seqlens, out_dtype=out_dtype)


def _check(
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    x, dy, _, _, mask, cu_seqlens = check_operands(x, dy, None, None, mask, cu_seqlens, out_dtype)
    return x, dy, mask, cu_seqlens, out_dtype


def _check_values(
    x: Tensor, dy: Tensor, mask: Any, cu_seqlens: Any, out_dtype: Any
) -> tuple[Any, ...]:
    return x, dy, check_token_values(mask, cu_seqlens, x.shape[0]), cu_seqlens, out_dtype


_call = register(
    "per_sample_gradients(Tensor x, Tensor dy, Tensor? mask=None, Tensor? cu_seqlens=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    module="per_sample_gradients",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    check_values=_check_values,
)
