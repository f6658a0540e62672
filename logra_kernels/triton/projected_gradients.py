# mypy: allow-untyped-defs
# a kernel's arguments are Triton's values, which have no Python types
"""Projected per-sample gradients (LoGra Eq. 6) on a GPU, from raw activations in one kernel.

One program owns CHUNK tokens of one example (or packed segment) and one tile of its gradient. It
projects BLOCK tokens at a time into registers and adds their outer products, so the projected
activations never reach memory. An example longer than CHUNK gives several partial sums, which a
second kernel adds in their order: no atomics, the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton._common import (
    as_bytes,
    check,
    check_floating,
    check_precision,
    device_of,
    dot,
    is_half,
    last_axis_contiguous,
    tile,
)
from logra_kernels.triton.project import project

_CHUNK = 128  # tokens of one program: 64 programs for 16 examples of 512 tokens
_REDUCE = 1024  # elements of one program of the second kernel
_RECOMPUTE = 2  # times the same tokens may be projected


@triton.jit
def _segment(cu_seqlens, s, tokens):
    """First token and length of a packed segment, kept within the tokens there are."""
    begin = tl.load(cu_seqlens + s).to(tl.int32)
    end = tl.load(cu_seqlens + s + 1).to(tl.int32)
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    end = tl.minimum(tl.maximum(end, begin), tokens)
    return begin, end - begin


@triton.jit
def _segment_of_slot(cu_seqlens, slot, segments, CHUNK: tl.constexpr):
    """The last segment whose first slot is at or before this one.

    Segment s owns the slots from cu_seqlens[s] // CHUNK + s on: at least one, and enough for
    every CHUNK tokens it has, because floor(a + b) >= floor(a) + floor(b).
    """
    low = 0
    high = segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        first = tl.load(cu_seqlens + middle).to(tl.int32) // CHUNK + middle
        low = tl.where(first <= slot, middle, low)
        high = tl.where(first <= slot, high, middle - 1)
    return low


@triton.jit
def _side(
    values,  # pointers to the tokens [BLOCK]
    keep,  # [BLOCK]
    proj,
    width,
    k,  # [RANK], of the gradient's axis
    rank,
    proj_stride,
    PROJECTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    """One side of the outer product, [BLOCK, RANK]: tokens times P^T, or tokens as they are."""
    if PROJECTED:
        out = tl.zeros((BLOCK, RANK), dtype=tl.float32)
        proj_rows = proj + k.to(tl.int64) * proj_stride
        for start in range(0, width, WIDTH):
            i = start + tl.arange(0, WIDTH)
            token_tile = tl.load(  # [BLOCK, WIDTH]
                values[:, None] + i[None, :],
                mask=keep[:, None] & (i < width)[None, :],
                other=0.0,
            )
            proj_tile = tl.load(  # [WIDTH, RANK]
                proj_rows[None, :] + i[:, None],
                mask=(i < width)[:, None] & (k < rank)[None, :],
                other=0.0,
            )
            out = dot(token_tile, proj_tile, out, PRECISION)
    else:
        out = tl.load(
            values[:, None] + k[None, :], mask=keep[:, None] & (k < rank)[None, :], other=0.0
        )
    return out


@triton.jit
def _gradients_kernel(
    x,  # [N, T, I], or packed [T, I]
    dy,  # [N, T, O], or packed [T, O]
    proj_in,  # [Ki, I]
    proj_out,  # [Ko, O]
    mask,  # [N, T] or [T] uint8
    cu_seqlens,  # [S + 1]
    out,  # [S, Ko, Ki]
    partial,  # [slots, Ko, Ki] float32
    segments,  # S (N if not packed)
    tokens,  # T
    chunks,  # slots of one example, if not packed
    width_in,  # I
    width_out,  # O
    rank_in,  # Ki
    rank_out,  # Ko
    x_example,  # strides, in elements; those of an example are 0 if packed
    x_token,
    dy_example,
    dy_token,
    proj_in_stride,
    proj_out_stride,
    mask_example,
    mask_token,
    PROJECT_IN: tl.constexpr,
    PROJECT_OUT: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTER_PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK_IN: tl.constexpr,
    RANK_OUT: tl.constexpr,
):
    tiles_in = tl.cdiv(rank_in, RANK_IN)
    tiles = tiles_in * tl.cdiv(rank_out, RANK_OUT)
    slot = tl.program_id(0) // tiles
    o = ((tl.program_id(0) % tiles) // tiles_in) * RANK_OUT + tl.arange(0, RANK_OUT)
    i = ((tl.program_id(0) % tiles) % tiles_in) * RANK_IN + tl.arange(0, RANK_IN)

    if PACKED:
        segment = _segment_of_slot(cu_seqlens, slot, segments, CHUNK)
        begin, length = _segment(cu_seqlens, segment, tokens)
        chunk = slot - (begin // CHUNK + segment)
    else:
        segment = slot // chunks
        begin = 0
        length = tokens
        chunk = slot % chunks
    used = tl.maximum(tl.cdiv(length, CHUNK), 1)  # an empty segment still writes its zeros
    if chunk < 0 or chunk >= used:
        return

    example = segment.to(tl.int64)
    first = begin + chunk * CHUNK
    last = tl.minimum(first + CHUNK, begin + length)
    acc = tl.zeros((RANK_OUT, RANK_IN), dtype=tl.float32)
    for start in range(first, last, BLOCK):
        token = (start + tl.arange(0, BLOCK)).to(tl.int64)
        keep = token < last
        if MASKED:
            flags = mask + example * mask_example + token * mask_token
            # a masked token is never loaded, so it may hold NaN
            keep = tl.load(flags, mask=keep, other=0) != 0
        x_side = _side(
            x + example * x_example + token * x_token,
            keep,
            proj_in,
            width_in,
            i,
            rank_in,
            proj_in_stride,
            PROJECT_IN,
            PRECISION,
            BLOCK,
            WIDTH,
            RANK_IN,
        )
        dy_side = _side(
            dy + example * dy_example + token * dy_token,
            keep,
            proj_out,
            width_out,
            o,
            rank_out,
            proj_out_stride,
            PROJECT_OUT,
            PRECISION,
            BLOCK,
            WIDTH,
            RANK_OUT,
        )
        acc = dot(tl.trans(dy_side), x_side, acc, OUTER_PRECISION)

    inside = (o < rank_out)[:, None] & (i < rank_in)[None, :]
    elements = o.to(tl.int64)[:, None] * rank_in + i[None, :]
    size = tl.cast(rank_out, tl.int64) * rank_in
    if used == 1:
        tl.store(out + example * size + elements, acc, mask=inside)
    else:
        tl.store(partial + slot.to(tl.int64) * size + elements, acc, mask=inside)


@triton.jit
def _reduce_kernel(
    partial,  # [slots, size] float32
    cu_seqlens,  # [S + 1]
    out,  # [S, size]
    tokens,
    chunks,
    size,  # Ko * Ki
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    REDUCE: tl.constexpr,
):
    tiles = tl.cdiv(size, REDUCE)
    segment = tl.program_id(0) // tiles
    element = (tl.program_id(0) % tiles) * REDUCE + tl.arange(0, REDUCE)
    if PACKED:
        begin, length = _segment(cu_seqlens, segment, tokens)
        first = begin // CHUNK + segment
        used = tl.cdiv(length, CHUNK)
    else:
        first = segment * chunks
        used = chunks
    if used <= 1:  # the first kernel wrote the result
        return
    acc = tl.zeros((REDUCE,), dtype=tl.float32)
    for slot in range(first, first + used):
        at = partial + tl.cast(slot, tl.int64) * size + element
        acc += tl.load(at, mask=element < size, other=0.0)
    tl.store(out + segment.to(tl.int64) * size + element, acc, mask=element < size)


def _direct(tokens: Tensor, proj: Tensor | None) -> bool:
    """Whether tokens and their projection go to the tensor cores as they are."""
    return is_half(tokens) and (proj is None or proj.dtype == tokens.dtype)


def projected_gradients(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    input_precision: str = "ieee",
) -> Tensor:
    """x [N, T, I], dy [N, T, O], mask [N, T] -> [N, Ko, Ki].

    Packed: x [T, I], dy [T, O], mask [T], cu_seqlens [S + 1] -> [S, Ko, Ki].
    input_precision concerns products of two float32 operands: "ieee", "tf32" or "bf16x6". The outer
    products of projected activations take "bf16x6" unless x and dy are both float32.
    """
    check_floating(x=x, dy=dy, proj_in=proj_in, proj_out=proj_out)
    check(x=x, mask=mask, cu_seqlens=cu_seqlens)
    check_precision(input_precision)
    x, dy = last_axis_contiguous(x), last_axis_contiguous(dy)
    full = x.dtype == dy.dtype == torch.float32
    outer_precision = input_precision if full else "bf16x6"

    # operands that are split, or multiplied without tensor cores, or one side of them as loaded and
    # the other projected, fill the registers of larger tiles
    alike = (proj_in is None) == (proj_out is None)
    large = alike and _direct(x, proj_in) and _direct(dy, proj_out)
    largest = 64 if large else 32
    rank_in = x.shape[-1] if proj_in is None else proj_in.shape[0]
    rank_out = dy.shape[-1] if proj_out is None else proj_out.shape[0]
    tile_in, tile_out = tile(rank_in, largest), tile(rank_out, largest)
    tiles_in, tiles_out = triton.cdiv(rank_in, tile_in), triton.cdiv(rank_out, tile_out)
    # each tile of the gradient projects its tokens anew; where that is too often, project once
    if proj_in is not None and tiles_out > _RECOMPUTE:
        x, proj_in = project(x, proj_in, input_precision=input_precision), None
    if proj_out is not None and tiles_in > _RECOMPUTE:
        dy, proj_out = project(dy, proj_out, input_precision=input_precision), None
    if proj_in is not None:
        proj_in = last_axis_contiguous(proj_in)
    if proj_out is not None:
        proj_out = last_axis_contiguous(proj_out)

    block = 64 if large else 32
    if not large and proj_in is None and proj_out is None:
        block = 16  # every operand is split while it comes from memory

    packed = cu_seqlens is not None
    tokens = x.shape[-2]
    segments = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0]
    chunks = max(1, triton.cdiv(tokens, _CHUNK))
    slots = tokens // _CHUNK + segments if packed else segments * chunks
    dtype = out_dtype or torch.float32
    out = torch.empty(segments, rank_out, rank_in, device=x.device, dtype=dtype)
    if out.numel() == 0:
        return out
    partial = out
    if chunks > 1:
        partial = torch.empty(slots, rank_out, rank_in, device=x.device, dtype=torch.float32)
    flags = as_bytes(mask) if mask is not None else None

    with device_of(x):
        _gradients_kernel[(slots * tiles_in * tiles_out,)](
            x,
            dy,
            proj_in,
            proj_out,
            flags,
            cu_seqlens,
            out,
            partial,
            segments,
            tokens,
            chunks,
            x.shape[-1],
            dy.shape[-1],
            rank_in,
            rank_out,
            0 if packed else x.stride(0),
            x.stride(-2),
            0 if packed else dy.stride(0),
            dy.stride(-2),
            proj_in.stride(0) if proj_in is not None else 0,
            proj_out.stride(0) if proj_out is not None else 0,
            0 if packed or flags is None else flags.stride(0),
            flags.stride(-1) if flags is not None else 0,
            PROJECT_IN=proj_in is not None,
            PROJECT_OUT=proj_out is not None,
            MASKED=flags is not None,
            PACKED=packed,
            PRECISION=input_precision,
            OUTER_PRECISION=outer_precision,
            CHUNK=_CHUNK,
            BLOCK=block,
            WIDTH=64 if large else 16,
            RANK_IN=tile_in,
            RANK_OUT=tile_out,
            # the pieces of the outer products fill the registers of 4 warps
            num_warps=8 if large else 4,
            num_stages=3,
        )
        if chunks > 1:
            size = rank_out * rank_in
            _reduce_kernel[(segments * triton.cdiv(size, _REDUCE),)](
                partial,
                cu_seqlens,
                out,
                tokens,
                chunks,
                size,
                PACKED=packed,
                CHUNK=_CHUNK,
                REDUCE=_REDUCE,
                num_warps=4,
            )
    return out
