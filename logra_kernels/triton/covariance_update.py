# mypy: allow-untyped-defs
# a kernel's arguments are Triton's values, which have no Python types
"""cov += rows^T rows on a GPU, on the tiles of the lower triangle only.

The rows are summed in float32 over spans of SPAN rows, and the spans' sums are added to cov, in
cov's type and in their order. One program does all spans of a tile; where that gives too few
programs, or cov is float64 (a tile of which fills the registers), the spans are computed side by
side into memory and added afterwards, in the same order: the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton._common import (
    check,
    check_floating,
    dot,
    last_axis_contiguous,
    precision,
    tile,
    types_of,
)
from logra_kernels.triton._launch import choose, launch

_SPAN = 2048  # rows of one float32 sum
_ENOUGH_TILES = 256  # about two programs for each of an H100's 132 multiprocessors
_WORKSPACE_BYTES = 64 << 20


@triton.jit
def _lower_tile(index):
    """Row and column of the index-th tile of the lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the root is rounded: step to the row with row * (row + 1) / 2 <= index < the next row's
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
    STRIP: tl.constexpr,
):
    """Add the spans' sums to STRIP rows of one tile of cov."""
    strips: tl.constexpr = TILE // STRIP
    index = tl.program_id(0) // strips
    tile_row, tile_column = _lower_tile(index)
    inner_row = (tl.program_id(0) % strips) * STRIP + tl.arange(0, STRIP)
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
    # spans computed side by side
    at_once = min(triton.cdiv(count, _SPAN), _WORKSPACE_BYTES // (tiles * edge * edge * 4))
    split = cov.dtype == torch.float64 or (tiles < _ENOUGH_TILES and at_once > 1)
    at_once = max(at_once, 1)
    partial = None
    if split:
        partial = torch.empty(at_once, tiles, edge, edge, device=cov.device, dtype=torch.float32)
    adding = choose("add_covariances", "half", rows)
    for first in range(0, count, at_once * _SPAN if split else count):
        some = rows[first : first + at_once * _SPAN] if split else rows
        spans = triton.cdiv(some.shape[0], _SPAN)
        launch(
            _covariance_kernel,
            "tiles * spans" if split else "tiles",
            cov,
            config,
            cov=cov,
            rows=some,
            partial=partial,
            count=some.shape[0],
            size=size,
            cov_row=cov.stride(0),
            cov_column=cov.stride(1),
            rows_stride=rows.stride(0),
            tiles=tiles,
            spans=spans,
            SPLIT=split,
            PRECISION=input_precision,
            SPAN=_SPAN,
        )
        if split:
            launch(
                _add_kernel,
                "tiles * (TILE // STRIP)",
                cov,
                adding,
                cov=cov,
                partial=partial,
                size=size,
                cov_row=cov.stride(0),
                cov_column=cov.stride(1),
                tiles=tiles,
                spans=spans,
                TILE=edge,
            )
