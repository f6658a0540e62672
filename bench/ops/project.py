"""Projection of tokens.

P is exact in bfloat16, as build_projections makes it. Torch's products in 16 bits round their
result to 16 bits too; ours is float32.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from bench.harness.cases import DTYPES, OURS, Case
from logra_kernels.ops import project


def projection(rank: int, dim: int) -> Tensor:
    """P [K, I] in float32, exact in bfloat16."""
    return (torch.randn(rank, dim) / math.sqrt(rank)).bfloat16().float()


def case(num_tokens: int, dim: int, rank: int, dtype: str = "fp32") -> Case:
    """M tokens of `dim` features, projected to `rank`."""
    x = torch.randn(num_tokens, dim).to(DTYPES[dtype])  # [M, I]
    proj = projection(rank, dim)
    providers: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: project(x, proj),
        "torch fp32 mm": lambda: x.float() @ proj.T,
    }
    if dtype != "fp32":
        narrow = proj.to(x.dtype)
        providers[f"torch {dtype} mm"] = lambda: x @ narrow.T
    return Case(
        op="project",
        title=f"M={num_tokens}, I={dim}, K={rank}, {dtype} tokens",
        providers=providers,
        expected=x.float() @ proj.T,
        rtol=8e-3,  # of the largest value: bfloat16 results have 8 bits
        our_rtol=1e-5,
        num_bytes=float(x.nbytes + num_tokens * rank * 4),
        flops=2.0 * num_tokens * dim * rank,
    )


def cases(quick: bool) -> Iterator[Case]:
    """The op's table."""
    shapes = [(576, 16), (2048, 64)] if quick else [(576, 8), (1536, 16), (2048, 64), (4096, 128)]
    for (dim, rank), dtype in product(shapes, ("fp32", "bf16")):
        yield case(2048 if quick else 8192, dim, rank, dtype)
