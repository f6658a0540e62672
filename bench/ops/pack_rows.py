"""Rows to fp16 with a power-of-two scale for each, and back."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import OURS, Case
from logra_kernels.ops import pack_rows, unpack_rows


def in_torch(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, D] as fp16 with a power of two for each row, in torch."""
    shift = torch.frexp(rows.abs().amax(1)).exponent - 15  # [R]
    return torch.ldexp(rows, -shift[:, None]).half(), torch.ldexp(torch.ones(len(rows)), shift)


def case(num_rows: int, dim: int, unpack: bool = False) -> Case:
    """Packing R rows of D columns, or unpacking them."""
    rows = torch.randn(num_rows, dim)  # [R, D]
    modules = [dim // 32] * 32, [0] * 32
    packed, scale = pack_rows(rows, *modules)
    providers: dict[str, Callable[[], Any]]
    if unpack:
        providers = {
            OURS: lambda: unpack_rows(packed, scale, *modules),
            "torch float, multiply": lambda: packed.float() * scale[:, None],
        }
    else:
        providers = {
            OURS: lambda: pack_rows(rows, *modules),
            "torch amax, ldexp, half": lambda: in_torch(rows),
        }
    return Case(
        op="pack_rows",
        title=f"{'unpack' if unpack else 'pack'}, R={num_rows}, D={dim}, 32 modules",
        providers=providers,
        expected=packed.float() * scale[:, None] if unpack else in_torch(rows),
        rtol=0.0,
        num_bytes=6.0 * num_rows * dim,
        flops=0.0,
    )


def cases(quick: bool) -> Iterator[Case]:
    """The op's table."""
    for shape in [(64, 16384)] if quick else [(64, 16384), (1000, 49152)]:
        for unpack in (False, True):
            yield case(*shape, unpack)
