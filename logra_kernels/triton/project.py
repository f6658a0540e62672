# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""Projection of tokens (LoGra Eq. 6) on a GPU: a product with one skinny side."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton.launch import check_floating, choose, last_axis_contiguous, launch, tile
from logra_kernels.triton.products import dot, precision, types_of


@triton.jit(do_not_specialize=["tokens", "inner"])
def _project_kernel(
    x,  # [tokens, I]; token m is at (m // inner) * x_outer + (m % inner) * x_inner
    proj,  # [K, I]
    out,  # [tokens, K] float32
    tokens,
    inner,
    width,  # I
    rank,  # K
    x_outer: tl.int64,
    x_inner: tl.int64,
    proj_stride: tl.int64,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    rank_tiles = tl.cdiv(rank, RANK)
    token = (tl.program_id(0) // rank_tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = (tl.program_id(0) % rank_tiles) * RANK + tl.arange(0, RANK)
    x_rows = x + (token // inner) * x_outer + (token % inner) * x_inner  # [TOKENS]
    proj_rows = proj + k.to(tl.int64) * proj_stride  # [RANK]
    acc = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        i = start + tl.arange(0, WIDTH)
        x_tile = tl.load(  # [TOKENS, WIDTH]
            x_rows[:, None] + i[None, :],
            mask=(token < tokens)[:, None] & (i < width)[None, :],
            other=0.0,
        )
        proj_tile = tl.load(  # [WIDTH, RANK]
            proj_rows[None, :] + i[:, None],
            mask=(i < width)[:, None] & (k < rank)[None, :],
            other=0.0,
        )
        acc = dot(x_tile, proj_tile, acc, PRECISION)
    tl.store(
        out + token[:, None] * rank + k[None, :],
        acc,
        mask=(token < tokens)[:, None] & (k < rank)[None, :],
    )


def project(x: Tensor, proj: Tensor, *, input_precision: str | None = None) -> Tensor:
    """x [..., I], proj [K, I] -> P x [..., K] float32.

    input_precision concerns two float32 operands only: "ieee", "tf32" or "bf16x6"; None is torch's.
    """
    check_floating(x=x, proj=proj)
    input_precision = precision(input_precision)
    x, proj = last_axis_contiguous(x), last_axis_contiguous(proj)
    width, rank = x.shape[-1], proj.shape[0]
    out = torch.empty(*x.shape[:-1], rank, device=x.device, dtype=torch.float32)
    if out.numel() == 0:
        return out
    flat = x if x.dim() in (2, 3) else x.reshape(-1, width)  # [tokens, I] or [N, T, I]
    tokens = flat.shape[:-1].numel()
    inner = flat.shape[-2]
    config = choose("project", types_of(x, proj, input_precision), x, rank=rank)
    config["RANK"] = tile(rank, config["RANK"])
    launch(
        _project_kernel,
        (("tokens", "TOKENS"), ("rank", "RANK")),
        x,
        config,
        x=flat,
        proj=proj,
        out=out,
        tokens=tokens,
        inner=inner,
        width=width,
        rank=rank,
        x_outer=flat.stride(0) if flat.dim() == 3 else 0,
        x_inner=flat.stride(-2),
        proj_stride=proj.stride(0),
        PRECISION=input_precision,
    )
    return out
