# mypy: allow-untyped-defs
# a kernel's arguments are Triton's values, which have no Python types
"""Projected per-sample gradients (LoGra Eq. 6) on a GPU, from raw activations in one kernel.

One program owns CHUNK tokens of one example (or packed segment) and one tile of its gradient. It
projects BLOCK tokens at a time into registers and adds their outer products, so the projected
activations never reach memory. An example longer than CHUNK gives several partial sums, which a
second kernel adds in their order: no atomics, the same bits each time. Modules of one shape share a
launch: the kernel finds their tensors by a table of addresses.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton._common import (
    as_bytes,
    check,
    check_floating,
    dot,
    dot_of_transposed,
    last_axis_contiguous,
    precision,
    tile,
    types_of,
)
from logra_kernels.triton._launch import choose, launch
from logra_kernels.triton.project import project

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
def _of_module(like, addresses, module, ALIGNED: tl.constexpr):
    """The pointer of one module, of the type of the first module's."""
    pointer = tl.load(addresses + module).to(like.dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


_COUNTS = ["modules", "segments", "slots", "tokens", "chunks"]


@triton.jit(do_not_specialize=[*_COUNTS, "mask_example", "mask_token"])
def _gradients_kernel(
    x,  # [N, T, I], or packed [T, I]; of the first module, if GROUPED
    dy,  # [N, T, O], or packed [T, O]
    proj_in,  # [Ki, I]
    proj_out,  # [Ko, O]
    mask,  # [N, T] or [T] uint8
    cu_seqlens,  # [S + 1]
    addresses,  # [4, modules] int64: x, dy, proj_in, proj_out of each
    out,  # [modules, S, Ko, Ki]
    partial,  # [modules, slots, Ko, Ki] float32
    modules,
    segments,  # S (N if not packed)
    slots,  # chunks of tokens of all segments
    tokens,  # T
    chunks,  # slots of one example, if not packed
    width_in,  # I
    width_out,  # O
    rank_in,  # Ki
    rank_out,  # Ko
    x_example: tl.int64,  # strides, in elements; those of an example are 0 if packed
    x_token: tl.int64,
    dy_example: tl.int64,
    dy_token: tl.int64,
    proj_in_stride: tl.int64,
    proj_out_stride: tl.int64,
    mask_example: tl.int64,
    mask_token: tl.int64,
    GROUPED: tl.constexpr,
    ALIGNED: tl.constexpr,  # every address to 16 bytes
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
    # the tiles of one chunk run next to each other, while its tokens are in the L2 cache
    slot = tl.program_id(0) // tiles
    o = ((tl.program_id(0) % tiles) // tiles_in) * RANK_OUT + tl.arange(0, RANK_OUT)
    i = ((tl.program_id(0) % tiles) % tiles_in) * RANK_IN + tl.arange(0, RANK_IN)
    size = tl.cast(rank_out, tl.int64) * rank_in
    if GROUPED:
        module = slot // slots
        slot = slot % slots
        x = _of_module(x, addresses, module, ALIGNED)
        dy = _of_module(dy, addresses + modules, module, ALIGNED)
        if PROJECT_IN:
            proj_in = _of_module(proj_in, addresses + 2 * modules, module, ALIGNED)
        if PROJECT_OUT:
            proj_out = _of_module(proj_out, addresses + 3 * modules, module, ALIGNED)
        out += module.to(tl.int64) * segments * size
        partial += module.to(tl.int64) * slots * size

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

    # tokens are counted from the segment's own first, so that packed and dense compile alike
    example = segment.to(tl.int64)
    x += example * x_example + tl.cast(begin, tl.int64) * x_token
    dy += example * dy_example + tl.cast(begin, tl.int64) * dy_token
    if MASKED:
        mask += example * mask_example + tl.cast(begin, tl.int64) * mask_token
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, length)
    acc = tl.zeros((RANK_OUT, RANK_IN), dtype=tl.float32)
    for start in range(first, last, BLOCK):
        token = (start + tl.arange(0, BLOCK)).to(tl.int64)
        keep = token < last
        if MASKED:
            # a masked token is never loaded, so it may hold NaN
            keep = tl.load(mask + token * mask_token, mask=keep, other=0) != 0
        x_side = _side(
            x + token * x_token,
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
            dy + token * dy_token,
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
        acc = dot_of_transposed(dy_side, x_side, acc, OUTER_PRECISION)

    inside = (o < rank_out)[:, None] & (i < rank_in)[None, :]
    elements = o.to(tl.int64)[:, None] * rank_in + i[None, :]
    if used == 1:
        tl.store(out + example * size + elements, acc, mask=inside)
    else:
        tl.store(partial + slot.to(tl.int64) * size + elements, acc, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def _reduce_kernel(
    partial,  # [modules, slots, size] float32
    cu_seqlens,  # [S + 1]
    out,  # [modules, S, size]
    modules,
    segments,
    slots,
    tokens,
    chunks,
    size,  # Ko * Ki
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    REDUCE: tl.constexpr,
):
    tiles = tl.cdiv(size, REDUCE)
    segment = (tl.program_id(0) // tiles) % segments
    module = ((tl.program_id(0) // tiles) // segments).to(tl.int64)
    partial += module * slots * size
    out += module * segments * size
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


def projected_gradients(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    input_precision: str | None = None,
) -> Tensor:
    """x [N, T, I], dy [N, T, O], mask [N, T] -> [N, Ko, Ki].

    Packed: x [T, I], dy [T, O], mask [T], cu_seqlens [S + 1] -> [S, Ko, Ki].
    input_precision concerns products of two float32 operands: "ieee", "tf32" or "bf16x6"; None is
    torch's. The outer products of projected activations take "bf16x6" unless x and dy are both
    float32.
    """
    check_floating(x=x, dy=dy, proj_in=proj_in, proj_out=proj_out)
    check(x=x, mask=mask, cu_seqlens=cu_seqlens)
    rank_in = x.shape[-1] if proj_in is None else proj_in.shape[0]
    rank_out = dy.shape[-1] if proj_out is None else proj_out.shape[0]
    num = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = out_dtype or torch.float32
    out = torch.empty(1, num, rank_out, rank_in, device=x.device, dtype=dtype)
    sides = [x], [dy], [proj_in], [proj_out]
    gradients_of_modules(*sides, mask, cu_seqlens, out, precision(input_precision))
    return out[0]


def gradients_of_modules(
    xs: Sequence[Tensor],
    dys: Sequence[Tensor],
    projs_in: Sequence[Tensor | None],
    projs_out: Sequence[Tensor | None],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,  # [M, S, Ko, Ki]
    input_precision: str,
) -> None:
    """The same for M modules of equal shapes, types and strides, in one launch (or two)."""
    segments, rank_out, rank_in = out.shape[1:]
    if out.numel() == 0:
        return
    xs, dys = [last_axis_contiguous(x) for x in xs], [last_axis_contiguous(dy) for dy in dys]
    both_full = xs[0].dtype == dys[0].dtype == torch.float32
    outer_precision = input_precision if both_full else "bf16x6"
    precisions = input_precision, outer_precision
    config = _configuration(xs[0], dys[0], projs_in[0], projs_out[0], out, *precisions)
    tiles_in = triton.cdiv(rank_in, config["RANK_IN"])
    tiles_out = triton.cdiv(rank_out, config["RANK_OUT"])
    # each tile of the gradient projects its tokens anew; where that is too often, project once
    if projs_in[0] is not None and tiles_out > _RECOMPUTE:
        xs, projs_in = _projected(xs, projs_in, input_precision), [None] * len(xs)
    if projs_out[0] is not None and tiles_in > _RECOMPUTE:
        dys, projs_out = _projected(dys, projs_out, input_precision), [None] * len(dys)
    if projs_in[0] is None or projs_out[0] is None:
        chunk = config["CHUNK"]  # of the whole computation, whatever is left to the kernel
        config = _configuration(xs[0], dys[0], projs_in[0], projs_out[0], out, *precisions)
        config["CHUNK"] = chunk
    projs_in = [None if p is None else last_axis_contiguous(p) for p in projs_in]
    projs_out = [None if p is None else last_axis_contiguous(p) for p in projs_out]

    x, dy, proj_in, proj_out = xs[0], dys[0], projs_in[0], projs_out[0]
    grouped = len(xs) > 1
    packed = cu_seqlens is not None
    tokens = x.shape[-2]
    chunks = max(1, triton.cdiv(tokens, config["CHUNK"]))
    slots = tokens // config["CHUNK"] + segments if packed else segments * chunks
    partial = out
    if chunks > 1:
        shape = len(xs), slots, rank_out, rank_in
        partial = torch.empty(shape, device=x.device, dtype=torch.float32)
    flags = as_bytes(mask) if mask is not None else None
    launch(
        _gradients_kernel,
        "modules * slots * cdiv(rank_out, RANK_OUT) * cdiv(rank_in, RANK_IN)",
        x,
        config,
        x=x,
        dy=dy,
        proj_in=proj_in,
        proj_out=proj_out,
        mask=flags,
        cu_seqlens=cu_seqlens,
        addresses=_addresses(xs, dys, projs_in, projs_out) if grouped else None,
        out=out,
        partial=partial,
        modules=len(xs),
        segments=segments,
        slots=slots,
        tokens=tokens,
        chunks=chunks,
        width_in=x.shape[-1],
        width_out=dy.shape[-1],
        rank_in=rank_in,
        rank_out=rank_out,
        x_example=0 if packed else x.stride(0),
        x_token=x.stride(-2),
        dy_example=0 if packed else dy.stride(0),
        dy_token=dy.stride(-2),
        proj_in_stride=proj_in.stride(0) if proj_in is not None else 0,
        proj_out_stride=proj_out.stride(0) if proj_out is not None else 0,
        mask_example=0 if packed or flags is None else flags.stride(0),
        mask_token=flags.stride(-1) if flags is not None else 0,
        GROUPED=grouped,
        ALIGNED=all(is_aligned(t) for t in (*xs, *dys, *projs_in, *projs_out)),
        PROJECT_IN=proj_in is not None,
        PROJECT_OUT=proj_out is not None,
        MASKED=flags is not None,
        PACKED=packed,
        PRECISION=input_precision,
        OUTER_PRECISION=outer_precision,
    )
    if chunks > 1:
        launch(
            _reduce_kernel,
            "modules * segments * cdiv(size, REDUCE)",
            x,
            choose("reduce_gradients", "half", x),
            partial=partial,
            cu_seqlens=cu_seqlens,
            out=out,
            modules=len(xs),
            segments=segments,
            slots=slots,
            tokens=tokens,
            chunks=chunks,
            size=rank_out * rank_in,
            PACKED=packed,
            CHUNK=config["CHUNK"],
        )


def _configuration(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    out: Tensor,
    input_precision: str,
    outer_precision: str,
) -> dict[str, int]:
    """The table's tiles, by what is projected and by the types of the products with tokens."""
    pairs = [(t, p) for t, p in ((x, proj_in), (dy, proj_out)) if p is not None]
    op = ("per_sample_gradients", "one_sided_gradients", "projected_gradients")[len(pairs)]
    kinds = {types_of(*pair, input_precision) for pair in pairs}
    if not pairs:
        kinds = {types_of(x, dy, outer_precision)}
    types = kinds.pop() if len(kinds) == 1 else "split"
    rank_out, rank_in = out.shape[2:]
    config = choose(op, types, x, rank=max(rank_in, rank_out))
    largest = config.pop("RANK")
    config.setdefault("WIDTH", 16)  # nothing is projected
    return config | {"RANK_IN": tile(rank_in, largest), "RANK_OUT": tile(rank_out, largest)}


def _projected(
    tokens: Sequence[Tensor], projs: Sequence[Tensor | None], input_precision: str
) -> list[Tensor]:
    return [
        project(t, p, input_precision=input_precision)
        for t, p in zip(tokens, projs, strict=True)
        if p is not None
    ]


def _addresses(*sides: Sequence[Tensor | None]) -> Tensor:
    """[sides, M] int64 on the tensors' device, without waiting for it."""
    rows = [[0 if t is None else t.data_ptr() for t in side] for side in sides]
    device = next(t.device for t in sides[0] if t is not None)
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def is_aligned(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.data_ptr() % 16 == 0
