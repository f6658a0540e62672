"""Rows to fp16 with a power-of-two scale, and back: python -m bench.bench_pack_rows [--quick]"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import pack_rows, unpack_rows


def plain(rows: Tensor) -> tuple[Tensor, Tensor]:
    shift = torch.frexp(rows.abs().amax(1)).exponent - 15  # [R]
    return torch.ldexp(rows, -shift[:, None]).half(), torch.ldexp(torch.ones(len(rows)), shift)


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    for num_rows, dim in ((64, 16384),) if quick else ((64, 16384), (1000, 49152)):
        rows = torch.randn(num_rows, dim)  # [R, D]
        modules = [dim // 32] * 32, [0] * 32
        packed, scale = pack_rows(rows, *modules)
        yield Case(
            op="pack_rows",
            title=f"pack, R={num_rows}, D={dim}, 32 modules",
            providers={
                **isa_providers("logra", lambda r=rows, m=modules: pack_rows(r, *m), isas),
                "torch amax, ldexp, half": lambda r=rows: plain(r),
            },
            expected=plain(rows),
            rtol=0.0,
            num_bytes=6.0 * num_rows * dim,
            flops=0.0,
        )
        yield Case(
            op="pack_rows",
            title=f"unpack, R={num_rows}, D={dim}, 32 modules",
            providers={
                **isa_providers(
                    "logra", lambda p=packed, s=scale, m=modules: unpack_rows(p, s, *m), isas
                ),
                "torch float, multiply": lambda p=packed, s=scale: p.float() * s[:, None],
            },
            expected=packed.float() * scale[:, None],
            rtol=0.0,
            num_bytes=6.0 * num_rows * dim,
            flops=0.0,
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
