"""Running top k and bottom k of a scan: python -m bench.bench_topk_scores [--quick]

Torch has all scores in memory and takes both ends of them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._harness import Case, arguments, isa_providers, run_cases
from bench.bench_scores import Way, torch_ways, unit, widened_in_blocks
from logra_kernels.ops import topk_scores


def ends(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return scores.topk(k).values, scores.topk(k, largest=False).values


def case(queries: Tensor, rows: Tensor, k: int, isas: bool = False) -> Case:
    """Queries [Q, D] in fp32 over rows [R, D] in fp16, bf16 or fp32."""
    num_queries, (num_rows, dim) = len(queries), rows.shape

    def ours() -> tuple[Tensor, Tensor]:
        out = topk_scores(queries, rows, k)
        return out.top_scores, out.bottom_scores

    def both(way: Way) -> tuple[Tensor, Tensor]:
        return ends(way(), k)

    ways = torch_ways(queries, rows)
    kind = str(rows.dtype)[6:]
    return Case(
        op="topk_scores",
        title=f"Q={num_queries}, R={num_rows}, D={dim}, k={k}, {kind} rows",
        providers={
            **isa_providers("logra", ours, isas),
            **{f"{name}, topk": lambda w=way: both(w) for name, way in ways.items()},
        },
        expected=ends(widened_in_blocks(queries, rows), k),
        rtol=4e-3,  # of the largest |q||x|: bfloat16's products have 8 bits
        our_rtol=1e-5,
        unit=unit(queries, rows),
        num_bytes=float(rows.element_size() * num_rows * dim),
        flops=2.0 * num_queries * num_rows * dim,
        params={"Q": num_queries, "R": num_rows, "D": dim, "k": k, "rows": kind},
    )


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    shapes = [(1, 4000, 4096, 20), (16, 4000, 4096, 20)]
    for num_queries, num_rows, dim, k in (
        shapes if quick else [*shapes, (64, 8000, 8192, 100), (64, 20000, 512, 1000)]
    ):
        yield case(torch.randn(num_queries, dim), torch.randn(num_rows, dim).half(), k, isas)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
