"""Projected per-sample gradients: python -m bench.bench_projected_gradients [--quick]"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import projected_gradients


def plain(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor, mask: Tensor) -> Tensor:
    return torch.einsum("nto,nti->noi", (dy @ p_out.T) * mask, x @ p_in.T)


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(8, 256, 576, 8), (8, 256, 2048, 64)]
    if not quick:
        shapes = [(16, 512, 576, 8), (16, 512, 1536, 16), (16, 512, 2048, 64), (1, 4096, 2048, 64)]
    for n, t, dim, rank in shapes:
        proj = (torch.randn(rank, dim) / rank**0.5).bfloat16().float()  # [K, I], both sides
        narrow = proj.bfloat16()
        mask = torch.rand(n, t) > 0.1  # [N, T]
        for name in ("float32", "bfloat16"):
            dtype = getattr(torch, name)
            x, dy = torch.randn(n, t, dim).to(dtype), torch.randn(n, t, dim).to(dtype)
            keep, wide = mask[..., None].to(dtype), mask[..., None].float()

            def ours(x: Tensor = x, dy: Tensor = dy, p: Tensor = proj, m: Tensor = mask) -> Tensor:
                return projected_gradients(x, dy, p, p, m)

            providers = {
                **isa_providers("logra", ours, isas),
                "torch fp32 mm, mm, einsum": lambda x=x, dy=dy, p=proj, m=wide: plain(
                    x.float(), dy.float(), p, p, m
                ),
            }
            if name == "bfloat16":
                providers["torch bf16 mm, mm, einsum"] = lambda x=x, dy=dy, p=narrow, m=keep: plain(
                    x, dy, p, p, m
                )
            yield Case(
                op="projected_gradients",
                title=f"N={n}, T={t}, I=O={dim}, Ki=Ko={rank}, {name}",
                providers=providers,
                expected=plain(x.float(), dy.float(), proj, proj, wide),
                rtol=2e-2,  # of the largest value: bfloat16 results have 8 bits, twice
                num_bytes=2.0 * x.numel() * x.element_size() + n * rank * rank * 4,
                flops=n * t * (4.0 * dim * rank + 2.0 * rank * rank),
            )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
