"""Running top k and bottom k of a scan: python -m bench.bench_topk_scores [--quick]"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._harness import Case, arguments, isa_providers, run_cases
from logra_kernels.ops import topk_scores


def plain(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores = (queries @ rows.T).float()
    return scores.topk(k).values, scores.topk(k, largest=False).values


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(1, 4000, 4096, 20), (16, 4000, 4096, 20)]
    for num_queries, num_rows, dim, k in (
        shapes if quick else [*shapes, (64, 8000, 8192, 100), (64, 20000, 512, 1000)]
    ):
        queries, rows = torch.randn(num_queries, dim), torch.randn(num_rows, dim).half()
        halves = queries.half()

        def ours(q: Tensor = queries, r: Tensor = rows, k: int = k) -> tuple[Tensor, Tensor]:
            out = topk_scores(q, r, k)
            return out.top_scores, out.bottom_scores

        yield Case(
            op="topk_scores",
            title=f"Q={num_queries}, R={num_rows}, D={dim}, k={k}, fp16 rows",
            providers={
                **isa_providers("logra", ours, isas),
                "torch fp16 mm, topk": lambda q=halves, r=rows, k=k: plain(q, r, k),
                "torch fp32 mm, topk": lambda q=queries, r=rows, k=k: plain(q, r.float(), k),
            },
            expected=plain(queries, rows.float(), k),
            rtol=2e-3,  # of the largest score: torch's fp16 output has 11 bits
            num_bytes=2.0 * num_rows * dim,
            flops=2.0 * num_queries * num_rows * dim,
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
