"""Self-influence of a module's rows: python -m bench.bench_self_influence [--quick]

The FLOP counted are those of a triangular factor, which is what Cholesky gives.
"""

from collections.abc import Iterator

import torch

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import self_influence


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(4000, 64), (4000, 256)]
    for num_rows, size in shapes if quick else [*shapes, (4000, 1024), (2000, 4096)]:
        rows = torch.randn(num_rows, size).half()  # [R, K]
        factor = torch.randn(size, size).tril() / size**0.5  # [K, K]
        yield Case(
            op="self_influence",
            title=f"R={num_rows}, K={size}, fp16 rows",
            providers={
                **isa_providers("logra", lambda r=rows, f=factor: self_influence(r, f), isas),
                "torch fp32 mm, square": lambda r=rows, f=factor: (r.float() @ f.T).square().sum(1),
            },
            expected=(rows.float() @ factor.T).square().sum(1),
            rtol=1e-4,
            num_bytes=2.0 * num_rows * size,
            flops=1.0 * num_rows * size * size,
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
