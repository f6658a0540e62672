"""Sums of outer products: python -m bench.bench_per_sample_gradients [--quick]

Torch's ways: einsum or bmm over examples of one length; for ragged ones, a product for each, or
padding and then bmm. In 16 bits torch rounds its result to them; ours is float32.
"""

from collections.abc import Iterator

from torch import Tensor

from bench._harness import Case, Provider, arguments, isa_providers, run_cases
from bench._tokens import outer_ways, tokens
from logra_kernels.ops import per_sample_gradients


def case(
    n: int, t: int, rank: int, dtype: str = "fp32", lengths: str = "masked", isas: bool = False
) -> Case:
    given = tokens(n, t, (rank, rank), dtype, lengths)
    wide = given.widened()
    mask, cu_seqlens = given.mask, given.cu_seqlens

    def ours() -> Tensor:
        return per_sample_gradients(given.x, given.dy, mask, cu_seqlens=cu_seqlens)

    providers: dict[str, Provider] = isa_providers("logra", ours, isas)
    if given.x.dtype == given.dy.dtype:
        ways = outer_ways(given.x, given.dy, mask, cu_seqlens)
        providers |= {f"torch {dtype} {name}": way for name, way in ways.items()}
    if dtype != "fp32":

        def widening(name: str) -> Tensor:
            return outer_ways(given.x.float(), given.dy.float(), mask, cu_seqlens)[name]()

        names = outer_ways(wide.x, wide.dy, mask, cu_seqlens)
        providers |= {f"torch float, {name}": lambda n=name: widening(n) for name in names}
    expected = next(iter(outer_ways(wide.x, wide.dy, mask, cu_seqlens).values()))()
    num_tokens = given.num_tokens
    return Case(
        op="per_sample_gradients",
        title=f"N={n}, T={t} {lengths}, Ki=Ko={rank}, {dtype}",
        providers=providers,
        expected=expected,
        rtol=1e-2,  # of the largest value: bfloat16 results have 8 bits
        our_rtol=1e-5,
        num_bytes=float(given.x.nbytes + given.dy.nbytes + given.num_examples * rank * rank * 4),
        flops=2.0 * num_tokens * rank * rank,
        params={"N": n, "T": t, "lengths": lengths, "K": rank, "dtype": dtype},
    )


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(8, 256, 16), (8, 256, 64)]
    for n, t, rank in shapes if quick else [*shapes, (16, 512, 8), (16, 512, 128), (1, 4096, 64)]:
        yield case(n, t, rank, isas=isas)
    yield case(8, 256, 64, lengths="ragged", isas=isas)
    if not quick:
        yield case(8, 256, 64, "bf16", "ragged", isas)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
