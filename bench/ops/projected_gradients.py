"""Projected per-sample gradients.

P is exact in bfloat16, as build_projections makes it. Torch projects all tokens at once, then sums
outer products in each of the ways of bench.ops.per_sample_gradients.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness.cases import DTYPES, OURS, Case
from bench.ops.project import projection
from bench.ops.tokens import outer_ways, tokens
from logra_kernels.ops import projected_gradients


def case(n: int, t: int, dim: int, rank: int, dtype: str = "fp32", lengths: str = "masked") -> Case:
    """N examples of T tokens of `dim` features, projected to `rank` on both sides."""
    given = tokens(n, t, dim, dtype, lengths)
    mask, cu_seqlens = given.mask, given.cu_seqlens
    proj = projection(rank, dim)  # for both sides
    narrow = proj if dtype == "mixed" else proj.to(DTYPES[dtype])

    def in_type(p: Tensor, way: str) -> Tensor:
        x, dy = given.x.to(p.dtype) @ p.T, given.dy.to(p.dtype) @ p.T
        return outer_ways(x, dy, mask, cu_seqlens)[way]()

    providers: dict[str, Callable[[], Tensor]] = {
        OURS: partial(
            projected_gradients, given.x, given.dy, proj, proj, mask, cu_seqlens=cu_seqlens
        )
    }
    ways = ("einsum", "bmm") if cu_seqlens is None else ("mm of each", "padded bmm")
    for way in ways:
        providers[f"torch fp32 mm, mm, {way}"] = partial(in_type, proj, way)
        if narrow.dtype != torch.float32:
            providers[f"torch {dtype} mm, mm, {way}"] = partial(in_type, narrow, way)
    return Case(
        op="projected_gradients",
        title=f"N={n}, T={t} {lengths}, I=O={dim}, Ki=Ko={rank}, {dtype}",
        providers=providers,
        expected=in_type(proj, ways[0]),
        rtol=2e-2,  # of the largest value: bfloat16 results have 8 bits, and are rounded twice
        our_rtol=2e-5,  # two float32 sums, one after the other
        num_bytes=given.num_bytes(rank),
        flops=given.num_tokens * (4.0 * dim * rank + 2.0 * rank * rank),
    )


def cases(quick: bool) -> Iterator[Case]:
    """The op's table."""
    shapes = [(8, 256, 576, 8), (8, 256, 2048, 64)]
    if not quick:
        shapes = [(16, 512, 576, 8), (16, 512, 1536, 16), (16, 512, 2048, 64), (1, 4096, 2048, 64)]
    for shape in shapes:
        for dtype in ("fp32", "bf16"):
            yield case(*shape, dtype)
    yield case(8, 256, 2048, 64, lengths="ragged")
    if not quick:
        yield case(8, 256, 2048, 64, "mixed")
