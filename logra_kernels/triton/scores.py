# mypy: allow-untyped-defs
# a kernel's arguments are Triton's values, which have no Python types
"""Scores of stored rows against queries (Eq. 3) on a GPU.

The rows are read once, as they are stored. A query of another type than half-precision rows is
split by the launcher into pieces of the rows' type, so that the tensor cores multiply without
rounding the query: two float16 pieces (22 bits) after a power-of-two scale per query, or three
bfloat16 pieces (24 bits). The rows stand on the M axis of the product, whose tile is fixed: the
order of a row's sum over D depends on neither Q nor R.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton._common import (
    check_floating,
    dot,
    last_axis_contiguous,
    precision,
    tile,
    types_of,
)
from logra_kernels.triton._launch import choose, launch
from logra_kernels.triton.heuristics import SIZES
from logra_kernels.triton.split_queries import split_queries

# and the strides of one number a row
COUNTS = ["num_queries", "num_rows", "row_scale_stride", "row_bias_stride"]


@triton.jit
def score_tile(
    queries,  # [PIECES, Q, D]
    rows,  # [R, D]
    query_scale,  # [Q] float32
    row_scale,  # [R]
    row_bias,  # [R]
    q,  # [QUERIES] of this tile
    r,  # [ROWS] int64, of this tile
    num_queries,
    num_rows,
    dim,
    piece_stride,
    query_stride,
    row_stride,
    row_scale_stride,
    row_bias_stride,
    PIECES: tl.constexpr,
    QUERY_SCALED: tl.constexpr,
    ROW_SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
):
    """<row, query> * query_scale * row_scale + row_bias, [ROWS, QUERIES] float32."""
    acc = tl.zeros((ROWS, QUERIES), dtype=tl.float32)
    row_pointers = rows + r * row_stride
    query_pointers = queries + q.to(tl.int64) * query_stride
    for start in range(0, dim, DIM):
        d = start + tl.arange(0, DIM)
        row_tile = tl.load(  # [ROWS, DIM]
            row_pointers[:, None] + d[None, :],
            mask=(r < num_rows)[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        for piece in tl.static_range(PIECES):
            query_tile = tl.load(  # [DIM, QUERIES]
                query_pointers[None, :] + d[:, None] + piece * tl.cast(piece_stride, tl.int64),
                mask=(d < dim)[:, None] & (q < num_queries)[None, :],
                other=0.0,
            )
            acc = dot(row_tile, query_tile, acc, PRECISION)
    if QUERY_SCALED:
        acc *= tl.load(query_scale + q, mask=q < num_queries, other=1.0)[None, :]
    if ROW_SCALED:
        scale = tl.load(row_scale + r * row_scale_stride, mask=r < num_rows, other=1.0)
        acc *= scale.to(tl.float32)[:, None]
    if BIASED:
        bias = tl.load(row_bias + r * row_bias_stride, mask=r < num_rows, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _scores_kernel(
    queries,
    rows,
    query_scale,
    row_scale,
    row_bias,
    out,  # [Q, R] float32
    num_queries,
    num_rows,
    dim,
    piece_stride: tl.int64,
    query_stride: tl.int64,
    row_stride: tl.int64,
    row_scale_stride: tl.int64,
    row_bias_stride: tl.int64,
    PIECES: tl.constexpr,
    QUERY_SCALED: tl.constexpr,
    ROW_SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
):
    # the query tiles of one row tile run next to each other, while its rows are in the L2 cache
    query_tiles = tl.cdiv(num_queries, QUERIES)
    q = (tl.program_id(0) % query_tiles) * QUERIES + tl.arange(0, QUERIES)
    r = (tl.program_id(0) // query_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = score_tile(
        queries,
        rows,
        query_scale,
        row_scale,
        row_bias,
        q,
        r,
        num_queries,
        num_rows,
        dim,
        piece_stride,
        query_stride,
        row_stride,
        row_scale_stride,
        row_bias_stride,
        PIECES,
        QUERY_SCALED,
        ROW_SCALED,
        BIASED,
        PRECISION,
        ROWS,
        QUERIES,
        DIM,
    )
    tl.store(
        out + q.to(tl.int64)[None, :] * num_rows + r[:, None],
        acc,
        mask=(r < num_rows)[:, None] & (q < num_queries)[None, :],
    )


def row_tiles(op: str, pieces: Tensor, rows: Tensor, input_precision: str) -> dict[str, int]:
    """The configuration of an op that multiplies rows by split queries."""
    types = types_of(pieces, rows, input_precision)
    num_queries = pieces.shape[1]
    sizes = {"queries": num_queries} if "queries" in SIZES.get(op, ()) else {}
    config = choose(op, types, rows, **sizes)
    config["QUERIES"] = tile(num_queries, config["QUERIES"])
    return config


def scores(
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    *,
    input_precision: str | None = None,
) -> Tensor:
    """queries [Q, D], rows [R, D], row_scale [R], row_bias [R] -> [Q, R] float32.

    input_precision concerns float32 rows only: "ieee", "tf32" or "bf16x6"; None is torch's.
    """
    check_floating(queries=queries, rows=rows, row_scale=row_scale, row_bias=row_bias)
    input_precision = precision(input_precision)
    num_queries, num_rows = queries.shape[0], rows.shape[0]
    out = torch.empty(num_queries, num_rows, device=rows.device, dtype=torch.float32)
    if out.numel() == 0:
        return out
    rows = last_axis_contiguous(rows)
    pieces, query_scale = split_queries(last_axis_contiguous(queries), rows.dtype)
    launch(
        _scores_kernel,
        "cdiv(num_rows, ROWS) * cdiv(num_queries, QUERIES)",
        rows,
        row_tiles("scores", pieces, rows, input_precision),
        queries=pieces,
        rows=rows,
        query_scale=query_scale,
        row_scale=row_scale,
        row_bias=row_bias,
        out=out,
        num_queries=num_queries,
        num_rows=num_rows,
        dim=rows.shape[1],
        piece_stride=pieces.stride(0),
        query_stride=pieces.stride(1),
        row_stride=rows.stride(0),
        row_scale_stride=row_scale.stride(0) if row_scale is not None else 0,
        row_bias_stride=row_bias.stride(0) if row_bias is not None else 0,
        PIECES=pieces.shape[0],
        QUERY_SCALED=query_scale is not None,
        ROW_SCALED=row_scale is not None,
        BIASED=row_bias is not None,
        PRECISION=input_precision,
    )
    return out
