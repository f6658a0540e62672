# mypy: allow-untyped-defs
# a kernel's arguments are Triton's values, which have no Python types
"""Self-influence of one module's rows, sigma = ||W g||^2, on a GPU: W g never reaches memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton._common import (
    check_floating,
    last_axis_contiguous,
    precision,
)
from logra_kernels.triton._launch import launch
from logra_kernels.triton.scores import row_tiles, score_tile
from logra_kernels.triton.split_queries import split_queries


@triton.jit(do_not_specialize=["num_rows"])
def _self_influence_kernel(
    factor,  # [PIECES, M, K]
    rows,  # [R, K]
    factor_scale,  # [M] float32
    out,  # [R] float32
    num_factors,  # M
    num_rows,
    dim,  # K
    piece_stride: tl.int64,
    factor_stride: tl.int64,
    row_stride: tl.int64,
    PIECES: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sigma = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, num_factors, QUERIES):
        m = start + tl.arange(0, QUERIES)
        whitened = score_tile(  # [ROWS, QUERIES]
            factor,
            rows,
            factor_scale,
            None,
            None,
            m,
            r,
            num_factors,
            num_rows,
            dim,
            piece_stride,
            factor_stride,
            row_stride,
            0,
            0,
            PIECES,
            SCALED,
            False,
            False,
            PRECISION,
            ROWS,
            QUERIES,
            DIM,
        )
        sigma += tl.sum(whitened * whitened, axis=1)
    tl.store(out + r, sigma, mask=r < num_rows)


def self_influence(rows: Tensor, factor: Tensor, *, input_precision: str | None = None) -> Tensor:
    """rows [R, K], factor W [M, K] -> [R] float32.

    input_precision concerns float32 rows only: "ieee", "tf32" or "bf16x6"; None is torch's.
    """
    check_floating(rows=rows, factor=factor)
    input_precision = precision(input_precision)
    num_rows = rows.shape[0]
    out = torch.empty(num_rows, device=rows.device, dtype=torch.float32)
    if num_rows == 0:
        return out
    rows = last_axis_contiguous(rows)
    # each row of W takes the part of a query
    pieces, factor_scale = split_queries(last_axis_contiguous(factor), rows.dtype)
    launch(
        _self_influence_kernel,
        "cdiv(num_rows, ROWS)",
        rows,
        row_tiles("self_influence", pieces, rows, input_precision),
        factor=pieces,
        rows=rows,
        factor_scale=factor_scale,
        out=out,
        num_factors=factor.shape[0],
        num_rows=num_rows,
        dim=rows.shape[1],
        piece_stride=pieces.stride(0),
        factor_stride=pieces.stride(1),
        row_stride=rows.stride(0),
        PIECES=pieces.shape[0],
        SCALED=factor_scale is not None,
        PRECISION=input_precision,
    )
    return out
