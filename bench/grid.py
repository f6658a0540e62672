"""Every op, dtype and shape against the best plain-torch way to do the same: python -m bench.grid

A cell's ratio is the median time of the best of torch's ways over ours, timed in turns; short
calls are repeated until a sample takes 5 ms. A cell that comes out below 1.03 is timed again, up
to twice, and its samples are pooled. The worst cells stand first; those below 0.97 are marked, and
with --gate they make the exit status 1.

--hold avx2 or avx512 runs the grid in a process of its own in which both sides are held to that
instruction set: ours by LOGRA_ISA, torch by ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and
MKL_ENABLE_INSTRUCTIONS.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

from bench.harness import limits as machine_limits
from bench.harness import results as stored
from bench.harness.cases import DTYPES, Case, check, is_ours, medians, prepare, time_providers
from bench.ops import (
    covariance_update,
    pack_rows,
    per_sample_gradients,
    project,
    projected_gradients,
    scores,
    self_influence,
    topk_scores,
)
from logra_kernels import ops

BAR = 0.97
AGAIN, HOPELESS = 1.03, 0.5  # below the first a cell is timed again; below both, once only
RANKS = (16, 32, 64, 128)
QUERIES = (1, 4, 16, 64, 256)
KINDS = ("fp16", "bf16", "fp32")

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
Named = tuple[str, Build]


@dataclass
class Cell:
    """One problem's outcome: our median over the best of torch's, times and errors."""

    op: str
    title: str
    ratio: float | None  # best of torch over ours; None if one side was not timed
    ours_ms: float | None
    best_ms: float | None
    best: str | None
    our_error: float | None  # as in bench.harness.cases
    best_error: float | None
    left_out: dict[str, str]

    @property
    def loses(self) -> bool:
        """Whether we are slower than the best of torch, or were not timed."""
        return self.ratio is None or self.ratio < BAR

    def line(self) -> str:
        """The cell as a line of the table."""
        mark, name = "!" if self.loses else "", f"{self.op}: {self.title}"
        if self.ratio is None:
            why = "; ".join(f"{provider}: {text}" for provider, text in self.left_out.items())
            return f"{mark:2}{'-':>7}{'':>36}  {name}; {why}"
        return (
            f"{mark:2}{self.ratio:>7.2f}{self.ours_ms:>10.3f}{self.best_ms:>10.3f}"
            f"{self.our_error:>8.0e}{self.best_error:>8.0e}  {name}; {self.best}"
        )


def cells() -> Iterator[Named]:
    """(op, a function that makes the case): a cell takes memory only when its turn comes."""
    yield from _projections()
    yield from _gradients()
    yield from _covariances()
    yield from _scans()
    for kind, (num_rows, size) in product(KINDS, ((2000, 256), (2000, 1024), (300, 4096))):
        yield "self_influence", partial(self_influence.case, num_rows, size, kind)
    for shape, unpack in product(((8, 4096), (64, 16384), (500, 49152)), (False, True)):
        yield "pack_rows", partial(pack_rows.case, *shape, unpack)


def _projections() -> Iterator[Named]:
    shapes = ((256, 576), (256, 2048), (4096, 576), (4096, 2048))
    for dtype, rank, shape in product(KINDS, RANKS, shapes):
        yield "project", partial(project.case, *shape, rank, dtype)


def _gradients() -> Iterator[Named]:
    shapes = (
        (4, 64, "full"),
        (8, 256, "full"),
        (8, 256, "masked"),
        (8, 256, "ragged"),
        (1, 2048, "full"),
    )
    for dtype, rank in product((*KINDS, "mixed"), RANKS):
        for n, t, lengths in shapes:
            build = partial(per_sample_gradients.case, n, t, rank, dtype, lengths)
            yield "per_sample_gradients", build
        for dim, lengths in product((576, 2048), ("full", "ragged")):
            build = partial(projected_gradients.case, 8, 256, dim, rank, dtype, lengths)
            yield "projected_gradients", build


def _covariances() -> Iterator[Named]:
    types = (("fp32", "fp32"), ("fp64", "fp32"), ("fp32", "fp16"), ("fp32", "bf16"))
    for size, num_rows, (dtype, rows) in product((16, 64, 256, 1024), (64, 2048), types):
        yield "covariance_update", partial(covariance_update.case, num_rows, size, dtype, rows)
    yield "covariance_update", partial(covariance_update.case, 256, 4096, "fp32")


def _scans() -> Iterator[Named]:
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
    return scores.case(torch.randn(num_queries, dim), rows, torch.rand(num_rows) + 0.5)


def _topk(num_queries: int, num_rows: int, dim: int, kind: str) -> Case:
    rows = torch.randn(num_rows, dim).to(DTYPES[kind])
    return topk_scores.case(torch.randn(num_queries, dim), rows, 10)


OPS = tuple(dict.fromkeys(op for op, _ in cells()))


def measure(case: Case, rounds: int, budget_s: float) -> Cell:
    """Check and time every provider of a case."""
    good, errors, left_out = check(case)
    ours = next((name for name in good if is_ours(name)), None)
    cell = Cell(case.op, case.title, None, None, None, None, None, None, left_out)
    if ours is not None:
        cell.our_error = errors[ours]
    times: dict[str, list[float]] = {name: [] for name in good}
    for turn in range(3):
        for name, samples in time_providers(good, 5, rounds, budget_s).items():
            times[name] += samples
        seconds = medians(times)
        cell.best = case.best(seconds)
        if ours is None or cell.best is None:
            break
        cell.ours_ms, cell.best_ms = seconds[ours] * 1e3, seconds[cell.best] * 1e3
        cell.ratio = cell.best_ms / cell.ours_ms
        cell.best_error = errors[cell.best]
        if cell.ratio >= AGAIN or (turn and cell.ratio < HOPELESS):
            break
    return cell


def report(measured: list[Cell], worst: int | None = None) -> list[str]:
    """The table's lines, the worst first: a cell without a ratio is worse than any other."""
    ordered = sorted(measured, key=lambda cell: -1.0 if cell.ratio is None else cell.ratio)
    head = f"{'':2}{'ratio':>7}{'ours ms':>10}{'best ms':>10}{'error':>8}{'best':>8}"
    lines = [f"{head}  cell; the best of torch", *(cell.line() for cell in ordered[:worst])]
    losing = sum(cell.loses for cell in ordered)
    lines.append(f"{losing} of {len(ordered)} cells below {BAR}")
    for op in dict.fromkeys(cell.op for cell in ordered):
        ratios = [cell.ratio for cell in ordered if cell.op == op and cell.ratio is not None]
        if ratios:
            middle = statistics.median(ratios)
            lines.append(f"  {op}: {len(ratios)} cells, least {ratios[0]:.2f}, median {middle:.2f}")
    return lines


def run(
    builds: Iterable[tuple[str, Build]],
    args: argparse.Namespace,
    folder: Path = stored.RESULTS,
) -> int:
    """Measure, print, store; the exit status."""
    held = args.held or "nothing"
    limits = machine_limits.measure(5)
    print(f"held to {held}: {machine_limits.header(limits)}", flush=True)
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
    print("\n".join(report(measured, args.worst)))
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
        stored.append("grid", record, folder)
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
    """The text "1/3" as (1, 3)."""
    try:
        one, of = (int(word) for word in text.split("/"))
    except ValueError:
        one = of = 0
    if not 1 <= one <= of:
        raise argparse.ArgumentTypeError(f"expected a part such as 1/3, got {text!r}")
    return one, of


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
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
    """Run the grid, or the part of it that the command line asks for."""
    given = sys.argv[1:] if argv is None else argv
    args = parse(given)
    if args.hold and not args.held:
        return hold(args.hold, given)
    prepare(args.threads)
    one, of = args.part
    chosen = [(op, build) for op, build in cells() if op in args.ops][one - 1 :: of]
    return run(chosen, args)


if __name__ == "__main__":
    sys.exit(main())
