"""Every op, dtype and shape against the best plain-torch way to do the same: python -m bench.grid

A cell's ratio is the median time of the best of torch's ways over ours, timed in turns; short
calls are repeated until a sample takes 5 ms. A cell that comes out below 1.03 is timed again, up
to twice, and its samples are pooled. Cells stand with the worst first; those below 0.97
are marked, and with --gate make the exit status 1.

--hold avx2 or avx512 runs the grid in a process of its own in which both sides are held to that
instruction set: ours by LOGRA_ISA, torch by ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and
MKL_ENABLE_INSTRUCTIONS.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import _limits, _results
from bench import bench_covariance_update as covariance
from bench import bench_pack_rows as packing
from bench import bench_per_sample_gradients as per_sample
from bench import bench_project as project
from bench import bench_projected_gradients as projected
from bench import bench_scores as scan
from bench import bench_self_influence as influence
from bench import bench_topk_scores as top
from bench._harness import OURS, Case, check, time_providers
from logra_kernels import ops

BAR = 0.97
AGAIN, HOPELESS = 1.03, 0.5  # below the first a cell is timed again; below both, once only
RANKS = (16, 32, 64, 128)
QUERIES = (1, 4, 16, 64, 256)
ROWS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

HOLDS = {
    "avx2": {
        "LOGRA_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "LOGRA_ISA": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}

Build = Callable[[], Case]


@dataclass
class Cell:
    op: str
    title: str
    ratio: float | None  # best of torch over ours; None if one side was not timed
    ours_ms: float | None
    best_ms: float | None
    best: str | None
    our_error: float | None  # as in bench._harness
    best_error: float | None
    left_out: dict[str, str]

    @property
    def loses(self) -> bool:
        return self.ratio is None or self.ratio < BAR


def cells() -> Iterator[tuple[str, Build]]:
    """(op, a function that makes the case): memory is taken when a cell's turn comes."""
    for dtype in ("fp32", "fp16", "bf16"):
        for rank in RANKS:
            for num_tokens, dim in ((256, 576), (256, 2048), (4096, 576), (4096, 2048)):
                yield "project", _bind(project.case, num_tokens, dim, rank, dtype)
    for dtype in ("fp32", "fp16", "bf16", "mixed"):
        for rank in RANKS:
            for n, t, lengths in (
                (4, 64, "full"),
                (8, 256, "full"),
                (8, 256, "masked"),
                (8, 256, "ragged"),
                (1, 2048, "full"),
            ):
                yield "per_sample_gradients", _bind(per_sample.case, n, t, rank, dtype, lengths)
            for dim in (576, 2048):
                for lengths in ("full", "ragged"):
                    build = _bind(projected.case, 8, 256, dim, rank, dtype, lengths)
                    yield "projected_gradients", build
    for size in (16, 64, 256, 1024):
        for num_rows in (64, 2048):
            for dtype in ("fp32", "fp64"):
                yield "covariance_update", _bind(covariance.case, num_rows, size, dtype)
            for rows in ("fp16", "bf16"):
                yield "covariance_update", _bind(covariance.case, num_rows, size, "fp32", rows)
    yield "covariance_update", _bind(covariance.case, 256, 4096, "fp32")
    for kind in ROWS:
        for num_rows, dim in ((2000, 256), (2000, 1024), (2000, 4096), (2000, 16384), (300, 4099)):
            for num_queries in QUERIES:
                yield "scores", _bind(_scores, num_queries, num_rows, dim, kind)
    for num_queries in QUERIES:
        yield "scores", _bind(_scores, num_queries, 16000, 4096, "fp16")
        yield "topk_scores", _bind(_topk, num_queries, 20000, 1024, "fp16")
        for kind in ROWS:
            yield "topk_scores", _bind(_topk, num_queries, 4000, 4096, kind)
    for dtype in ("fp16", "bf16", "fp32"):
        for num_rows, size in ((2000, 256), (2000, 1024), (300, 4096)):
            yield "self_influence", _bind(influence.case, num_rows, size, dtype)
    for num_rows, dim in ((8, 4096), (64, 16384), (500, 49152)):
        for unpack in (False, True):
            yield "pack_rows", _bind(packing.case, num_rows, dim, unpack)


OPS = (
    "project",
    "per_sample_gradients",
    "projected_gradients",
    "covariance_update",
    "scores",
    "topk_scores",
    "self_influence",
    "pack_rows",
)


def _bind(make: Callable[..., Case], *args: object) -> Build:
    return lambda: make(*args)


def _scores(num_queries: int, num_rows: int, dim: int, kind: str) -> Case:
    rows = torch.randn(num_rows, dim).to(ROWS[kind])
    return scan.case(torch.randn(num_queries, dim), rows, torch.rand(num_rows) + 0.5)


def _topk(num_queries: int, num_rows: int, dim: int, kind: str) -> Case:
    rows = torch.randn(num_rows, dim).to(ROWS[kind])
    return top.case(torch.randn(num_queries, dim), rows, 10)


def measure(case: Case, rounds: int, budget_s: float) -> Cell:
    good, errors, left_out = check(case)
    times: dict[str, list[float]] = {name: [] for name in good}
    ratio = ours_s = best_s = best = None
    for turn in range(3):
        for name, seconds in time_providers(good, 5, rounds, budget_s).items():
            times[name] += seconds
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        ours = [value for name, value in medians.items() if name.startswith(OURS)]
        others = {
            name: value
            for name, value in medians.items()
            if not name.startswith(OURS) and name not in case.apart
        }
        if not ours or not others:
            break
        best = min(others, key=others.__getitem__)
        ours_s, best_s = min(ours), others[best]
        ratio = best_s / ours_s
        if ratio >= AGAIN or (turn and ratio < HOPELESS):
            break
    return Cell(
        op=case.op,
        title=case.title,
        ratio=ratio,
        ours_ms=None if ours_s is None else ours_s * 1e3,
        best_ms=None if best_s is None else best_s * 1e3,
        best=best,
        our_error=max((errors[name] for name in good if name.startswith(OURS)), default=None),
        best_error=None if best is None else errors[best],
        left_out=left_out,
    )


def report(measured: Iterable[Cell]) -> list[str]:
    """The table's lines, the worst first: a cell without a ratio is worse than any other."""
    ordered = sorted(measured, key=lambda cell: -1.0 if cell.ratio is None else cell.ratio)
    lines = [
        f"{'':2}{'ratio':>7}{'ours ms':>10}{'best ms':>10}{'error':>8}{'best':>8}"
        "  cell; the best of torch"
    ]
    for cell in ordered:
        mark = "!" if cell.loses else ""
        if cell.ratio is None:
            why = "; ".join(f"{name}: {text}" for name, text in cell.left_out.items())
            lines.append(f"{mark:2}{'-':>7}{'':>36}  {cell.op}: {cell.title}; {why}")
        else:
            lines.append(
                f"{mark:2}{cell.ratio:>7.2f}{cell.ours_ms:>10.3f}{cell.best_ms:>10.3f}"
                f"{cell.our_error:>8.0e}{cell.best_error:>8.0e}"
                f"  {cell.op}: {cell.title}; {cell.best}"
            )
    losing = sum(cell.loses for cell in ordered)
    lines.append(f"{losing} of {len(ordered)} cells below {BAR}")
    by_op: dict[str, list[float]] = {}
    for cell in ordered:
        if cell.ratio is not None:
            by_op.setdefault(cell.op, []).append(cell.ratio)
    for op, ratios in by_op.items():
        middle = statistics.median(ratios)
        lines.append(f"  {op}: {len(ratios)} cells, least {min(ratios):.2f}, median {middle:.2f}")
    return lines


def run(
    builds: Iterable[tuple[str, Build]],
    args: argparse.Namespace,
    results: Path = _results.RESULTS,
) -> int:
    """Measure, print, store; the exit status."""
    held = args.held or "nothing"
    limits = _limits.measure(5)
    print(f"{torch.get_num_threads()} threads, isa {ops.isa()}, held to {held}")
    print(limits.line(), flush=True)
    start = time.perf_counter()
    measured, not_reached = [], 0
    for _, build in builds:
        if args.seconds is not None and time.perf_counter() - start > args.seconds:
            not_reached += 1
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            case = build()
            if args.match in f"{case.op}: {case.title}":
                measured.append(measure(case, args.rounds, args.budget))
    lines = report(measured)
    shown = (
        lines
        if args.worst is None
        else [*lines[: args.worst + 1], "…", *lines[len(measured) + 1 :]]
    )
    print("\n".join(shown))
    if not_reached:
        print(f"{not_reached} cells were not reached in {args.seconds:g} s")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        record = {
            "bench": "grid",
            "case": f"held to {held}, {' '.join(args.ops)} {args.match}, part {args.part}",
            "held": args.held,
            "isa": ops.isa(),
            "not_reached": not_reached,
            "limits": asdict(limits),
            "cells": [asdict(cell) for cell in measured],
        }
        _results.append("grid", record, results)
    return 1 if args.gate and (not_reached or any(cell.loses for cell in measured)) else 0


def hold(isa: str, argv: list[str]) -> int:
    """The same command in a process in which both sides are held to an instruction set."""
    if isa not in ops.available_isas():
        print(f"held to {isa}: left out, this machine has {', '.join(ops.available_isas())}")
        return 0
    command = [sys.executable, "-m", "bench.grid", *argv, "--held", isa]
    root = Path(__file__).parents[1]
    return subprocess.run(command, env={**os.environ, **HOLDS[isa]}, cwd=root).returncode


def part_of(text: str) -> tuple[int, int]:
    try:
        one, of = (int(word) for word in text.split("/"))
    except ValueError:
        one = of = 0
    if not 1 <= one <= of:
        raise argparse.ArgumentTypeError(f"expected a part such as 1/3, got {text!r}")
    return one, of


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="these ops only")
    parser.add_argument("--match", default="", help="cells with this in their title only")
    parser.add_argument("--part", type=part_of, default=(1, 1), help="every n-th cell: 1/3, …")
    parser.add_argument("--hold", choices=list(HOLDS), help="hold both sides to this")
    parser.add_argument("--held", choices=list(HOLDS), help=argparse.SUPPRESS)
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a cell loses")
    parser.add_argument("--worst", type=int, help="print so many cells only")
    parser.add_argument("--threads", type=int, help="threads (default: torch's)")
    parser.add_argument("--seconds", type=float, help="begin no cell after so long")
    parser.add_argument("--rounds", type=int, default=11, help="samples of a provider at most")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds for each provider")
    parser.add_argument("--json", action="store_true", help="append to bench/results/grid.jsonl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    args = parse(given)
    if args.hold and not args.held:
        return hold(args.hold, given)
    if args.threads:
        torch.set_num_threads(args.threads)
    random.seed(0)
    one, of = args.part
    chosen = [(op, build) for op, build in cells() if op in args.ops][one - 1 :: of]
    return run(chosen, args)


if __name__ == "__main__":
    sys.exit(main())
