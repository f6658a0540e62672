"""Projection of tokens: python -m bench.bench_project [--quick]

P is exact in bfloat16, as build_projections makes it; torch's products in 16 bits also round their
result to them.
"""

from collections.abc import Iterator

import torch

from bench._harness import Case, Provider, arguments, isa_providers, run_cases
from logra_kernels.ops import project

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def case(num_tokens: int, dim: int, rank: int, dtype: str = "fp32", isas: bool = False) -> Case:
    x = torch.randn(num_tokens, dim).to(DTYPES[dtype])  # [M, I]
    proj = (torch.randn(rank, dim) / rank**0.5).bfloat16().float()  # [K, I]
    providers: dict[str, Provider] = {
        **isa_providers("logra", lambda: project(x, proj), isas),
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
        params={"M": num_tokens, "I": dim, "K": rank, "dtype": dtype},
    )


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    num_tokens = 2048 if quick else 8192
    for dim, rank in (
        ((576, 16), (2048, 64)) if quick else ((576, 8), (1536, 16), (2048, 64), (4096, 128))
    ):
        for dtype in ("fp32", "bf16"):
            yield case(num_tokens, dim, rank, dtype, isas)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
