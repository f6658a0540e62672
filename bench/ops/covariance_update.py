"""Second moment of rows, one triangle."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from bench.harness.cases import DTYPES, OURS, Case
from logra_kernels.ops import covariance_update_


def case(num_rows: int, size: int, dtype: str = "fp32", rows_dtype: str = "fp32") -> Case:
    """R rows of K columns into a covariance [K, K] of `dtype`."""
    rows = torch.randn(num_rows, size).to(DTYPES[rows_dtype])  # [R, K]

    def zeros() -> Tensor:
        """Each call starts from zero: providers are compared by what they return."""
        return torch.zeros(size, size, dtype=DTYPES[dtype])

    def addmm() -> Tensor:
        wide = rows.to(DTYPES[dtype])
        return zeros().addmm_(wide.T, wide)

    return Case(
        op="covariance_update",
        title=f"R={num_rows}, K={size}, {rows_dtype} rows, {dtype} covariance",
        providers={OURS: lambda: covariance_update_(zeros(), rows), "torch addmm_": addmm},
        expected=(rows.double().T @ rows.double()).tril(),
        rtol=1e-5,
        num_bytes=float(rows.nbytes + zeros().nbytes),
        flops=1.0 * num_rows * size * size,
        compare=torch.tril,
    )


def cases(quick: bool) -> Iterator[Case]:
    """The op's table."""
    shapes = [(64, 1024), (1024, 256)]
    shapes = shapes if quick else [*shapes, (4096, 64), (2048, 1024), (256, 4096)]
    for shape, dtype in product(shapes, ("fp32", "fp64")):
        yield case(*shape, dtype)
