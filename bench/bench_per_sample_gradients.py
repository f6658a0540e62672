"""Sums of outer products: python -m bench.bench_per_sample_gradients [--quick]"""

from collections.abc import Iterator

import torch

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import per_sample_gradients


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(8, 256, 16), (8, 256, 64)]
    for n, t, rank in shapes if quick else [*shapes, (16, 512, 8), (16, 512, 128), (1, 4096, 64)]:
        x, dy = torch.randn(n, t, rank), torch.randn(n, t, rank)  # [N, T, K]
        mask = torch.rand(n, t) > 0.1  # [N, T]
        keep = mask[..., None].float()
        yield Case(
            op="per_sample_gradients",
            title=f"N={n}, T={t}, Ki=Ko={rank}",
            providers={
                **isa_providers(
                    "logra", lambda x=x, dy=dy, m=mask: per_sample_gradients(x, dy, m), isas
                ),
                "torch einsum": lambda x=x, dy=dy, m=keep: torch.einsum("nto,nti->noi", dy * m, x),
                "torch bmm": lambda x=x, dy=dy, m=keep: (dy * m).transpose(1, 2) @ x,
            },
            expected=torch.einsum("nto,nti->noi", dy * keep, x),
            rtol=1e-5,
            num_bytes=4.0 * (2 * n * t * rank + n * rank * rank),
            flops=2.0 * n * t * rank * rank,
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
