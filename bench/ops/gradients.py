"""Projection of tokens, sums of outer products over tokens, and both at once.

P is exact in bfloat16, as build_projections makes it. Torch's ways to sum: einsum or bmm over
examples of one length; for ragged examples, a product for each, or padding and then bmm. In 16 bits
torch rounds its results to 16 bits; ours are float32.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor

from bench.harness.cases import DTYPES, OURS, Call, Case
from logra_kernels import ops

# of x and of dy; "mixed" is what autocast gives
PAIRS = {name: (dtype, dtype) for name, dtype in DTYPES.items()}
PAIRS["mixed"] = torch.float32, torch.bfloat16


def projection(rank: int, dim: int) -> Tensor:
    """P [K, I] in float32, exact in bfloat16."""
    return (torch.randn(rank, dim) / math.sqrt(rank)).bfloat16().float()


def project(num_tokens: int, dim: int, rank: int, dtype: str = "fp32") -> Case:
    """M tokens of `dim` features, projected to `rank`."""
    x = torch.randn(num_tokens, dim).to(DTYPES[dtype])  # [M, I]
    proj = projection(rank, dim)
    providers: dict[str, Call] = {
        OURS: lambda: ops.project(x, proj),
        "torch fp32 mm": lambda: x.float() @ proj.T,
    }
    if dtype != "fp32":
        narrow = proj.to(x.dtype)
        providers[f"torch {dtype} mm"] = lambda: x @ narrow.T
    return Case(
        "project",
        f"M={num_tokens}, I={dim}, K={rank}, {dtype} tokens",
        providers,
        x.float() @ proj.T,
        rtol=8e-3,  # of the largest value: bfloat16 results have 8 bits
        our_rtol=1e-5,
        num_bytes=float(x.nbytes + num_tokens * rank * 4),
        flops=2.0 * num_tokens * dim * rank,
    )


@dataclass
class Tokens:
    """x [N, T, I] and dy [N, T, O] with a mask [N, T] or None; or packed, x [T, I], dy [T, O]."""

    x: Tensor
    dy: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None

    @classmethod
    def random(cls, n: int, t: int, dim: int, dtype: str, lengths: str) -> "Tokens":
        """`lengths`: "full", "masked" (a tenth of the tokens) or "ragged" (1 to 2T - 1, packed)."""
        cu_seqlens, shape = None, [n, t]
        if lengths == "ragged":
            ends = torch.randint(1, 2 * t, (n,)).cumsum(0)
            cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends])  # [N + 1]
            shape = [int(ends[-1])]
        mask = torch.rand(n, t) > 0.1 if lengths == "masked" else None
        x, dy = (torch.randn(*shape, dim).to(kind) for kind in PAIRS[dtype])
        return cls(x, dy, mask, cu_seqlens)

    @property
    def count(self) -> int:
        """The number of tokens, padding included."""
        return self.x[..., 0].numel()

    def num_bytes(self, rank: int) -> float:
        """Of the tokens, and of the float32 gradients [N, K, K]."""
        num_examples = len(self.x) if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return float(self.x.nbytes + self.dy.nbytes + num_examples * rank * rank * 4)

    def ways(self, x: Tensor, dy: Tensor) -> dict[str, Callable[[], Tensor]]:
        """The ways to sum outer products of these x and dy; each call returns [N, Ko, Ki]."""
        if self.cu_seqlens is not None:
            lengths = [end - start for start, end in pairwise(self.cu_seqlens.tolist())]

            def padded(values: Tensor) -> Tensor:
                parts = list(values.split(lengths))
                return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

            return {
                "mm of each": lambda: torch.stack(
                    [d.T @ a for a, d in zip(x.split(lengths), dy.split(lengths), strict=True)]
                ),
                "padded bmm": lambda: padded(dy).transpose(1, 2) @ padded(x),
            }
        keep = None if self.mask is None else self.mask[..., None].to(dy.dtype)

        def kept() -> Tensor:
            return dy if keep is None else dy * keep

        return {
            "einsum": lambda: torch.einsum("nto,nti->noi", kept(), x),
            "bmm": lambda: kept().transpose(1, 2) @ x,
        }


def per_sample_gradients(
    n: int, t: int, rank: int, dtype: str = "fp32", lengths: str = "masked"
) -> Case:
    """N examples of T tokens of `rank` features on both sides."""
    given = Tokens.random(n, t, rank, dtype, lengths)
    x, dy = given.x, given.dy
    wide = given.ways(x.float(), dy.float())

    def widening(way: str) -> Tensor:
        return given.ways(x.float(), dy.float())[way]()

    providers: dict[str, Call] = {
        OURS: partial(ops.per_sample_gradients, x, dy, given.mask, cu_seqlens=given.cu_seqlens)
    }
    if x.dtype == dy.dtype:
        providers |= {f"torch {dtype} {way}": call for way, call in given.ways(x, dy).items()}
    if dtype != "fp32":
        providers |= {f"torch float, {way}": partial(widening, way) for way in wide}
    return Case(
        "per_sample_gradients",
        f"N={n}, T={t} {lengths}, Ki=Ko={rank}, {dtype}",
        providers,
        next(iter(wide.values()))(),
        rtol=1e-2,  # of the largest value: bfloat16 results have 8 bits
        our_rtol=1e-5,
        num_bytes=given.num_bytes(rank),
        flops=2.0 * given.count * rank * rank,
    )


def projected_gradients(
    n: int, t: int, dim: int, rank: int, dtype: str = "fp32", lengths: str = "masked"
) -> Case:
    """N examples of T tokens of `dim` features, projected to `rank` on both sides."""
    given = Tokens.random(n, t, dim, dtype, lengths)
    x, dy, proj = given.x, given.dy, projection(rank, dim)  # P for both sides

    def in_torch(p: Tensor, way: str) -> Tensor:
        return given.ways(x.to(p.dtype) @ p.T, dy.to(p.dtype) @ p.T)[way]()

    providers: dict[str, Call] = {
        OURS: partial(
            ops.projected_gradients, x, dy, proj, proj, given.mask, cu_seqlens=given.cu_seqlens
        )
    }
    ways = ("einsum", "bmm") if given.cu_seqlens is None else ("mm of each", "padded bmm")
    for way, kind in product(ways, ("fp32", dtype)):
        if kind in DTYPES:
            narrow = proj.to(DTYPES[kind])
            providers[f"torch {kind} mm, mm, {way}"] = partial(in_torch, narrow, way)
    return Case(
        "projected_gradients",
        f"N={n}, T={t} {lengths}, I=O={dim}, Ki=Ko={rank}, {dtype}",
        providers,
        in_torch(proj, ways[0]),
        rtol=2e-2,  # of the largest value: bfloat16 results have 8 bits, and are rounded twice
        our_rtol=2e-5,  # two float32 sums, one after the other
        num_bytes=given.num_bytes(rank),
        flops=given.count * (4.0 * dim * rank + 2.0 * rank * rank),
    )


def projections(quick: bool) -> Iterator[Case]:
    shapes = [(576, 16), (2048, 64)] if quick else [(576, 8), (1536, 16), (2048, 64), (4096, 128)]
    for (dim, rank), dtype in product(shapes, ("fp32", "bf16")):
        yield project(2048 if quick else 8192, dim, rank, dtype)


def outer_products(quick: bool) -> Iterator[Case]:
    shapes = [(8, 256, 16), (8, 256, 64)]
    for shape in shapes if quick else [*shapes, (16, 512, 8), (16, 512, 128), (1, 4096, 64)]:
        yield per_sample_gradients(*shape)
    for dtype in ["fp32"] if quick else ["fp32", "bf16"]:
        yield per_sample_gradients(8, 256, 64, dtype, "ragged")


def projected(quick: bool) -> Iterator[Case]:
    shapes = [(8, 256, 576, 8), (8, 256, 2048, 64)]
    if not quick:
        shapes = [(16, 512, 576, 8), (16, 512, 1536, 16), (16, 512, 2048, 64), (1, 4096, 2048, 64)]
    for shape, dtype in product(shapes, ("fp32", "bf16")):
        yield projected_gradients(*shape, dtype)
    yield projected_gradients(8, 256, 2048, 64, lengths="ragged")
    if not quick:
        yield projected_gradients(8, 256, 2048, 64, "mixed")
