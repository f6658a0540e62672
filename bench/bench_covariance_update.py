"""Second moment of rows, one triangle: python -m bench.bench_covariance_update [--quick]"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import covariance_update_


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(64, 1024), (1024, 256)]
    for num_rows, size in shapes if quick else [*shapes, (4096, 64), (2048, 1024), (256, 4096)]:
        rows = torch.randn(num_rows, size)  # [R, K]
        for dtype in (torch.float32, torch.float64):
            # from zero each time: providers are compared on what they return
            def ours(rows: Tensor = rows, dtype: torch.dtype = dtype) -> Tensor:
                return covariance_update_(
                    torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype), rows
                )

            def addmm(rows: Tensor = rows, dtype: torch.dtype = dtype) -> Tensor:
                wide = rows.to(dtype)
                zero = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype)
                return zero.addmm_(wide.T, wide)

            yield Case(
                op="covariance_update",
                title=f"R={num_rows}, K={size}, {str(dtype)[6:]} covariance",
                providers={
                    **isa_providers("logra", ours, isas),
                    "torch addmm_": addmm,
                },
                expected=(rows.double().T @ rows.double()).tril(),
                rtol=1e-5,
                num_bytes=4.0 * num_rows * size + size * size * dtype.itemsize,
                flops=1.0 * num_rows * size * size,
                compare=torch.tril,
            )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
