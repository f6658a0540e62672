"""Running top k and bottom k of a scan. Torch keeps all scores in memory and takes both ends."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness.cases import OURS, Case
from bench.ops.scores import kind_of, torch_ways, unit, widened_in_blocks
from logra_kernels.ops import topk_scores


def case(queries: Tensor, rows: Tensor, k: int) -> Case:
    """Queries [Q, D] in fp32 over rows [R, D] in fp16, bf16 or fp32."""
    num_queries, (num_rows, dim) = len(queries), rows.shape

    def ours() -> tuple[Tensor, Tensor]:
        out = topk_scores(queries, rows, k)
        return out.top_scores, out.bottom_scores

    def ends(way: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        scores = way()
        return scores.topk(k).values, scores.topk(k, largest=False).values

    ways = torch_ways(queries, rows)
    return Case(
        op="topk_scores",
        title=f"Q={num_queries}, R={num_rows}, D={dim}, k={k}, {kind_of(rows)} rows",
        providers={
            OURS: ours,
            **{f"{name}, topk": partial(ends, way) for name, way in ways.items()},
        },
        expected=ends(lambda: widened_in_blocks(queries, rows)),
        rtol=4e-3,  # of the largest |q||x|: bfloat16's products have 8 bits
        our_rtol=1e-5,
        unit=unit(queries, rows),
        num_bytes=float(rows.nbytes),
        flops=2.0 * num_queries * num_rows * dim,
    )


def cases(quick: bool) -> Iterator[Case]:
    """The op's table."""
    shapes = [(1, 4000, 4096, 20), (16, 4000, 4096, 20)]
    shapes = shapes if quick else [*shapes, (64, 8000, 8192, 100), (64, 20000, 512, 1000)]
    for num_queries, num_rows, dim, k in shapes:
        yield case(torch.randn(num_queries, dim), torch.randn(num_rows, dim).half(), k)
