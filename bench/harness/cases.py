"""Check, then time: providers in turns in one process, beside limits measured in the same run.

Columns: median and interquartile range of the wall time of a call; `x best`, the time of the best
provider that is not ours and solves the same problem, over this one's; GB/s of the bytes that the
op must read and write once; GFLOP/s of the multiplications and additions in the op's definition
(two for each product, half of them where only a triangle is wanted); `of limit`, the share of the
time that those bytes take at the read bandwidth, or those FLOP at the fp32 FMA rate, whichever is
longer; and the error as a share of the largest value (of the largest |q||x| for scans). More than
100 % means cache, a cheaper way to compute the same, or instructions with a higher rate than fp32
FMA.

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
from typing import Any

import torch
from torch import Tensor

from bench.harness import limits as machine_limits
from bench.harness import results as stored
from bench.harness.limits import Limits
from logra_kernels import ops

Provider = Callable[[], Any]  # most return tensors; a case's `errors` know the others

OURS = "logra"  # the names of our providers start with it
SAMPLE_S = 5e-3
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass
class Case:
    """One table: a problem, the providers that solve it, and what it costs at least."""

    op: str
    title: str
    providers: dict[str, Provider]
    expected: Any  # a tensor or a tuple of tensors
    rtol: float  # in units of `unit`; a provider that is less accurate is not timed
    num_bytes: float
    flops: float
    compare: Callable[[Tensor], Tensor] = lambda result: result  # the part that is compared
    unit: float | None = None  # what errors are divided by; None for the largest expected value
    our_rtol: float | None = None  # for our providers; None for rtol
    # for providers that return something else: a function from their result to their error
    errors: dict[str, Callable[[Any], float]] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()  # providers that solve another problem: not in `x best`
    params: dict[str, object] = field(default_factory=dict)  # for readers of the results

    def error(self, name: str, result: Any) -> float:
        """The provider's error beside the expected result."""
        if name in self.errors:
            return self.errors[name](result)
        return largest_error(result, self.expected, self.compare, self.unit)

    def allowed(self, name: str) -> float:
        """The largest error that the provider may have."""
        if is_ours(name) and self.our_rtol is not None:
            return self.our_rtol
        return self.rtol

    def best(self, seconds: dict[str, float]) -> str | None:
        """The fastest provider that is not ours and solves the same problem."""
        rivals = [name for name in seconds if not is_ours(name) and name not in self.apart]
        return min(rivals, key=seconds.__getitem__, default=None)


@dataclass
class Row:
    """One provider's times and error for one case."""

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
    x_best: float | None  # the best rival's median over this one; None without a rival


@dataclass(frozen=True)
class Held:
    """A provider under one instruction set, which is chosen outside the timed calls."""

    call: Provider
    isa: str

    def __call__(self) -> Any:
        """Call the provider; the instruction set is chosen beforehand."""
        return self.call()


def is_ours(name: str) -> bool:
    """Whether a provider is this package."""
    return name.startswith(OURS)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="small problems, few rounds")
    made.add_argument("--threads", type=int, help="threads (default: torch's)")
    made.add_argument("--rounds", type=int, help="rounds of timing in turns")
    made.add_argument(
        "--isas", action="store_true", help="every instruction set, not the best only"
    )
    made.add_argument("--json", action="store_true", help="append to bench/results/<op>.jsonl")
    return made


def prepare(threads: int | None) -> None:
    """Set torch's threads, and the random generators to the same start in every run."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    random.seed(0)


def every_isa(providers: dict[str, Provider]) -> dict[str, Provider]:
    """Each of our providers once under each instruction set that this machine has."""
    found: dict[str, Provider] = {}
    for name, call in providers.items():
        if is_ours(name):
            found |= {f"{name} {isa}": Held(call, isa) for isa in ops.available_isas()}
        else:
            found[name] = call
    return found


@contextmanager
def instruction_set(provider: Provider) -> Iterator[None]:
    """Inside, the provider's instruction set is active; afterwards the one that was before."""
    if not isinstance(provider, Held):
        yield
        return
    before = ops.isa()
    ops.set_isa(provider.isa)
    try:
        yield
    finally:
        ops.set_isa(str(before))


def run_cases(
    cases: Iterable[Case], args: argparse.Namespace, folder: Path = stored.RESULTS
) -> list[Row]:
    """Run the cases under the machine's measured limits, one row a provider."""
    prepare(args.threads)
    with torch.no_grad():
        limits = machine_limits.measure(5 if args.quick else 9)
        print(machine_limits.header(limits))
        return [row for case in cases for row in run_case(case, limits, args, folder)]


def run_case(
    case: Case, limits: Limits, args: argparse.Namespace, folder: Path = stored.RESULTS
) -> list[Row]:
    """Check, time and print one case; append it to the stored results."""
    print(f"\n{case.op}: {case.title}")
    print(
        f"  {'provider':<28}{'median ms':>10}{'± ms':>9}{'x best':>9}"
        f"{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>12}{'error':>9}"
    )
    if args.isas:
        case.providers = every_isa(case.providers)
    good, errors, left_out = check(case)
    for name, why in left_out.items():
        print(f"  {name:<28} not timed: {why}")
    timed = {**good, **{name: call for name, (_, call) in machine_limits.probes().items()}}
    if args.rounds:
        times = time_providers(timed, args.rounds, args.rounds, budget_s=float("inf"))
    else:
        times = time_providers(
            timed, 5, 9 if args.quick else 15, budget_s=0.25 if args.quick else 0.6
        )
    limits = machine_limits.refined(limits, times)
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
        stored.append(case.op, record, folder)
    return rows


def check(case: Case) -> tuple[dict[str, Provider], dict[str, float], dict[str, str]]:
    """Call every provider once: those that are right, their errors, and what the others lack."""
    good, errors, left_out = {}, {}, {}
    for name, provider in case.providers.items():
        with instruction_set(provider):
            error = case.error(name, provider())
        if error <= case.allowed(name):  # False for a NaN
            good[name], errors[name] = provider, error
        else:
            left_out[name] = f"wrong by {error:.1e}, {case.allowed(name):.0e} allowed"
    return good, errors, left_out


def time_providers(
    providers: dict[str, Provider], least: int, most: int, budget_s: float
) -> dict[str, list[float]]:
    """Seconds a call, `least` to `most` samples each; a provider stops when its budget is used up.

    The order is drawn anew in each round: a provider that follows one that empties the cache pays
    for it.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    loops, spent = {}, dict.fromkeys(providers, 0.0)
    for name, provider in providers.items():
        loops[name], sample_s = loops_of(provider)
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


def loops_of(provider: Provider) -> tuple[int, float]:
    """How many calls make a sample of 5 ms, and the seconds of one call."""
    sample_s = sample(provider, 1)
    if sample_s < SAMPLE_S:  # once more: the first call may set things up
        sample_s = sample(provider, 1)
    return max(1, round(SAMPLE_S / max(sample_s, 1e-7))), sample_s


def sample(provider: Provider, loops: int) -> float:
    """The seconds that so many calls take."""
    with instruction_set(provider):
        call = provider.call if isinstance(provider, Held) else provider
        start = time.perf_counter()
        for _ in range(loops):
            call()
        return time.perf_counter() - start


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median seconds of each provider."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def summarise(
    case: Case, times: dict[str, list[float]], errors: dict[str, float], limits: Limits
) -> list[Row]:
    """A row for each provider that was timed."""
    seconds = medians({name: times[name] for name in errors})
    best = case.best(seconds)
    floor_s, limit = limits.floor(case.num_bytes, case.flops)
    rows = []
    for name, median_s in seconds.items():
        samples = times[name]
        quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [0.0] * 3
        provider = case.providers[name]
        isa = provider.isa if isinstance(provider, Held) else ops.isa()
        row = Row(
            provider=name,
            isa=isa if is_ours(name) else None,
            median_ms=median_s * 1e3,
            least_ms=min(samples) * 1e3,
            quartile_range_ms=(quartiles[2] - quartiles[0]) * 1e3,
            samples=len(samples),
            gb_per_s=case.num_bytes / median_s / 1e9,
            gflop_per_s=case.flops / median_s / 1e9,
            of_limit=floor_s / median_s,
            limit=limit,
            error=errors[name],
            x_best=None if best is None else seconds[best] / median_s,
        )
        rows.append(row)
    return rows


def largest_error(
    got: Any,
    expected: Any,
    compare: Callable[[Tensor], Tensor] = lambda result: result,
    unit: float | None = None,
) -> float:
    """Over all tensors: the largest difference, over the unit or the largest expected value."""
    got = (got,) if isinstance(got, Tensor) else got
    expected = (expected,) if isinstance(expected, Tensor) else expected
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
