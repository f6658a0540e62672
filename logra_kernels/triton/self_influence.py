# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""Self-influence of one module's rows, sigma = ||W g||^2, on a GPU. W g never reaches memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton.launch import check_floating, launch
from logra_kernels.triton.products import precision
from logra_kernels.triton.scores import Scan, score_tile


@triton.jit(do_not_specialize=["num_rows"])
def _self_influence_kernel(
    queries,  # the factor W in pieces [PIECES, M, K]: each of its rows is a query
    rows,  # [R, K]
    query_scale,  # [M] float32
    out,  # [R] float32
    num_factors,  # M, which has a hint as a width: it is the module's, not the call's
    num_rows,
    dim,  # K
    piece_stride: tl.int64,
    query_stride: tl.int64,
    row_stride: tl.int64,
    PIECES: tl.constexpr,
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
            queries,
            rows,
            query_scale,
            m,
            r,
            num_factors,
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
        sigma += tl.sum(whitened * whitened, axis=1)
    tl.store(out + r, sigma, mask=r < num_rows)


def self_influence(rows: Tensor, factor: Tensor, *, input_precision: str | None = None) -> Tensor:
    """rows [R, K], factor W [M, K] -> [R] float32.

    input_precision concerns float32 rows only: "ieee", "tf32" or "bf16x6"; None is torch's.
    """
    check_floating(rows=rows, factor=factor)
    how = precision(input_precision)
    out = torch.empty(rows.shape[0], device=rows.device, dtype=torch.float32)
    if out.numel() > 0:
        scan = Scan.of(factor, rows, None, None, how)
        arguments = scan.product() | {"out": out}
        arguments["num_factors"] = arguments.pop("num_queries")
        grid = (("num_rows", "ROWS"),)
        launch(_self_influence_kernel, grid, rows, scan.config("self_influence"), **arguments)
    return out
