# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""cov += rows^T rows on a GPU, on the tiles of the lower triangle only.

The rows are summed in float32 over spans of SPAN rows, and the spans' sums are added to cov, in
cov's type and in their order. One program sums all spans of a tile. Where that gives too few
programs, or where cov is float64 (a tile of which fills the registers), each span of a tile has a
program, which writes its sum to memory; a second kernel adds these in the same order, which gives
the same bits.
"""

from typing import Any

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
from logra_kernels.triton.products import dot, precision, types_of

_SPAN = 2048  # rows of one float32 sum
_ENOUGH_TILES = 256  # about two programs for each of an H100's 132 multiprocessors
_WORKSPACE_BYTES = 64 << 20


@triton.jit
def _lower_tile(index):
    """Row and column of the index-th tile of the lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded. Step to the row for which row * (row + 1) / 2 <= index < the next row's.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit(do_not_specialize=["count", "tiles", "spans"])
def _covariance_kernel(
    cov,  # [K, K]
    rows,  # [R, K]
    partial,  # [spans, tiles, TILE, TILE] float32
    count,  # R
    size,  # K
    cov_row: tl.int64,
    cov_column,
    rows_stride: tl.int64,
    tiles,
    spans,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0) % tiles
    tile_row, tile_column = _lower_tile(index)
    i = tile_row * TILE + tl.arange(0, TILE)
    j = tile_column * TILE + tl.arange(0, TILE)
    if SPLIT:
        first_span = tl.program_id(0) // tiles
        last_span = first_span + 1
    else:
        first_span = 0
        last_span = spans
    for span in range(first_span, last_span):
        acc = tl.zeros((TILE, TILE), dtype=tl.float32)
        begin = span * SPAN
        end = tl.minimum(begin + SPAN, count)
        for start in range(begin, end, BLOCK):
            r = (start + tl.arange(0, BLOCK)).to(tl.int64)
            left = tl.load(  # [TILE, BLOCK]
                rows + r[None, :] * rows_stride + i[:, None],
                mask=(r < end)[None, :] & (i < size)[:, None],
                other=0.0,
            )
            right = tl.load(  # [BLOCK, TILE]
                rows + r[:, None] * rows_stride + j[None, :],
                mask=(r < end)[:, None] & (j < size)[None, :],
                other=0.0,
            )
            acc = dot(left, right, acc, PRECISION)
        if SPLIT:
            inner = tl.arange(0, TILE)
            tl.store(
                partial
                + (span * tiles + index).to(tl.int64) * TILE * TILE
                + inner[:, None] * TILE
                + inner[None, :],
                acc,
            )
        else:
            at = cov + i.to(tl.int64)[:, None] * cov_row + j.to(tl.int64)[None, :] * cov_column
            lower = (i[:, None] >= j[None, :]) & (i < size)[:, None]
            old = tl.load(at, mask=lower, other=0.0)
            tl.store(at, old + acc, mask=lower)


@triton.jit(do_not_specialize=["tiles", "spans"])
def _add_kernel(
    cov,
    partial,
    size,
    cov_row: tl.int64,
    cov_column,
    tiles,
    spans,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the spans' sums to ROWS rows of one tile of cov."""
    PROGRAMS: tl.constexpr = TILE // ROWS
    index = tl.program_id(0) // PROGRAMS
    tile_row, tile_column = _lower_tile(index)
    inner_row = (tl.program_id(0) % PROGRAMS) * ROWS + tl.arange(0, ROWS)
    inner_column = tl.arange(0, TILE)
    i = tile_row * TILE + inner_row
    j = tile_column * TILE + inner_column
    at = cov + i.to(tl.int64)[:, None] * cov_row + j.to(tl.int64)[None, :] * cov_column
    lower = (i[:, None] >= j[None, :]) & (i < size)[:, None]
    value = tl.load(at, mask=lower, other=0.0)
    for span in range(spans):
        values = tl.load(
            partial
            + (tl.cast(span, tl.int64) * tiles + index) * TILE * TILE
            + inner_row[:, None] * TILE
            + inner_column[None, :]
        )
        value += values.to(value.dtype)
    tl.store(at, value, mask=lower)


def covariance_update_(cov: Tensor, rows: Tensor, *, input_precision: str | None = None) -> None:
    """cov [K, K] float32 or float64, in place; rows [R, K]. The strict upper triangle stays.

    input_precision concerns float32 rows only: "ieee", "tf32" or "bf16x6"; None is torch's.
    """
    check(cov=cov, rows=rows)
    check_floating(rows=rows)
    input_precision = precision(input_precision)
    if cov.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cov: expected float32 or float64, got {str(cov.dtype)[6:]}")
    rows = last_axis_contiguous(rows)
    count, size = rows.shape
    if count == 0 or size == 0:
        return
    config = choose("covariance_update_", types_of(rows, rows, input_precision), rows)
    edge = config["TILE"] = tile(size, config["TILE"])
    if edge < 128:
        config["num_warps"] = min(4, config["num_warps"])
    tiles_a_side = triton.cdiv(size, edge)
    tiles = tiles_a_side * (tiles_a_side + 1) // 2
    spans_at_once = min(triton.cdiv(count, _SPAN), _WORKSPACE_BYTES // (tiles * edge * edge * 4))
    split = cov.dtype == torch.float64 or (tiles < _ENOUGH_TILES and spans_at_once > 1)
    spans_at_once = max(spans_at_once, 1)
    partial = None
    if split:
        shape = spans_at_once, tiles, edge, edge
        partial = torch.empty(shape, device=cov.device, dtype=torch.float32)
    shared: dict[str, Any] = {  # by both kernels
        "cov": cov,
        "partial": partial,
        "size": size,
        "cov_row": cov.stride(0),
        "cov_column": cov.stride(1),
        "tiles": tiles,
    }
    for some in rows.split(spans_at_once * _SPAN if split else count):
        shared["spans"] = triton.cdiv(some.shape[0], _SPAN)
        launch(
            _covariance_kernel,
            ("tiles", "spans") if split else ("tiles",),
            cov,
            config,
            rows=some,
            count=some.shape[0],
            rows_stride=rows.stride(0),
            SPLIT=split,
            PRECISION=input_precision,
            SPAN=_SPAN,
            **shared,
        )
        if split:
            adding = choose("add_covariances", "half", rows)
            launch(_add_kernel, ("tiles", ("TILE", "ROWS")), cov, adding, TILE=edge, **shared)
