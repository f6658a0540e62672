"""Self-influence of a module's rows: python -m bench.bench_self_influence [--quick]

The FLOP counted are those of a triangular factor, which is what Cholesky gives.
"""

from collections.abc import Iterator

import torch

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import self_influence

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def case(num_rows: int, size: int, dtype: str = "fp16", isas: bool = False) -> Case:
    rows = torch.randn(num_rows, size).to(DTYPES[dtype])  # [R, K]
    factor = torch.randn(size, size).tril() / size**0.5  # [K, K]
    return Case(
        op="self_influence",
        title=f"R={num_rows}, K={size}, {dtype} rows",
        providers={
            **isa_providers("logra", lambda: self_influence(rows, factor), isas),
            "torch fp32 mm, square": lambda: (rows.float() @ factor.T).square().sum(1),
        },
        expected=(rows.float() @ factor.T).square().sum(1),
        rtol=1e-4,
        num_bytes=float(rows.nbytes),
        flops=1.0 * num_rows * size * size,
        params={"R": num_rows, "K": size, "rows": dtype},
    )


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(4000, 64), (4000, 256)]
    for num_rows, size in shapes if quick else [*shapes, (4000, 1024), (2000, 4096)]:
        yield case(num_rows, size, isas=isas)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
