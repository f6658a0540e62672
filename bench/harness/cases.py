"""Check, then time: providers in turns in one process, beside limits measured in the same run.

Columns: median and spread (interquartile range) of the wall time of a call; `x_best`, the time of
the best provider that is not ours and solves the same problem, over this one's; GB/s of the bytes
that must be read and written once; GFLOP/s of the multiplications and additions in the definition
(two for each product, half of them where only a triangle is wanted); `of_limit`, the share of the
time that those bytes take at the read bandwidth, or those FLOP at the fp32 FMA rate, whichever is
longer; and the error as a share of the largest value (of the largest |q||x| for scans). More than
1 means cache, a cheaper way to compute the same, or instructions with a higher rate than fp32 FMA.

A call shorter than 5 ms is repeated until a sample takes that long, so its operands are in cache.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.harness import results
from bench.harness.limits import Limits, probes
from bench.harness.tables import table
from logra_kernels import ops

Call = Callable[[], Any]  # most return tensors; a case's `errors` know the others

OURS = "logra"  # the names of our providers start with it
SAMPLE_S = 5e-3
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "quick": {"action": "store_true", "help": "small problems, few rounds"},
    "threads": {"type": int, "help": "threads (default: torch's)"},
    "rounds": {"type": int, "help": "rounds of timing in turns"},
    "json": {"action": "store_true", "help": "append to bench/results/"},
}


@dataclass
class Case:
    """One table: a problem, the providers that solve it, and what it costs at least."""

    op: str
    title: str
    providers: dict[str, Call]
    expected: Any  # a tensor or a tuple of tensors
    rtol: float  # in units of `unit`; a provider that is less accurate is not timed
    num_bytes: float = 0.0
    flops: float = 0.0
    our_rtol: float | None = None  # for our providers; None for rtol
    compare: Callable[[Tensor], Tensor] = lambda result: result  # the part that is compared
    unit: float | None = None  # what errors are divided by; None for the largest expected value
    # for providers that return something else: a function from their result to their error
    errors: dict[str, Callable[[Any], float]] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()  # providers that solve another problem: not in `x_best`
    before: Call | None = None  # done before each sample, outside the timing
    params: dict[str, object] = field(default_factory=dict)  # for readers of the results

    def error(self, name: str, result: Any) -> float:
        """The provider's error beside the expected result."""
        if name in self.errors:
            return self.errors[name](result)
        return largest_error(result, self.expected, self.compare, self.unit)

    def allowed(self, name: str) -> float:
        """The largest error that the provider may have."""
        return self.our_rtol if is_ours(name) and self.our_rtol is not None else self.rtol

    def best(self, seconds: dict[str, float]) -> str | None:
        """The fastest provider that is not ours and solves the same problem."""
        rivals = [name for name in seconds if not is_ours(name) and name not in self.apart]
        return min(rivals, key=seconds.__getitem__, default=None)


@dataclass(frozen=True)
class Effort:
    """How many samples of a provider: `least` to `most`, until they have taken budget_s."""

    least: int = 5
    most: int = 15
    budget_s: float = 0.6


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def options(description: str | None, *names: str) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks share; names: those of them that this one has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in names or OPTIONS:
        made.add_argument(f"--{name}", **OPTIONS[name])
    return made


def effort(args: argparse.Namespace) -> Effort:
    if args.rounds:
        return Effort(args.rounds, args.rounds, float("inf"))
    return Effort(5, 9, 0.25) if args.quick else Effort()


def prepare(threads: int | None = None) -> None:
    """Set torch's threads, and the random generators to the same start in every run."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    random.seed(0)


def run_cases(cases: Iterable[Case], args: argparse.Namespace) -> None:
    """Check, time and print the cases; append them to the stored results."""
    prepare(args.threads)
    with torch.no_grad():
        for case in cases:
            publish(measure(case, effort(args)), args.json)


def measure(case: Case, spend: Effort, limited: bool = True) -> dict[str, Any]:
    """The record of one case: a row for each provider that is right, why others are left out.

    Without `limited` the machine's limits are not measured, and no row is beside them.
    """
    errors, left_out = check(case)
    calls = {name: case.providers[name] for name in errors}
    beside = {name: call for name, (_, call) in probes().items()} if limited else {}
    times = time_in_turns({**calls, **beside}, spend, case.before)
    limits = Limits.of(times) if limited else None
    seconds = medians({name: times[name] for name in errors})
    best = case.best(seconds)
    rows = []
    for name, median_s in seconds.items():
        row: dict[str, Any] = {
            "provider": name,
            "median_ms": median_s * 1e3,
            "spread_ms": spread(times[name]) * 1e3,
            "x_best": None if best is None else seconds[best] / median_s,
            "gb_per_s": case.num_bytes / median_s / 1e9 if case.num_bytes else None,
            "gflop_per_s": case.flops / median_s / 1e9 if case.flops else None,
        }
        if limits is not None:
            floor_s, limit = limits.floor(case.num_bytes, case.flops)
            row |= {"of_limit": floor_s / median_s, "limit": limit}
        rows.append({**row, "error": errors[name]})
    return {
        "bench": case.op,
        "case": f"{case.title}, {torch.get_num_threads()} threads",
        "isa": ops.isa(),
        "params": case.params,
        "limits": None if limits is None else asdict(limits),
        "best": best,
        "providers": rows,
        "left_out": left_out,
    }


def publish(record: dict[str, Any], store: bool) -> None:
    """Print a record's table; append it to bench/results/<bench>.jsonl if it is to be stored."""
    print(f"\n{record['bench']}: {record['case']}")
    print(table(record["providers"]))
    for name, why in record["left_out"].items():
        print(f"{name} is not timed: {why}")
    if store:
        results.append(record["bench"], record)


def check(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Call every provider once: the errors of those that are right, and what the others lack."""
    errors, left_out = {}, {}
    for name, call in case.providers.items():
        if case.before is not None:
            case.before()
        error = case.error(name, call())
        if error <= case.allowed(name):  # False for a NaN
            errors[name] = error
        else:
            left_out[name] = f"wrong by {error:.1e}, {case.allowed(name):.0e} allowed"
    return errors, left_out


def time_in_turns(
    calls: dict[str, Call], spend: Effort, before: Call | None = None
) -> dict[str, list[float]]:
    """Seconds a call; each stops when its budget is used up, those far beyond after two samples.

    The order is drawn anew in each round: a provider that follows one that empties the cache pays
    for it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    loops, spent = {}, dict.fromkeys(calls, 0.0)
    for name, call in calls.items():
        loops[name], sample_s = loops_of(call, before)
        if sample_s > spend.budget_s:  # so slow that this is one of its samples
            times[name].append(sample_s)
            spent[name] = sample_s
    for _ in range(spend.most):
        order = [
            name
            for name in calls
            if spent[name] < spend.budget_s
            or len(times[name]) < (2 if spent[name] > 4 * spend.budget_s else spend.least)
        ]
        random.shuffle(order)
        for name in order:
            taken_s = sample(calls[name], loops[name], before)
            times[name].append(taken_s / loops[name])
            spent[name] += taken_s
    return times


def loops_of(call: Call, before: Call | None = None) -> tuple[int, float]:
    """How many calls make a sample of 5 ms, and the seconds of one call."""
    sample_s = sample(call, 1, before)
    if sample_s < SAMPLE_S:  # once more: the first call may set things up
        sample_s = sample(call, 1, before)
    # what is done before a sample holds for one call only
    return 1 if before else max(1, round(SAMPLE_S / max(sample_s, 1e-7))), sample_s


def sample(call: Call, loops: int, before: Call | None = None) -> float:
    """The seconds that so many calls take."""
    if before is not None:
        before()
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return time.perf_counter() - start


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def spread(samples: list[float]) -> float:
    """The interquartile range."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [0.0] * 3
    return quartiles[2] - quartiles[0]


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
