# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""Scores of stored rows against queries (Eq. 3) on a GPU.

The rows are read once, as they are stored. The launcher splits float32 queries into pieces of the
rows' half type, so that the tensor cores multiply without rounding the query: two float16 pieces
(22 bits) after a power-of-two scale per query, or three bfloat16 pieces (24 bits). The rows are the
M axis of the product, whose tile is fixed, so the order of a row's sum over D depends on neither Q
nor R.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton.heuristics import SIZES
from logra_kernels.triton.launch import check_floating, choose, last_axis_contiguous, launch, tile
from logra_kernels.triton.products import dot, precision, types_of
from logra_kernels.triton.split_queries import split_queries

# Arguments that a kernel is not compiled anew for, whatever their values: counts, which change from
# call to call, and strides of tensors of one number a row.
COUNTS = ["num_queries", "num_rows", "row_scale_stride", "row_bias_stride"]
TILES = ("num_rows", "ROWS"), ("num_queries", "QUERIES")  # the grid


@triton.jit
def score_tile(
    queries,  # [PIECES, Q, D]
    rows,  # [R, D]
    query_scale,  # [Q] float32, or None
    q,  # [QUERIES] of this tile
    r,  # [ROWS] int64, of this tile
    num_queries,
    num_rows,
    dim,
    piece_stride,
    query_stride,
    row_stride,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    row_scale=None,  # [R]
    row_bias=None,  # [R]
    row_scale_stride=0,
    row_bias_stride=0,
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
    if query_scale is not None:
        acc *= tl.load(query_scale + q, mask=q < num_queries, other=1.0)[None, :]
    if row_scale is not None:
        scale = tl.load(row_scale + r * row_scale_stride, mask=r < num_rows, other=1.0)
        acc *= scale.to(tl.float32)[:, None]
    if row_bias is not None:
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
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
):
    # The query tiles of one row tile run next to each other, while its rows are in the L2 cache.
    query_tiles = tl.cdiv(num_queries, QUERIES)
    q = (tl.program_id(0) % query_tiles) * QUERIES + tl.arange(0, QUERIES)
    r = (tl.program_id(0) // query_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = score_tile(
        queries,
        rows,
        query_scale,
        q,
        r,
        num_queries,
        num_rows,
        dim,
        piece_stride,
        query_stride,
        row_stride,
        PIECES,
        PRECISION,
        ROWS,
        QUERIES,
        DIM,
        row_scale,
        row_bias,
        row_scale_stride,
        row_bias_stride,
    )
    tl.store(
        out + q.to(tl.int64)[None, :] * num_rows + r[:, None],
        acc,
        mask=(r < num_rows)[:, None] & (q < num_queries)[None, :],
    )


@dataclass(frozen=True)
class Scan:
    """Rows and the queries that they are multiplied by, as `score_tile` takes them."""

    pieces: Tensor  # [PIECES, Q, D], the queries split
    query_scale: Tensor | None  # [Q] float32
    rows: Tensor  # [R, D]
    row_scale: Tensor | None  # [R]
    row_bias: Tensor | None  # [R]
    input_precision: str

    @classmethod
    def of(
        cls,
        queries: Tensor,
        rows: Tensor,
        row_scale: Tensor | None,
        row_bias: Tensor | None,
        input_precision: str,
    ) -> "Scan":
        """Split the queries [Q, D] for the rows' type."""
        pieces, query_scale = split_queries(queries, rows.dtype)
        rows = last_axis_contiguous(rows)
        return cls(pieces, query_scale, rows, row_scale, row_bias, input_precision)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.pieces.shape[1]

    def of_rows(self, first: int, end: int) -> "Scan":
        """The scan of the rows from `first` to `end`."""
        scale, bias = (
            None if tensor is None else tensor[first:end]
            for tensor in (self.row_scale, self.row_bias)
        )
        return replace(self, rows=self.rows[first:end], row_scale=scale, row_bias=bias)

    def config(self, op: str) -> dict[str, int]:
        """The tiles of an op that scans rows."""
        types = types_of(self.pieces, self.rows, self.input_precision)
        sizes = {"queries": self.num_queries} if "queries" in SIZES.get(op, ()) else {}
        config = choose(op, types, self.rows, **sizes)
        config["QUERIES"] = tile(self.num_queries, config["QUERIES"])
        return config

    def product(self) -> dict[str, Any]:
        """A kernel's arguments for the product of rows and queries."""
        return {
            "queries": self.pieces,
            "rows": self.rows,
            "query_scale": self.query_scale,
            "num_queries": self.num_queries,
            "num_rows": self.rows.shape[0],
            "dim": self.rows.shape[1],
            "piece_stride": self.pieces.stride(0),
            "query_stride": self.pieces.stride(1),
            "row_stride": self.rows.stride(0),
            "PIECES": self.pieces.shape[0],
            "PRECISION": self.input_precision,
        }

    def epilogue(self) -> dict[str, Any]:
        """A kernel's arguments for what a row's products are multiplied by and added to."""
        scale, bias = self.row_scale, self.row_bias
        return {
            "row_scale": scale,
            "row_bias": bias,
            "row_scale_stride": scale.stride(0) if scale is not None else 0,
            "row_bias_stride": bias.stride(0) if bias is not None else 0,
        }

    def scores(self) -> Tensor:
        """[Q, R] float32."""
        shape = self.num_queries, self.rows.shape[0]
        out = torch.empty(shape, device=self.rows.device, dtype=torch.float32)
        if out.numel() > 0:
            arguments = self.product() | self.epilogue()
            config = self.config("scores")
            launch(_scores_kernel, TILES, self.rows, config, out=out, **arguments)
        return out


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
    scan = Scan.of(queries, rows, row_scale, row_bias, precision(input_precision))
    return scan.scores()
