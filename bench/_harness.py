"""Check, then time: providers interleaved in one process, beside limits measured in the same run.

Columns: median, least and interquartile range of the wall time (on a machine that others use, the
least says more); GB/s of the bytes the op must read and
write once; GFLOP/s of the multiplications and additions its definition has (two a product, half
of them where only a triangle is wanted); and `of limit`, the share of the time that those bytes
take at the read bandwidth or those FLOP at torch's sgemm rate, whichever is longer. A share above
100 % means cache, a cheaper way to compute the same, or a rate above sgemm's.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from logra_kernels import _native

Result = Tensor | tuple[Tensor, ...]
Provider = Callable[[], Result]


@dataclass
class Case:
    """One table: a problem, the ways to solve it, and what it costs at least."""

    op: str
    title: str
    providers: dict[str, Provider]
    expected: Result
    rtol: float  # of the largest expected value; a provider that is less accurate is not timed
    num_bytes: float
    flops: float
    compare: Callable[[Tensor], Tensor] = lambda result: result  # the part that is compared


@dataclass
class Row:
    op: str
    case: str
    provider: str
    threads: int
    isa: str | None
    median_ms: float
    least_ms: float
    quartile_range_ms: float
    gb_per_s: float
    gflop_per_s: float
    of_limit: float


@dataclass
class Limits:
    read_gb_per_s: float
    sgemm_gflop_per_s: float


def arguments(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small problems, few rounds")
    parser.add_argument("--threads", type=int, help="threads (default: torch's)")
    parser.add_argument("--rounds", type=int, help="rounds of interleaved timing")
    parser.add_argument(
        "--isas", action="store_true", help="every instruction set, not the best only"
    )
    parser.add_argument("--json", action="store_true", help="append to bench/results/<op>.jsonl")
    return parser.parse_args(argv)


def isa_providers(name: str, call: Provider, every: bool) -> dict[str, Provider]:
    """`call` under the active instruction set, or under each that this machine has."""
    if not every:
        return {name: call}

    def under(isa: str) -> Provider:
        def run() -> Result:
            before = _native.isa()
            _native.set_isa(isa)
            try:
                return call()
            finally:
                _native.set_isa(str(before))

        return run

    return {f"{name} {isa}": under(isa) for isa in _native.available_isas()}


def run_cases(cases: Iterator[Case], args: argparse.Namespace) -> list[Row]:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        limits = measure_limits()
        print(
            f"{torch.get_num_threads()} threads, isa {_native.isa()}, read "
            f"{limits.read_gb_per_s:.1f} GB/s, sgemm {limits.sgemm_gflop_per_s:.0f} GFLOP/s"
        )
        return [row for case in cases for row in run_case(case, limits, args)]


def run_case(case: Case, limits: Limits, args: argparse.Namespace) -> list[Row]:
    print(f"\n{case.op}: {case.title}")
    print(
        f"  {'provider':<28}{'median ms':>10}{'least':>9}{'± ms':>9}"
        f"{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>9}"
    )
    good = {}
    for name, provider in case.providers.items():
        error = largest_error(provider(), case.expected, case.compare)
        if error <= case.rtol:
            good[name] = provider
        else:
            print(f"  {name:<28} not timed: off by {error:.1e} of the largest value")
    times: dict[str, list[float]] = {name: [] for name in good}
    order = list(good)
    for _ in range(args.rounds or (7 if args.quick else 25)):
        # Each takes its turn behind each: who comes after one that empties the cache pays for it.
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            good[name]()
            times[name].append(time.perf_counter() - start)
    floor_s = max(
        case.num_bytes / limits.read_gb_per_s / 1e9, case.flops / limits.sgemm_gflop_per_s / 1e9
    )
    rows = []
    for name, seconds in times.items():
        median_s = statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4)
        row = Row(
            op=case.op,
            case=case.title,
            provider=name,
            threads=torch.get_num_threads(),
            isa=_native.isa(),
            median_ms=median_s * 1e3,
            least_ms=min(seconds) * 1e3,
            quartile_range_ms=(quartiles[2] - quartiles[0]) * 1e3,
            gb_per_s=case.num_bytes / median_s / 1e9,
            gflop_per_s=case.flops / median_s / 1e9,
            of_limit=floor_s / median_s,
        )
        rows.append(row)
        print(
            f"  {name:<28}{row.median_ms:>10.3f}{row.least_ms:>9.3f}{row.quartile_range_ms:>9.3f}"
            f"{row.gb_per_s:>8.1f}{row.gflop_per_s:>9.1f}{row.of_limit:>9.0%}"
        )
    if args.json:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        with open(folder / f"{case.op}.jsonl", "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({**asdict(row), "load": os.getloadavg()[0]}) + "\n")
    return rows


def largest_error(got: Result, expected: Result, compare: Callable[[Tensor], Tensor]) -> float:
    """Over all tensors: the largest difference, over the largest expected value."""
    if isinstance(got, Tensor):
        got = (got,)
    if isinstance(expected, Tensor):
        expected = (expected,)
    worst = 0.0
    for one, wanted in zip(got, expected, strict=True):
        size = wanted.double().abs().max().clamp_min(1e-300)
        worst = max(worst, float((compare(one).double() - wanted.double()).abs().max() / size))
    return worst


def measure_limits() -> Limits:
    data = torch.ones(1 << 25)  # 128 MiB, past the caches
    a = torch.randn(1536, 1536)
    read, gemm = [], []
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        read.append(time.perf_counter() - start)
        start = time.perf_counter()
        a @ a
        gemm.append(time.perf_counter() - start)
    return Limits(data.numel() * 4 / min(read) / 1e9, 2 * 1536**3 / min(gemm) / 1e9)
