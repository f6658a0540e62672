"""Tokens of examples: dense [N, T] with a mask, or packed [T] with segments."""

from typing import Any

import torch
from torch import Tensor

from logra_kernels._checks import (
    FLOATS,
    INTEGERS,
    dtype_name,
    expect_dtype,
    expect_same_device,
    expect_shape,
    operand,
    plain,
)
from logra_kernels.ops._direct import dense, direct, kernels
from logra_kernels.ops._pointers import view

# What the ops take: x and dy [N, T, *], mask [N, T] and None; or packed x and dy [T, *], mask [T]
# and cu_seqlens [S+1].
Tokens = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def check_tokens(
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None,
    num_segments: int | None,
    out_dtype: torch.dtype | None,
) -> Tokens:
    expect_dtype("x", x, *FLOATS)
    expect_dtype("dy", dy, *FLOATS)
    if out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(
            f"out_dtype: expected float16, bfloat16, float32 or float64, "
            f"got {dtype_name(out_dtype)}"
        )
    if cu_seqlens is not None and segment_ids is not None:
        raise ValueError("segment_ids: expected None beside cu_seqlens, got both")
    if num_segments is not None and segment_ids is None:
        raise ValueError("num_segments: expected None without segment_ids")
    expect_same_device(x=x, dy=dy, mask=mask, cu_seqlens=cu_seqlens, segment_ids=segment_ids)

    if cu_seqlens is not None:
        expect_shape("x", x, T=None, I=None)
    elif x.dim() not in (2, 3):
        raise ValueError(f"x: expected [N, T, I], [N, I] or packed [T, I], got {list(x.shape)}")
    leading = dict(zip("NT" if x.dim() == 3 else "T", x.shape[:-1], strict=True))
    expect_shape("dy", dy, **leading, O=None)
    if mask is not None:
        if mask.dtype.is_complex:
            raise TypeError(f"mask: expected bool, integer or float, got {dtype_name(mask.dtype)}")
        expect_shape("mask", mask, **leading)

    x, dy = plain(x), plain(dy)
    if segment_ids is not None:
        segment_ids = operand("segment_ids", segment_ids, INTEGERS, **leading)
        return pack_segments(x, dy, mask, segment_ids, num_segments)
    if cu_seqlens is not None:
        cu_seqlens = operand("cu_seqlens", cu_seqlens, INTEGERS, **{"S+1": None})
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens: expected at least one entry, got none")
    elif x.dim() == 2:  # one token an example
        x, dy = x.unsqueeze(1), dy.unsqueeze(1)
        mask = None if mask is None else mask.unsqueeze(1)
    return x, dy, mask, cu_seqlens


def direct_gradients(
    x: Tensor, dy: Tensor, proj_in: Tensor | None, proj_out: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """G of tokens [N, T]; None for arguments that take the long way (`_direct`)."""
    if not direct(x, dy, proj_in, proj_out, mask) or not dense(x, 3) or not dense(dy, 3):
        return None
    num, tokens, ki = x.shape
    num_dy, tokens_dy, ko = dy.shape
    if num_dy != num or tokens_dy != tokens:
        return None
    in_view = out_view = None
    if proj_in is not None:
        if not dense(proj_in, 2) or proj_in.shape[1] != ki:
            return None
        ki, in_view = proj_in.shape[0], view(proj_in)
    if proj_out is not None:
        if not dense(proj_out, 2) or proj_out.shape[1] != ko:
            return None
        ko, out_view = proj_out.shape[0], view(proj_out)
    kept = 0
    if mask is not None:
        if mask.dtype is not torch.bool or mask.shape != x.shape[:2] or not mask.is_contiguous():
            return None
        kept = mask.data_ptr()
    out = x.new_empty((num, ko, ki), dtype=torch.float32)
    rows = (out.data_ptr(), 0, (num, ko, ki), (ko * ki, ki, 1))
    kernels().projected_gradients(view(x), view(dy), in_view, out_view, kept, 0, rows)
    return out


def pack_segments(
    x: Tensor, dy: Tensor, mask: Tensor | None, segment_ids: Tensor, num_segments: int | None
) -> Tokens:
    """Segment ids [T] or [N, T], -1 for no segment, as cu_seqlens over packed tokens."""
    ids = segment_ids.flatten()  # [T']
    x, dy = x.flatten(0, -2), dy.flatten(0, -2)  # [T', I], [T', O]
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.flatten()
    compiling = torch.compiler.is_compiling()
    if num_segments is None:
        if compiling:
            raise ValueError("num_segments: expected a number under torch.compile, got None")
        num_segments = int(ids.max()) + 1 if ids.numel() else 0
    if num_segments < 0:
        raise ValueError(f"num_segments: expected at least 0, got {num_segments}")
    if (
        not compiling
        and ids.numel()
        and not (int(ids.min()) >= -1 and int(ids.max()) < num_segments)
    ):
        raise ValueError(
            f"segment_ids: expected -1 to {num_segments - 1} (num_segments={num_segments}), "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    # A token of no segment joins the one before it, masked: so ids that only grow are sorted,
    # wherever the padding stands, and nothing is copied.
    mask = (mask != 0) & (ids >= 0)
    ids = ids.cummax(0).values if ids.numel() else ids
    if compiling or not bool((torch.where(mask, segment_ids.flatten(), ids) == ids).all()):
        ids = torch.where(mask, segment_ids.flatten(), -1)
        ids, order = ids.sort(stable=True)
        x, dy, mask = x[order], dy[order], mask[order]
    bounds = torch.arange(num_segments + 1, device=ids.device, dtype=ids.dtype)
    return x, dy, mask, torch.searchsorted(ids, bounds)


def check_token_values(*args: Any) -> tuple[Any, ...]:
    """Refuse a mask that is not 0 or 1 and segments out of range; the mask becomes bool.

    Called inside the ops with what their check returned, because tracing (torch.compile) sees no
    values. On a GPU the checks are asserts of the device, so that no launch waits for them.
    """
    *operands, mask, cu_seqlens, out_dtype = args
    if cu_seqlens is not None:
        x = operands[0] if isinstance(operands[0], Tensor) else operands[0][0]  # one of modules
        rising = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()  # a difference could wrap
        good = rising & (cu_seqlens[0] >= 0) & (cu_seqlens[-1] <= len(x))
        text = f"cu_seqlens: expected values that never fall, from 0 to {len(x)} at most"
        if cu_seqlens.is_cuda:
            torch._assert_async(good, text)
        elif not good:
            raise ValueError(f"{text}, got {cu_seqlens.tolist()[:16]}")
    if mask is not None and mask.dtype != torch.bool:
        given, mask = mask, mask != 0
        good = (given == mask).all()
        if mask.is_cuda:
            torch._assert_async(good, "mask: expected only 0 and 1")
        elif not good:
            value = given[given != mask][0].item()
            raise ValueError(f"mask: expected only 0 and 1, got {value}")
    return *operands, mask, cu_seqlens, out_dtype
