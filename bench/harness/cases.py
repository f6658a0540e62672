"""Check, then time: providers interleaved in one process, beside limits measured in the same run.

Columns: median and interquartile range of the wall time of a call; `x best`, the time of the best
provider that is not ours and solves the same problem, over this one's; GB/s of the bytes the op
must read and write once; GFLOP/s of the multiplications and additions its definition has (two a
product, half of them where only a triangle is wanted); `of limit`, the share of the time that those
bytes take at the read bandwidth, or those FLOP at the fp32 FMA rate, whichever is longer, both
measured in turns with the providers; and the error, as a share of the largest value (of the largest
|q||x| for scans). More than 100 % means cache, a cheaper way to compute the same, or instructions
with a higher rate than fp32 FMA.

A call shorter than 5 ms is repeated until a sample takes that long, so its operands are in cache.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench import _limits, _results
from bench._limits import Limits
from logra_kernels import ops

Result = Tensor | tuple[Tensor, ...]
Provider = Callable[[], Result]

OURS = "logra"  # our providers' names start with it
SAMPLE_S = 5e-3


@dataclass
class Case:
    """One table: a problem, the ways to solve it, and what it costs at least."""

    op: str
    title: str
    providers: dict[str, Provider]
    expected: Result
    rtol: float  # of the unit; a provider that is less accurate is not timed
    num_bytes: float
    flops: float
    compare: Callable[[Tensor], Tensor] = lambda result: result  # the part that is compared
    unit: float | None = None  # what errors are measured in; None for the largest expected value
    our_rtol: float | None = None  # for our providers; None for rtol
    # for providers that return something else: their error, in the unit
    errors: dict[str, Callable[[Result], float]] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()  # providers that solve another problem: not in `x best`
    params: dict[str, object] = field(default_factory=dict)  # for readers of the results

    def error(self, name: str, result: Result) -> float:
        if name in self.errors:
            return self.errors[name](result)
        return largest_error(result, self.expected, self.compare, self.unit)

    def allowed(self, name: str) -> float:
        ours = name.startswith(OURS) and self.our_rtol is not None
        return self.our_rtol if ours else self.rtol


@dataclass
class Row:
    provider: str
    isa: str | None  # of our kernels; None for others
    median_ms: float
    least_ms: float
    quartile_range_ms: float
    samples: int
    gb_per_s: float
    gflop_per_s: float
    of_limit: float
    limit: str
    error: float
    x_best: float | None  # best median that is neither ours nor apart, over this one


@dataclass(frozen=True)
class Held:
    """A provider under an instruction set of ours, which is chosen outside the timed calls."""

    call: Provider
    isa: str

    def __call__(self) -> Result:
        return self.call()


def arguments(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    return common_parser(description).parse_args(argv)


def common_parser(description: str | None) -> argparse.ArgumentParser:
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
    return parser


def isa_providers(name: str, call: Provider, every: bool) -> dict[str, Provider]:
    """`call` under the active instruction set, or under each that this machine has."""
    if not every:
        return {name: call}
    return {f"{name} {isa}": Held(call, isa) for isa in ops.available_isas()}


@contextmanager
def instruction_set(provider: Provider) -> Iterator[None]:
    """Ours as the provider wants it, and as it was before."""
    before = ops.isa()
    if isinstance(provider, Held) and provider.isa != before:
        ops.set_isa(provider.isa)
        try:
            yield
        finally:
            ops.set_isa(str(before))
    else:
        yield


def run_cases(
    cases: Iterable[Case], args: argparse.Namespace, results: Path = _results.RESULTS
) -> list[Row]:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        limits = _limits.measure(5 if args.quick else 9)
        print(f"{torch.get_num_threads()} threads, isa {ops.isa()}, {limits.line()}")
        return [row for case in cases for row in run_case(case, limits, args, results)]


def run_case(
    case: Case, limits: Limits, args: argparse.Namespace, results: Path = _results.RESULTS
) -> list[Row]:
    print(f"\n{case.op}: {case.title}")
    print(
        f"  {'provider':<28}{'median ms':>10}{'± ms':>9}{'x best':>9}"
        f"{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>12}{'error':>9}"
    )
    good, errors, left_out = check(case)
    for name, why in left_out.items():
        print(f"  {name:<28} not timed: {why}")
    timed = {**good, **{name: call for name, (_, call) in _limits.probes().items()}}
    if args.rounds:
        times = time_providers(timed, args.rounds, args.rounds, budget_s=float("inf"))
    else:
        times = time_providers(
            timed, 5, 9 if args.quick else 15, budget_s=0.25 if args.quick else 0.6
        )
    read_s, fma_s = (statistics.median(times.pop(name)) for name in (_limits.READ, _limits.FMA))
    limits = _limits.refined(limits, read_s, fma_s)
    rows = summarise(case, times, errors, limits)
    for row in rows:
        ratio = "" if row.x_best is None else f"{row.x_best:.2f}"
        print(
            f"  {row.provider:<28}{row.median_ms:>10.3f}{row.quartile_range_ms:>9.3f}{ratio:>9}"
            f"{row.gb_per_s:>8.1f}{row.gflop_per_s:>9.1f}"
            f"{f'{row.of_limit:.0%} {row.limit}':>12}{row.error:>9.0e}"
        )
    if args.json:
        record = {
            "bench": case.op,
            "case": f"{case.title}, {torch.get_num_threads()} threads",
            "params": case.params,
            "limits": asdict(limits),
            "providers": [asdict(row) for row in rows],
            "left_out": left_out,
        }
        _results.append(case.op, record, results)
    return rows


def check(case: Case) -> tuple[dict[str, Provider], dict[str, float], dict[str, str]]:
    """Every provider once: those that are right, their errors, and why the others are not timed."""
    good, errors, left_out = {}, {}, {}
    for name, provider in case.providers.items():
        with instruction_set(provider):
            error = case.error(name, provider())
        if error <= case.allowed(name):  # a NaN is not
            good[name], errors[name] = provider, error
        else:
            left_out[name] = f"wrong by {error:.1e}, {case.allowed(name):.0e} allowed"
    return good, errors, left_out


def time_providers(
    providers: dict[str, Provider], least: int, most: int, budget_s: float
) -> dict[str, list[float]]:
    """Seconds a call, `least` to `most` samples each: a provider stops once it took its budget.

    Each takes its turn behind each: who comes after one that empties the cache pays for it.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    loops, spent = {}, dict.fromkeys(providers, 0.0)
    for name, provider in providers.items():
        sample_s = sample(provider, 1)
        if sample_s < SAMPLE_S:  # once more: the first call may set things up
            sample_s = sample(provider, 1)
        loops[name] = max(1, round(SAMPLE_S / max(sample_s, 1e-7)))
        if sample_s > budget_s:  # so slow that this is one of its samples
            times[name].append(sample_s)
            spent[name] = sample_s
    for _ in range(most):
        order = [
            name
            for name in providers
            if spent[name] < budget_s
            or len(times[name]) < (2 if spent[name] > 4 * budget_s else least)
        ]
        random.shuffle(order)
        for name in order:
            taken_s = sample(providers[name], loops[name])
            times[name].append(taken_s / loops[name])
            spent[name] += taken_s
    return times


def sample(provider: Provider, loops: int) -> float:
    """Seconds for so many calls."""
    with instruction_set(provider):
        call = provider.call if isinstance(provider, Held) else provider
        start = time.perf_counter()
        for _ in range(loops):
            call()
        return time.perf_counter() - start


def summarise(
    case: Case, times: dict[str, list[float]], errors: dict[str, float], limits: Limits
) -> list[Row]:
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    others = [
        median
        for name, median in medians.items()
        if not name.startswith(OURS) and name not in case.apart
    ]
    floor_s, limit = limits.floor(case.num_bytes, case.flops)
    rows = []
    for name, median_s in medians.items():
        seconds = times[name]
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [0.0] * 3
        ours = name.startswith(OURS)
        provider = case.providers[name]
        isa = provider.isa if isinstance(provider, Held) else ops.isa()
        row = Row(
            provider=name,
            isa=isa if ours else None,
            median_ms=median_s * 1e3,
            least_ms=min(seconds) * 1e3,
            quartile_range_ms=(quartiles[2] - quartiles[0]) * 1e3,
            samples=len(seconds),
            gb_per_s=case.num_bytes / median_s / 1e9,
            gflop_per_s=case.flops / median_s / 1e9,
            of_limit=floor_s / median_s,
            limit=limit,
            error=errors[name],
            x_best=min(others) / median_s if others else None,
        )
        rows.append(row)
    return rows


def largest_error(
    got: Result,
    expected: Result,
    compare: Callable[[Tensor], Tensor] = lambda result: result,
    unit: float | None = None,
) -> float:
    """Over all tensors: the largest difference, over the unit or the largest expected value."""
    if isinstance(got, Tensor):
        got = (got,)
    if isinstance(expected, Tensor):
        expected = (expected,)
    worst = 0.0
    for one, wanted in zip(got, expected, strict=True):
        one = compare(one).double()
        if one.shape != wanted.shape:
            return float("inf")
        if not wanted.numel():
            continue
        size = unit if unit is not None else float(wanted.double().abs().max().clamp_min(1e-300))
        worst = max(worst, float((one - wanted.double()).abs().max().nan_to_num(torch.inf)) / size)
    return worst
