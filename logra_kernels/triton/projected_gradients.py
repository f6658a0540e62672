# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""Projected per-sample gradients (LoGra Eq. 6) on a GPU, from raw activations in one kernel.

One program owns CHUNK tokens of one example (or packed segment) and one tile of its gradient. It
projects BLOCK tokens at a time into registers and adds their outer products, so the projected
activations never reach memory. An example longer than CHUNK gives several partial sums, which a
second kernel adds in their order, without atomics, so the bits are the same each time. Modules of
one shape share a launch; the kernel finds their tensors by a table of addresses.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton.launch import (
    check,
    check_floating,
    choose,
    last_axis_contiguous,
    launch,
    tile,
)
from logra_kernels.triton.products import dot, dot_of_transposed, precision, types_of
from logra_kernels.triton.project import project

_RECOMPUTE = 2  # the most times that one token may be projected


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

    Segment s owns the slots from cu_seqlens[s] // CHUNK + s on. It has at least one slot, and one
    for every CHUNK tokens, because floor(a + b) >= floor(a) + floor(b).
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
def _place(slot, cu_seqlens, segments, tokens, chunks, CHUNK: tl.constexpr):
    """A slot's segment, the segment's first token and length, and which of its chunks it is."""
    if cu_seqlens is not None:
        segment = _segment_of_slot(cu_seqlens, slot, segments, CHUNK)
        begin, length = _segment(cu_seqlens, segment, tokens)
        chunk = slot - (begin // CHUNK + segment)
    else:
        segment = slot // chunks
        begin = 0
        length = tokens
        chunk = slot % chunks
    return segment, begin, length, chunk


@triton.jit
def _side(
    values,  # pointers to the tokens [BLOCK]
    keep,  # [BLOCK]
    proj,
    width,
    k,  # [RANK], positions on the gradient's axis
    rank,
    proj_stride,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    """One side of the outer product, [BLOCK, RANK]: tokens times P^T, or the tokens themselves."""
    if proj is not None:
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
    """The pointer to one module's tensor; like is the pointer to the first module's."""
    pointer = tl.load(addresses + module).to(like.dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


_COUNTS = ["modules", "segments", "slots", "tokens", "chunks"]


@triton.jit(do_not_specialize=[*_COUNTS, "mask_example", "mask_token"])
def _gradients_kernel(
    x,  # [N, T, I], or packed [T, I]; that of the first of several modules
    dy,  # [N, T, O], or packed [T, O]
    proj_in,  # [Ki, I]; None for tokens that are not projected
    proj_out,  # [Ko, O], likewise
    mask,  # [N, T] or [T] uint8, or None
    cu_seqlens,  # [S + 1]; None if not packed
    addresses,  # [4, modules] int64: x, dy, proj_in, proj_out of each; None for one module
    out,  # [modules, S, Ko, Ki]
    partial,  # [modules, slots, Ko, Ki] float32
    positions,  # [Ko, Ki] int32: where a row of out or partial has an element, or -1; None: all
    scale,  # [n] float32, of the elements of a row; None: 1
    row_size,  # n; None for all elements
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
    ALIGNED: tl.constexpr,  # every address to 16 bytes
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
    # The tiles of one chunk run next to each other, while its tokens are in the L2 cache.
    slot = tl.program_id(0) // tiles
    o = ((tl.program_id(0) % tiles) // tiles_in) * RANK_OUT + tl.arange(0, RANK_OUT)
    i = ((tl.program_id(0) % tiles) % tiles_in) * RANK_IN + tl.arange(0, RANK_IN)
    if positions is not None:
        size = tl.cast(row_size, tl.int64)
        # A tile in which the row has no element is not computed.
        in_tile = (o < rank_out)[:, None] & (i < rank_in)[None, :]
        places = positions + o.to(tl.int64)[:, None] * rank_in + i[None, :]
        first_positions = tl.load(places, mask=in_tile, other=-1)
        if tl.max(tl.max(first_positions, 1), 0) < 0:
            return
    else:
        size = tl.cast(rank_out, tl.int64) * rank_in
    if addresses is not None:
        module = slot // slots
        slot = slot % slots
        x = _of_module(x, addresses, module, ALIGNED)
        dy = _of_module(dy, addresses + modules, module, ALIGNED)
        if proj_in is not None:
            proj_in = _of_module(proj_in, addresses + 2 * modules, module, ALIGNED)
        if proj_out is not None:
            proj_out = _of_module(proj_out, addresses + 3 * modules, module, ALIGNED)
        out += module.to(tl.int64) * segments * size
        partial += module.to(tl.int64) * slots * size

    segment, begin, length, chunk = _place(slot, cu_seqlens, segments, tokens, chunks, CHUNK)
    used = tl.maximum(tl.cdiv(length, CHUNK), 1)  # an empty segment has to write its zeros
    if chunk < 0 or chunk >= used:
        return

    # Tokens are counted from the segment's first: so packed and dense compile to the same code.
    example = segment.to(tl.int64)
    x += example * x_example + tl.cast(begin, tl.int64) * x_token
    dy += example * dy_example + tl.cast(begin, tl.int64) * dy_token
    if mask is not None:
        mask += example * mask_example + tl.cast(begin, tl.int64) * mask_token
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, length)
    acc = tl.zeros((RANK_OUT, RANK_IN), dtype=tl.float32)
    for start in range(first, last, BLOCK):
        token = (start + tl.arange(0, BLOCK)).to(tl.int64)
        keep = token < last
        if mask is not None:
            # A masked token is never loaded, so it may hold NaN.
            keep = tl.load(mask + token * mask_token, mask=keep, other=0) != 0
        x_side = _side(
            x + token * x_token,
            keep,
            proj_in,
            width_in,
            i,
            rank_in,
            proj_in_stride,
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
            PRECISION,
            BLOCK,
            WIDTH,
            RANK_OUT,
        )
        acc = dot_of_transposed(dy_side, x_side, acc, OUTER_PRECISION)

    # Not sooner: what is alive in the loop costs registers.
    inside = (o < rank_out)[:, None] & (i < rank_in)[None, :]
    elements = o.to(tl.int64)[:, None] * rank_in + i[None, :]
    if positions is not None:
        elements = tl.load(positions + elements, mask=inside, other=-1)
        inside = elements >= 0
        if scale is not None:
            acc *= tl.load(scale + elements, mask=inside, other=0.0)
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
    CHUNK: tl.constexpr,
    REDUCE: tl.constexpr,
):
    tiles = tl.cdiv(size, REDUCE)
    segment = (tl.program_id(0) // tiles) % segments
    module = ((tl.program_id(0) // tiles) // segments).to(tl.int64)
    partial += module * slots * size
    out += module * segments * size
    element = (tl.program_id(0) % tiles) * REDUCE + tl.arange(0, REDUCE)
    if cu_seqlens is not None:
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


class Side(NamedTuple):
    """One side of the outer products of M modules whose tensors are alike in shape and type."""

    tokens: Sequence[Tensor]  # M of [N, T, I], or packed [T, I]
    projs: Sequence[Tensor]  # M of [K, I], or none: the tokens are not projected

    @property
    def rank(self) -> int:
        """The extent of the gradient's axis."""
        return self.projs[0].shape[0] if self.projs else self.tokens[0].shape[-1]

    def of_modules(self, modules: slice) -> "Side":
        """The side of some of the modules."""
        return Side(self.tokens[modules], self.projs[modules])

    def contiguous(self) -> "Side":
        """With a last axis that the kernel can read."""
        return Side(*([last_axis_contiguous(t) for t in tensors] for tensors in self))

    def projected(self, input_precision: str) -> "Side":
        """The side with every module's tokens projected, so that no projection is left."""
        pairs = zip(self.tokens, self.projs, strict=True)
        return Side([project(t, p, input_precision=input_precision) for t, p in pairs], [])

    def arguments(self, tokens: str, axis: str, packed: bool) -> dict[str, Any]:
        """The kernel's arguments of one side: tokens "x" and axis "in", or "dy" and "out"."""
        first, proj = self.tokens[0], self.projs[0] if self.projs else None
        return {
            tokens: first,
            f"proj_{axis}": proj,
            f"width_{axis}": first.shape[-1],
            f"rank_{axis}": self.rank,
            f"{tokens}_example": 0 if packed else first.stride(0),
            f"{tokens}_token": first.stride(-2),
            f"proj_{axis}_stride": proj.stride(0) if proj is not None else 0,
        }


class Chosen(NamedTuple):
    """Which elements of a gradient a row holds, and how it scales them."""

    positions: Tensor  # [Ko, Ki] int32: an element's place in the row, or -1
    scale: Tensor | None  # [n] float32

    @classmethod
    def of(cls, coordinates: Tensor, scale: Tensor | None, rank_out: int, rank_in: int) -> "Chosen":
        """From places in vec(G), which differ; without waiting for their device."""
        device, count = coordinates.device, coordinates.shape[0]
        positions = torch.full((rank_out * rank_in,), -1, dtype=torch.int32, device=device)
        positions[coordinates] = torch.arange(count, dtype=torch.int32, device=device)
        return cls(positions, scale)


class Examples(NamedTuple):
    """Which tokens count, and where packed segments begin and end."""

    mask: Tensor | None  # [N, T] or packed [T] uint8: 0 for a token that does not count
    cu_seqlens: Tensor | None  # [S + 1]; None if each example has a row of tokens

    @classmethod
    def of(cls, mask: Tensor | None, cu_seqlens: Tensor | None) -> "Examples":
        """From a mask of any type."""
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask != 0).view(torch.uint8)
        return cls(mask, cu_seqlens)

    def num(self, tokens: Tensor) -> int:
        """How many gradients these tokens give a module."""
        return tokens.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments that say which tokens an example has."""
        mask, packed = self
        return {
            "mask": mask,
            "mask_example": 0 if mask is None or packed is not None else mask.stride(0),
            "mask_token": 0 if mask is None else mask.stride(-1),
            "cu_seqlens": packed,
        }


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
    x_side = Side([x], [] if proj_in is None else [proj_in])
    dy_side = Side([dy], [] if proj_out is None else [proj_out])
    examples = Examples.of(mask, cu_seqlens)
    return gradients_of_modules(x_side, dy_side, examples, out_dtype, input_precision)[0]


def gradients_of_modules(
    x: Side,
    dy: Side,
    examples: Examples,
    out_dtype: torch.dtype | None,
    input_precision: str | None,
) -> Tensor:
    """[M, S, Ko, Ki]. Modules in a row whose tensors have the same strides share a launch."""
    how = precision(input_precision)
    shape = len(x.tokens), examples.num(x.tokens[0]), dy.rank, x.rank
    out = torch.empty(shape, device=x.tokens[0].device, dtype=out_dtype or torch.float32)
    if out.numel() > 0:
        x, dy = x.contiguous(), dy.contiguous()
        for modules in _alike(x, dy):
            sides = x.of_modules(modules), dy.of_modules(modules)
            write_gradients(*sides, examples, out[modules], how)
    return out


def _alike(x: Side, dy: Side) -> Iterator[slice]:
    """Runs of modules whose tensors have equal shapes, types, strides and alignment."""

    def key(module: int) -> Any:
        tensors = [tensors[module] for side in (x, dy) for tensors in side if tensors]
        described = [(t.dtype, t.shape, t.stride()) for t in tensors]
        return described, all(_is_aligned(t) for t in tensors)

    for _, run in groupby(range(len(x.tokens)), key):
        members = list(run)
        yield slice(members[0], members[-1] + 1)


def write_gradients(
    x: Side,
    dy: Side,
    examples: Examples,
    out: Tensor,
    input_precision: str,
    chosen: Chosen | None = None,
) -> None:
    """The gradients [M, S, Ko, Ki] of modules that are alike, in one launch or two.

    With `chosen`, out is [1, S, n], and there is one module.
    """
    both_full = x.tokens[0].dtype == dy.tokens[0].dtype == torch.float32
    outer_precision = input_precision if both_full else "bf16x6"
    precisions = input_precision, outer_precision
    config = _configuration(x, dy, *precisions)
    chunk = config["CHUNK"]  # that of the whole computation, whatever the kernel is left to do
    x, dy = _projected_first(x, dy, config, input_precision)
    config = _configuration(x, dy, *precisions)
    del config["CHUNK"]

    packed = examples.cu_seqlens is not None
    shared = _chunks(x.tokens[0].shape[-2], chunk, packed, out)
    launch(
        _gradients_kernel,
        ("modules", "slots", ("rank_out", "RANK_OUT"), ("rank_in", "RANK_IN")),
        out,
        config,
        **x.arguments("x", "in", packed),
        **dy.arguments("dy", "out", packed),
        **examples.arguments(),
        **shared,
        addresses=_addresses(x, dy) if len(out) > 1 else None,
        positions=None if chosen is None else chosen.positions,
        scale=None if chosen is None else chosen.scale,
        row_size=None if chosen is None else out.shape[2],
        ALIGNED=all(_is_aligned(t) for side in (x, dy) for tensors in side for t in tensors),
        PRECISION=input_precision,
        OUTER_PRECISION=outer_precision,
    )
    if shared["chunks"] > 1:
        launch(
            _reduce_kernel,
            ("modules", "segments", ("size", "REDUCE")),
            out,
            choose("reduce_gradients", "half", out),
            **shared,
            cu_seqlens=examples.cu_seqlens,
            size=out.shape[2:].numel(),
        )


def _chunks(tokens: int, chunk: int, packed: bool, out: Tensor) -> dict[str, Any]:
    """Both kernels' arguments: how the tokens are cut into chunks, and where their sums go.

    A slot is a place for the sum of one chunk. Where no example has two, out takes the sums.
    """
    modules, segments = out.shape[:2]
    chunks = max(1, triton.cdiv(tokens, chunk))
    slots = tokens // chunk + segments if packed else segments * chunks
    partial = out
    if chunks > 1:
        shape = modules, slots, *out.shape[2:]
        partial = torch.empty(shape, device=out.device, dtype=torch.float32)
    return {
        "out": out,
        "partial": partial,
        "modules": modules,
        "segments": segments,
        "slots": slots,
        "tokens": tokens,
        "chunks": chunks,
        "CHUNK": chunk,
    }


def _configuration(x: Side, dy: Side, input_precision: str, outer_precision: str) -> dict[str, int]:
    """The table's tiles, by what is projected and by the types of the products with tokens."""
    pairs = [(side.tokens[0], side.projs[0]) for side in (x, dy) if side.projs]
    op = ("per_sample_gradients", "one_sided_gradients", "projected_gradients")[len(pairs)]
    kinds = {types_of(*pair, input_precision) for pair in pairs}
    if not pairs:
        kinds = {types_of(x.tokens[0], dy.tokens[0], outer_precision)}
    types = kinds.pop() if len(kinds) == 1 else "split"
    config = choose(op, types, x.tokens[0], rank=max(x.rank, dy.rank))
    largest = config.pop("RANK")
    config.setdefault("WIDTH", 16)  # the table has none where nothing is projected
    return config | {"RANK_IN": tile(x.rank, largest), "RANK_OUT": tile(dy.rank, largest)}


def _projected_first(
    x: Side, dy: Side, config: dict[str, int], input_precision: str
) -> tuple[Side, Side]:
    """Project a side in a launch of its own if the kernel would project its tokens too often.

    The kernel projects the tokens of a side anew for every tile of the other side's axis.
    """
    tiles_in = triton.cdiv(x.rank, config["RANK_IN"])
    tiles_out = triton.cdiv(dy.rank, config["RANK_OUT"])
    if x.projs and tiles_out > _RECOMPUTE:
        x = x.projected(input_precision)
    if dy.projs and tiles_in > _RECOMPUTE:
        dy = dy.projected(input_precision)
    return x, dy


def _addresses(x: Side, dy: Side) -> Tensor:
    """[4, M] int64, of x, dy, proj_in and proj_out, on their device, without waiting for it."""
    sides = x.tokens, dy.tokens, x.projs, dy.projs
    rows = [[t.data_ptr() for t in side] or [0] * len(x.tokens) for side in sides]
    device = x.tokens[0].device
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0
