"""Sums of outer products over tokens.

Torch's ways: einsum or bmm over examples of one length; for ragged examples, a product for each, or
padding and then bmm. In 16 bits torch rounds its result to 16 bits; ours is float32.
"""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from bench.harness.cases import OURS, Case
from bench.ops.tokens import outer_ways, tokens
from logra_kernels.ops import per_sample_gradients


def case(n: int, t: int, rank: int, dtype: str = "fp32", lengths: str = "masked") -> Case:
    """N examples of T tokens of `rank` features on both sides."""
    given = tokens(n, t, rank, dtype, lengths)
    x, dy, mask, cu_seqlens = given.x, given.dy, given.mask, given.cu_seqlens
    wide = outer_ways(x.float(), dy.float(), mask, cu_seqlens)

    def widening(way: str) -> Tensor:
        return outer_ways(x.float(), dy.float(), mask, cu_seqlens)[way]()

    providers: dict[str, Callable[[], Tensor]] = {
        OURS: partial(per_sample_gradients, x, dy, mask, cu_seqlens=cu_seqlens)
    }
    if x.dtype == dy.dtype:
        ways = outer_ways(x, dy, mask, cu_seqlens)
        providers |= {f"torch {dtype} {way}": call for way, call in ways.items()}
    if dtype != "fp32":
        providers |= {f"torch float, {way}": partial(widening, way) for way in wide}
    return Case(
        op="per_sample_gradients",
        title=f"N={n}, T={t} {lengths}, Ki=Ko={rank}, {dtype}",
        providers=providers,
        expected=next(iter(wide.values()))(),
        rtol=1e-2,  # of the largest value: bfloat16 results have 8 bits
        our_rtol=1e-5,
        num_bytes=given.num_bytes(rank),
        flops=2.0 * given.num_tokens * rank * rank,
    )


def cases(quick: bool) -> Iterator[Case]:
    """The op's table."""
    shapes = [(8, 256, 16), (8, 256, 64)]
    for n, t, rank in shapes if quick else [*shapes, (16, 512, 8), (16, 512, 128), (1, 4096, 64)]:
        yield case(n, t, rank)
    yield case(8, 256, 64, lengths="ragged")
    if not quick:
        yield case(8, 256, 64, "bf16", "ragged")
