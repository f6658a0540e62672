"""Second moment of rows, one triangle: python -m bench.bench_covariance_update [--quick]"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import covariance_update_

DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def case(
    num_rows: int, size: int, dtype: str = "fp32", rows_dtype: str = "fp32", isas: bool = False
) -> Case:
    rows = torch.randn(num_rows, size).to(DTYPES[rows_dtype])  # [R, K]
    cov_dtype = DTYPES[dtype]

    # from zero each time: providers are compared on what they return
    def ours() -> Tensor:
        return covariance_update_(torch.zeros(size, size, dtype=cov_dtype), rows)

    def addmm() -> Tensor:
        wide = rows.to(cov_dtype)
        return torch.zeros(size, size, dtype=cov_dtype).addmm_(wide.T, wide)

    return Case(
        op="covariance_update",
        title=f"R={num_rows}, K={size}, {rows_dtype} rows, {dtype} covariance",
        providers={**isa_providers("logra", ours, isas), "torch addmm_": addmm},
        expected=(rows.double().T @ rows.double()).tril(),
        rtol=1e-5,
        num_bytes=float(rows.nbytes + size * size * cov_dtype.itemsize),
        flops=1.0 * num_rows * size * size,
        compare=torch.tril,
        params={"R": num_rows, "K": size, "rows": rows_dtype, "dtype": dtype},
    )


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(64, 1024), (1024, 256)]
    for num_rows, size in shapes if quick else [*shapes, (4096, 64), (2048, 1024), (256, 4096)]:
        for dtype in ("fp32", "fp64"):
            yield case(num_rows, size, dtype, isas=isas)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
