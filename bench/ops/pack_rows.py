"""Rows to fp16 with a power-of-two scale, and back: python -m bench.bench_pack_rows [--quick]"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import pack_rows, unpack_rows


def plain(rows: Tensor) -> tuple[Tensor, Tensor]:
    shift = torch.frexp(rows.abs().amax(1)).exponent - 15  # [R]
    return torch.ldexp(rows, -shift[:, None]).half(), torch.ldexp(torch.ones(len(rows)), shift)


def case(num_rows: int, dim: int, unpack: bool = False, isas: bool = False) -> Case:
    rows = torch.randn(num_rows, dim)  # [R, D]
    modules = [dim // 32] * 32, [0] * 32
    packed, scale = pack_rows(rows, *modules)
    if unpack:
        providers = {
            **isa_providers("logra", lambda: unpack_rows(packed, scale, *modules), isas),
            "torch float, multiply": lambda: packed.float() * scale[:, None],
        }
    else:
        providers = {
            **isa_providers("logra", lambda: pack_rows(rows, *modules), isas),
            "torch amax, ldexp, half": lambda: plain(rows),
        }
    return Case(
        op="pack_rows",
        title=f"{'unpack' if unpack else 'pack'}, R={num_rows}, D={dim}, 32 modules",
        providers=providers,
        expected=packed.float() * scale[:, None] if unpack else plain(rows),
        rtol=0.0,
        num_bytes=6.0 * num_rows * dim,
        flops=0.0,
        params={"R": num_rows, "D": dim, "unpack": unpack},
    )


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    for num_rows, dim in ((64, 16384),) if quick else ((64, 16384), (1000, 49152)):
        for unpack in (False, True):
            yield case(num_rows, dim, unpack, isas)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
