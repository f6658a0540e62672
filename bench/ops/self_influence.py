"""Self-influence of one module's rows.

The FLOP are counted for a triangular factor, which is what Cholesky gives.
"""

from collections.abc import Iterator

import torch

from bench.harness.cases import DTYPES, OURS, Case
from logra_kernels.ops import self_influence


def case(num_rows: int, size: int, dtype: str = "fp16") -> Case:
    """R rows of K columns under a factor [K, K]."""
    rows = torch.randn(num_rows, size).to(DTYPES[dtype])  # [R, K]
    factor = torch.randn(size, size).tril() / size**0.5  # [K, K]
    return Case(
        op="self_influence",
        title=f"R={num_rows}, K={size}, {dtype} rows",
        providers={
            OURS: lambda: self_influence(rows, factor),
            "torch fp32 mm, square": lambda: (rows.float() @ factor.T).square().sum(1),
        },
        expected=(rows.float() @ factor.T).square().sum(1),
        rtol=1e-4,
        num_bytes=float(rows.nbytes),
        flops=1.0 * num_rows * size * size,
    )


def cases(quick: bool) -> Iterator[Case]:
    """The op's table."""
    shapes = [(4000, 64), (4000, 256)]
    for shape in shapes if quick else [*shapes, (4000, 1024), (2000, 4096)]:
        yield case(*shape)
