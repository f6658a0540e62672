# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""Scores of stored rows against queries (Eq. 3) on a GPU.

The rows are read once, as they are stored. The launcher splits float32 queries into pieces of the
rows' half type, so that the tensor cores multiply without rounding the query: two float16 pieces
(22 bits) after a power-of-two scale per query, or three bfloat16 pieces (24 bits). The rows are the
M axis of the product, whose tile is fixed, so the order of a row's sum over D depends on neither Q
nor R.

Int8 rows and rows in bit planes are multiplied by whole numbers of one or two signed bytes; their
sums are exact integers, so the scores have the reference's bits.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton.heuristics import SIZES
from logra_kernels.triton.launch import (
    check,
    check_floating,
    choose,
    last_axis_contiguous,
    launch,
    tile,
)
from logra_kernels.triton.products import dot, precision, types_of
from logra_kernels.triton.split_queries import in_bytes, split_queries

# Arguments that a kernel is not compiled anew for, whatever their values: counts, which change from
# call to call, and strides of tensors of one number a row.
COUNTS = ["num_queries", "num_rows", "row_scale_stride", "row_bias_stride"]
COUNTS += ["word_0", "word_1", "word_2", "word_3"]
TILES = ("num_rows", "ROWS"), ("num_queries", "QUERIES")  # the grid

# The PRECISION of integers: rows are int8 and queries are two bytes high and low, or rows are
# planes of bits and queries are one byte.
WHOLE = "whole"
_WHOLE = tl.constexpr(WHOLE)
# Bytes of a row whose products an int32 holds: 2**16 columns of at most 2**14.
_SPAN = tl.constexpr(2**16)
_PLANE_SPAN = tl.constexpr(2**13)


@triton.jit
def _level(code, word_0, word_1, word_2, word_3, PLANES: tl.constexpr):
    """The int8 of each code [ROWS, DIM] int32: byte code % 4 of word code // 4."""
    word = word_0
    if PLANES > 2:
        word = tl.where(code < 4, word_0, word_1)
    if PLANES > 3:
        word = tl.where(code < 8, word, tl.where(code < 12, word_2, word_3))
    return (word >> ((code & 3) * 8)).to(tl.int8)


@triton.jit
def _bytes_of_queries(query_pointers, d, kept, piece, piece_stride):
    """A tile of one piece, [DIM, QUERIES] int8."""
    at = query_pointers[None, :] + d[:, None] + piece * tl.cast(piece_stride, tl.int64)
    return tl.load(at, mask=kept, other=0)


@triton.jit
def _whole_tile(
    queries,  # int8: high and low bytes [2, Q, D]; for planes [8, Q, B], bit j's columns 8b + j
    rows,  # [R, D] int8, or the first plane [R, B] uint8
    q,
    r,
    num_queries,
    num_rows,
    dim,  # D or B: bytes of a row
    piece_stride,
    query_stride,
    row_stride,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PLANES: tl.constexpr,
    plane_1,
    plane_2,
    plane_3,
    word_0,
    word_1,
    word_2,
    word_3,
):
    """<row, query>, [ROWS, QUERIES] int64."""
    SPAN: tl.constexpr = _SPAN if PLANES == 0 else _PLANE_SPAN
    total = tl.zeros((ROWS, QUERIES), dtype=tl.int64)
    row_offsets = r * row_stride
    query_pointers = queries + q.to(tl.int64) * query_stride
    for first in range(0, dim, SPAN):
        high = tl.zeros((ROWS, QUERIES), dtype=tl.int32)
        low = tl.zeros((ROWS, QUERIES), dtype=tl.int32)
        for start in range(first, tl.minimum(first + SPAN, dim), DIM):
            d = start + tl.arange(0, DIM)
            at = row_offsets[:, None] + d[None, :]
            of_rows = (r < num_rows)[:, None] & (d < dim)[None, :]
            of_queries = (d < dim)[:, None] & (q < num_queries)[None, :]
            tile_0 = tl.load(rows + at, mask=of_rows, other=0)  # [ROWS, DIM]
            if PLANES == 0:
                piece = _bytes_of_queries(query_pointers, d, of_queries, 0, piece_stride)
                high = tl.dot(tile_0, piece, high, out_dtype=tl.int32)
                piece = _bytes_of_queries(query_pointers, d, of_queries, 1, piece_stride)
                low = tl.dot(tile_0, piece, low, out_dtype=tl.int32)
            else:
                if PLANES > 1:
                    tile_1 = tl.load(plane_1 + at, mask=of_rows, other=0)
                if PLANES > 2:
                    tile_2 = tl.load(plane_2 + at, mask=of_rows, other=0)
                if PLANES > 3:
                    tile_3 = tl.load(plane_3 + at, mask=of_rows, other=0)
                for bit in range(8):
                    code = ((tile_0 >> bit) & 1).to(tl.int32)
                    if PLANES > 1:
                        code = 2 * code + ((tile_1 >> bit) & 1).to(tl.int32)
                    if PLANES > 2:
                        code = 2 * code + ((tile_2 >> bit) & 1).to(tl.int32)
                    if PLANES > 3:
                        code = 2 * code + ((tile_3 >> bit) & 1).to(tl.int32)
                    level = _level(code, word_0, word_1, word_2, word_3, PLANES)
                    piece = _bytes_of_queries(query_pointers, d, of_queries, bit, piece_stride)
                    low = tl.dot(level, piece, low, out_dtype=tl.int32)
        total += low
        if PLANES == 0:
            total += high.to(tl.int64) * 256
    return total


@triton.jit
def _float_tile(
    queries,
    rows,
    q,
    r,
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
):
    """<row, query>, [ROWS, QUERIES] float32."""
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
    return acc


@triton.jit
def score_tile(
    queries,  # [PIECES, Q, D]
    rows,  # [R, D]
    query_scale,  # [Q] float32, or None; WHOLE: [2, Q] float64, before and after row_scale
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
    PLANES: tl.constexpr = 0,  # 0: rows hold one element a byte, or wider ones
    plane_1=None,  # [R, B], the planes after the first, which is `rows`
    plane_2=None,
    plane_3=None,
    word_0=None,  # the levels of codes 0 to 3, a byte each
    word_1=None,
    word_2=None,
    word_3=None,
):
    """<row, query> * query_scale * row_scale + row_bias, [ROWS, QUERIES] float32."""
    if PRECISION == _WHOLE:
        total = _whole_tile(
            queries,
            rows,
            q,
            r,
            num_queries,
            num_rows,
            dim,
            piece_stride,
            query_stride,
            row_stride,
            ROWS,
            QUERIES,
            DIM,
            PLANES,
            plane_1,
            plane_2,
            plane_3,
            word_0,
            word_1,
            word_2,
            word_3,
        )
        unit = tl.load(query_scale + q, mask=q < num_queries, other=1.0)
        acc = (total.to(tl.float64) * unit[None, :]).to(tl.float32)
    else:
        acc = _float_tile(
            queries,
            rows,
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
        )
        if query_scale is not None:
            acc *= tl.load(query_scale + q, mask=q < num_queries, other=1.0)[None, :]
    if row_scale is not None:
        scale = tl.load(row_scale + r * row_scale_stride, mask=r < num_rows, other=1.0)
        acc *= scale.to(tl.float32)[:, None]
    if PRECISION == _WHOLE:
        # A power of two, so a multiplication that is fused with the next addition rounds alike.
        factor = tl.load(query_scale + num_queries + q, mask=q < num_queries, other=1.0)
        acc *= factor.to(tl.float32)[None, :]
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
    PLANES: tl.constexpr = 0,
    plane_1=None,
    plane_2=None,
    plane_3=None,
    word_0=None,
    word_1=None,
    word_2=None,
    word_3=None,
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
        PLANES,
        plane_1,
        plane_2,
        plane_3,
        word_0,
        word_1,
        word_2,
        word_3,
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
    query_scale: Tensor | None  # [Q] float32, or [2, Q] float64
    rows: Tensor  # [R, D], or the first plane [R, B]
    row_scale: Tensor | None  # [R]
    row_bias: Tensor | None  # [R]
    input_precision: str
    planes: tuple[Tensor, ...] = ()  # all of them, of one stride
    words: tuple[int, ...] = ()  # four levels each, as a signed number of 32 bits

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
        floating = None if rows.dtype == torch.int8 else rows
        check_floating(queries=queries, rows=floating, row_scale=row_scale, row_bias=row_bias)
        check(queries=queries, rows=rows)
        rows = last_axis_contiguous(rows)
        if floating is None:
            pieces, query_scale = in_bytes(queries, planes=False)
            return cls(pieces, query_scale, rows, row_scale, row_bias, WHOLE)
        pieces, of_queries = split_queries(queries, rows.dtype)
        return cls(pieces, of_queries, rows, row_scale, row_bias, input_precision)

    @classmethod
    def of_planes(
        cls,
        queries: Tensor,
        planes: Sequence[Tensor],
        levels: Tensor,
        row_scale: Tensor | None,
        row_bias: Tensor | None,
    ) -> "Scan":
        """Round the queries [Q, D] to bytes, for planes [R, B] of bits."""
        check_floating(queries=queries, row_scale=row_scale, row_bias=row_bias)
        check(queries=queries, **{f"planes[{i}]": plane for i, plane in enumerate(planes)})
        planes = [last_axis_contiguous(plane) for plane in planes]
        if len({plane.stride(0) for plane in planes}) > 1:
            planes = [plane.contiguous() for plane in planes]
        pieces, query_scale = in_bytes(queries, planes=True)
        values = [*levels.tolist(), 0, 0][: max(4, len(levels))]
        words = struct.unpack(f"<{len(values) // 4}i", struct.pack(f"{len(values)}b", *values))
        scan = cls(pieces, query_scale, planes[0], row_scale, row_bias, WHOLE)
        return replace(scan, planes=tuple(planes), words=words)

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
        planes = tuple(plane[first:end] for plane in self.planes)
        rows = self.rows[first:end]
        return replace(self, rows=rows, planes=planes, row_scale=scale, row_bias=bias)

    def config(self, op: str) -> dict[str, int]:
        """The tiles of an op that scans rows."""
        types = "half"
        if self.input_precision == WHOLE:  # ops of their own in the table, which name no types
            op = op.replace("scores", "plane_scores" if self.planes else "whole_scores")
        else:
            types = types_of(self.pieces, self.rows, self.input_precision)
        sizes = {"queries": self.num_queries} if "queries" in SIZES.get(op, ()) else {}
        config = choose(op, types, self.rows, **sizes)
        if not self.planes:  # their kernel copies 16 bytes at a time only with all of the tile
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
        """A kernel's arguments for planes, and for what a row's products are multiplied by."""
        scale, bias = self.row_scale, self.row_bias
        planes = {f"plane_{i}": self.planes[i] if i < len(self.planes) else None for i in (1, 2, 3)}
        words = {f"word_{i}": self.words[i] if i < len(self.words) else None for i in range(4)}
        return {
            "PLANES": len(self.planes),
            **planes,
            **words,
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

    Rows are floating-point or int8. input_precision concerns float32 rows only: "ieee", "tf32" or
    "bf16x6"; None is torch's.
    """
    scan = Scan.of(queries, rows, row_scale, row_bias, precision(input_precision))
    return scan.scores()
