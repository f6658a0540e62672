"""Projected per-sample gradients: python -m bench.bench_projected_gradients [--quick]

P is exact in bfloat16, as build_projections makes it. Torch projects all tokens at once, then sums
outer products in the best of the ways of bench_per_sample_gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._harness import Case, Provider, arguments, isa_providers, run_cases
from bench._tokens import outer_ways, tokens
from logra_kernels.ops import projected_gradients


def plain(
    x: Tensor, dy: Tensor, proj: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, way: str
) -> Tensor:
    return outer_ways(x @ proj.T, dy @ proj.T, mask, cu_seqlens)[way]()


def case(
    n: int,
    t: int,
    dim: int,
    rank: int,
    dtype: str = "fp32",
    lengths: str = "masked",
    isas: bool = False,
) -> Case:
    given = tokens(n, t, (dim, dim), dtype, lengths)
    mask, cu_seqlens = given.mask, given.cu_seqlens
    proj = (torch.randn(rank, dim) / rank**0.5).bfloat16().float()  # [K, I], both sides

    def ours() -> Tensor:
        return projected_gradients(given.x, given.dy, proj, proj, mask, cu_seqlens=cu_seqlens)

    def in_float(way: str) -> Tensor:
        return plain(given.x.float(), given.dy.float(), proj, mask, cu_seqlens, way)

    ways = ("einsum", "bmm") if cu_seqlens is None else ("mm of each", "padded bmm")
    providers: dict[str, Provider] = isa_providers("logra", ours, isas)
    for way in ways:
        providers[f"torch fp32 mm, mm, {way}"] = lambda w=way: in_float(w)
        if dtype in ("fp16", "bf16"):
            narrow = proj.to(given.x.dtype)
            providers[f"torch {dtype} mm, mm, {way}"] = lambda p=narrow, w=way: plain(
                given.x, given.dy, p, mask, cu_seqlens, w
            )
    return Case(
        op="projected_gradients",
        title=f"N={n}, T={t} {lengths}, I=O={dim}, Ki=Ko={rank}, {dtype}",
        providers=providers,
        expected=in_float(ways[0]),
        rtol=2e-2,  # of the largest value: bfloat16 results have 8 bits, twice
        our_rtol=2e-5,  # two float32 sums, one after the other
        num_bytes=float(given.x.nbytes + given.dy.nbytes + given.num_examples * rank**2 * 4),
        flops=given.num_tokens * (4.0 * dim * rank + 2.0 * rank * rank),
        params={"N": n, "T": t, "lengths": lengths, "I": dim, "K": rank, "dtype": dtype},
    )


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(8, 256, 576, 8), (8, 256, 2048, 64)]
    if not quick:
        shapes = [(16, 512, 576, 8), (16, 512, 1536, 16), (16, 512, 2048, 64), (1, 4096, 2048, 64)]
    for n, t, dim, rank in shapes:
        for dtype in ("fp32", "bf16"):
            yield case(n, t, dim, rank, dtype, isas=isas)
    yield case(8, 256, 2048, 64, lengths="ragged", isas=isas)
    if not quick:
        yield case(8, 256, 2048, 64, "mixed", isas=isas)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
