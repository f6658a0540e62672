"""Every op, dtype and shape against the best plain-torch way to do the same: python -m bench.grid

A cell's ratio is the median time of the best of torch's ways over ours, timed in turns; short
calls are repeated until a sample takes 5 ms. A cell that comes out below 1.03 is timed again with
three times the samples, and that counts. The worst cells stand first, with both errors.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from bench.harness import results
from bench.harness.cases import DTYPES, Case, Effort, is_ours, measure, options, prepare
from bench.harness.tables import table
from bench.ops import TABLES, gradients, rows, scans
from logra_kernels import ops

BAR, AGAIN = 0.97, 1.03
RANKS = (16, 32, 64, 128)
QUERIES = (1, 4, 16, 64, 256)
KINDS = ("fp16", "bf16", "fp32")

Build = Callable[[], Case]


def cells() -> Iterator[tuple[str, Build]]:
    """(op, a function that makes the case): a cell takes memory only when its turn comes."""
    shapes = ((256, 576), (256, 2048), (4096, 576), (4096, 2048))
    for dtype, rank, (tokens, dim) in product(KINDS, RANKS, shapes):
        yield "project", partial(gradients.project, tokens, dim, rank, dtype)
    yield from _gradients()
    types = (("fp32", "fp32"), ("fp64", "fp32"), ("fp32", "fp16"), ("fp32", "bf16"))
    for size, num_rows, pair in product((16, 64, 256, 1024), (64, 2048), types):
        yield "covariance_update", partial(rows.covariance_update, num_rows, size, *pair)
    yield "covariance_update", partial(rows.covariance_update, 256, 4096, "fp32")
    yield from _scans()
    for kind, shape in product(KINDS, ((2000, 256), (2000, 1024), (300, 4096))):
        yield "self_influence", partial(scans.self_influence, *shape, kind)
    for shape, unpack in product(((8, 4096), (64, 16384), (500, 49152)), (False, True)):
        yield "pack_rows", partial(rows.pack_rows, *shape, unpack)


def _gradients() -> Iterator[tuple[str, Build]]:
    tokens = [(4, 64), (8, 256), (8, 256), (8, 256), (1, 2048)]
    lengths = ["full", "full", "masked", "ragged", "full"]
    for dtype, rank in product((*KINDS, "mixed"), RANKS):
        for shape, kind in zip(tokens, lengths, strict=True):
            build = partial(gradients.per_sample_gradients, *shape, rank, dtype, kind)
            yield "per_sample_gradients", build
        for dim, kind in product((576, 2048), ("full", "ragged")):
            build = partial(gradients.projected_gradients, 8, 256, dim, rank, dtype, kind)
            yield "projected_gradients", build


def _scans() -> Iterator[tuple[str, Build]]:
    shapes = ((2000, 256), (2000, 1024), (2000, 4096), (2000, 16384), (300, 4099))
    for kind, shape, num_queries in product(KINDS, shapes, QUERIES):
        yield "scores", partial(_scores, num_queries, *shape, kind)
    for num_queries in QUERIES:
        yield "scores", partial(_scores, num_queries, 16000, 4096, "fp16")
        yield "topk_scores", partial(_topk, num_queries, 20000, 1024, "fp16")
        for kind in KINDS:
            yield "topk_scores", partial(_topk, num_queries, 4000, 4096, kind)


def _scores(num_queries: int, num_rows: int, dim: int, kind: str) -> Case:
    rows = torch.randn(num_rows, dim).to(DTYPES[kind])
    return scans.scores(torch.randn(num_queries, dim), rows, torch.rand(num_rows) + 0.5)


def _topk(num_queries: int, num_rows: int, dim: int, kind: str) -> Case:
    rows = torch.randn(num_rows, dim).to(DTYPES[kind])
    return scans.topk_scores(torch.randn(num_queries, dim), rows, 10)


def cell(case: Case, spend: Effort) -> dict[str, Any]:
    """A line of the table; its ratio is None where one side is wrong, and so not timed."""
    for times in (1, 3):
        effort = Effort(spend.least * times, spend.most * times, spend.budget_s * times)
        record = measure(case, effort, limited=False)
        timed = {row["provider"]: row for row in record["providers"]}
        ours: dict[str, Any] = next((row for name, row in timed.items() if is_ours(name)), {})
        if (ratio := ours.get("x_best")) is None or ratio >= AGAIN:
            break
    best = timed.get(record["best"], {})
    return {
        "cell": f"{case.op}: {case.title}",
        "ratio": ratio,
        "ours_ms": ours.get("median_ms"),
        "best_ms": best.get("median_ms"),
        "our_error": ours.get("error"),
        "best_error": best.get("error"),
        "best": record["best"] or "",
        "left_out": "; ".join(f"{name}: {why}" for name, why in record["left_out"].items()),
    }


def loses(one: dict[str, Any]) -> bool:
    return one["ratio"] is None or one["ratio"] < BAR


def report(measured: list[dict[str, Any]], worst: int | None = None) -> str:
    """The table, the worst first: a cell without a ratio is worse than any other."""
    ordered = sorted(measured, key=lambda one: one["ratio"] or -1.0)
    lines = [table(ordered[:worst])]
    lines.append(f"{sum(map(loses, ordered))} of {len(ordered)} cells below {BAR}")
    for op in TABLES:
        ratios = [one["ratio"] for one in ordered if one["cell"].startswith(f"{op}:")]
        if ratios := [ratio for ratio in ratios if ratio is not None]:
            middle = statistics.median(ratios)
            lines.append(f"  {op}: {len(ratios)} cells, least {ratios[0]:.2f}, median {middle:.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the grid, or its cells of some ops; with --gate, 1 if a cell loses."""
    known = options(__doc__)
    known.add_argument("--ops", nargs="+", choices=TABLES, default=list(TABLES))
    known.add_argument("--worst", type=int, help="print so many cells only")
    known.add_argument("--gate", action="store_true", help="exit with 1 if a cell loses")
    args = known.parse_args(argv)
    spend = Effort(5, args.rounds or 11, 0.05 if args.quick else 0.15)
    start = time.perf_counter()
    measured = []
    with torch.no_grad():
        for op, build in cells():
            if op in args.ops:
                prepare(args.threads)
                measured.append(cell(build(), spend))
    print(report(measured, args.worst))
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        record = {"case": " ".join(args.ops), "isa": ops.isa(), "cells": measured}
        results.append("grid", record)
    return 1 if args.gate and any(map(loses, measured)) else 0


if __name__ == "__main__":
    sys.exit(main())
