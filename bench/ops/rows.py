"""Rows to fp16 and back, and their second moment."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from bench.harness.cases import DTYPES, OURS, Call, Case
from logra_kernels import ops


def covariance_update(
    num_rows: int, size: int, dtype: str = "fp32", rows_dtype: str = "fp32"
) -> Case:
    """R rows of K columns into one triangle of a covariance [K, K] of `dtype`."""
    rows = torch.randn(num_rows, size).to(DTYPES[rows_dtype])  # [R, K]

    def zeros() -> Tensor:
        """Each call starts from zero: providers are compared by what they return."""
        return torch.zeros(size, size, dtype=DTYPES[dtype])

    def addmm() -> Tensor:
        wide = rows.to(DTYPES[dtype])
        return zeros().addmm_(wide.T, wide)

    return Case(
        "covariance_update",
        f"R={num_rows}, K={size}, {rows_dtype} rows, {dtype} covariance",
        {OURS: lambda: ops.covariance_update_(zeros(), rows), "torch addmm_": addmm},
        (rows.double().T @ rows.double()).tril(),
        rtol=1e-5,
        num_bytes=float(rows.nbytes + zeros().nbytes),
        flops=1.0 * num_rows * size * size,
        compare=torch.tril,
    )


def packed_in_torch(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, D] as fp16 with a power of two for each row, in torch."""
    shift = torch.frexp(rows.abs().amax(1)).exponent - 15  # [R]
    return torch.ldexp(rows, -shift[:, None]).half(), torch.ldexp(torch.ones(len(rows)), shift)


def pack_rows(num_rows: int, dim: int, unpack: bool = False) -> Case:
    """Packing R rows of D columns with a power-of-two scale for each, or unpacking them."""
    rows = torch.randn(num_rows, dim)  # [R, D]
    modules = [dim // 32] * 32, [0] * 32
    packed, scale = ops.pack_rows(rows, *modules)
    providers: dict[str, Call]
    if unpack:
        providers = {
            OURS: lambda: ops.unpack_rows(packed, scale, *modules),
            "torch float, multiply": lambda: packed.float() * scale[:, None],
        }
    else:
        providers = {
            OURS: lambda: ops.pack_rows(rows, *modules),
            "torch amax, ldexp, half": lambda: packed_in_torch(rows),
        }
    return Case(
        "pack_rows",
        f"{'unpack' if unpack else 'pack'}, R={num_rows}, D={dim}, 32 modules",
        providers,
        packed.float() * scale[:, None] if unpack else packed_in_torch(rows),
        rtol=0.0,
        num_bytes=6.0 * num_rows * dim,
    )


def covariances(quick: bool) -> Iterator[Case]:
    shapes = [(64, 1024), (1024, 256)]
    shapes = shapes if quick else [*shapes, (4096, 64), (2048, 1024), (256, 4096)]
    for shape, dtype in product(shapes, ("fp32", "fp64")):
        yield covariance_update(*shape, dtype)


def packing(quick: bool) -> Iterator[Case]:
    shapes = [(64, 16384)] if quick else [(64, 16384), (1000, 49152)]
    for shape, unpack in product(shapes, (False, True)):
        yield pack_rows(*shape, unpack)
