"""Per-sample gradients from projected activations."""

from typing import Any

import torch
from torch import Tensor

from logra_kernels.ops._library import register
from logra_kernels.ops._tokens import check_token_values, check_tokens, direct_gradients
from logra_kernels.ops.projected_gradients import (
    check_gradients,
    empty_gradients,
    native_gradients,
)


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


def _check(x: Tensor, dy: Tensor, *rest: Any) -> tuple[Any, ...]:
    """As `projected_gradients` takes them, with nothing to project."""
    return check_gradients(x, dy, None, None, *rest)


_call = register(
    "per_sample_gradients(Tensor x, Tensor dy, Tensor? mask=None, Tensor? cu_seqlens=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    check=_check,
    fake=empty_gradients,
    native=native_gradients,
    check_values=check_token_values,
    computed_as="projected_gradients",
)
