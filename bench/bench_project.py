"""Projection of tokens: python -m bench.bench_project [--quick]

P is exact in bfloat16, as build_projections makes it; torch's bfloat16 product also rounds its
result to bfloat16.
"""

from collections.abc import Iterator

import torch

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import project


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    tokens = 2048 if quick else 8192
    for dim, rank in (
        ((576, 16), (2048, 64)) if quick else ((576, 8), (1536, 16), (2048, 64), (4096, 128))
    ):
        x = torch.randn(tokens, dim)  # [M, I]
        proj = (torch.randn(rank, dim) / rank**0.5).bfloat16().float()  # [K, I]
        for name in ("float32", "bfloat16"):
            given = x.to(getattr(torch, name))
            narrow = proj.bfloat16()
            providers = {
                **isa_providers("logra", lambda x=given, p=proj: project(x, p), isas),
                "torch fp32 mm": lambda x=given, p=proj: x.float() @ p.T,
            }
            if name == "bfloat16":
                providers["torch bf16 mm"] = lambda x=given, p=narrow: x @ p.T
            yield Case(
                op="project",
                title=f"M={tokens}, I={dim}, K={rank}, {name} tokens",
                providers=providers,
                expected=given.float() @ proj.T,
                rtol=8e-3,  # of the largest value: bfloat16 results have 8 bits
                num_bytes=float(given.numel() * given.element_size() + tokens * rank * 4),
                flops=2.0 * tokens * dim * rank,
            )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
