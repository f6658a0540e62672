"""Scan of stored rows: python -m bench.bench_scores [--quick]

torch fp16 mm rounds queries and scores to fp16; torch fp32 widens the rows first.
"""

from collections.abc import Iterator

import torch

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import scores


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    dim, num_rows = (4096, 4000) if quick else (16384, 8000)
    rows = torch.randn(num_rows, dim).half()  # [R, D]
    scale = torch.rand(num_rows) + 0.5  # [R]
    for num_queries in (1, 4, 16, 64) if quick else (1, 2, 4, 8, 16, 64, 256):
        queries = torch.randn(num_queries, dim)  # [Q, D]
        halves = queries.half()
        yield Case(
            op="scores",
            title=f"Q={num_queries}, R={num_rows}, D={dim}, fp16 rows",
            providers={
                **isa_providers("logra", lambda q=queries: scores(q, rows, scale), isas),
                "torch fp16 mm": lambda q=halves: (q @ rows.T).float() * scale,
                "torch fp32 mm": lambda q=queries: q @ rows.float().T * scale,
            },
            expected=queries @ rows.float().T * scale,
            rtol=2e-3,  # of the largest score: torch's fp16 output has 11 bits
            num_bytes=2.0 * num_rows * dim,
            flops=2.0 * num_queries * num_rows * dim,
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
