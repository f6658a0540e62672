"""Measure the GPU kernels' configurations on the GPU that is here, and rewrite their table.

    python -m tools.tune                       # everything, for the GPU that is here
    python -m tools.tune --only scores project
    python -m tools.tune --list --architecture sm_90    # what would be tried; needs no GPU

Each candidate is first compiled ahead of time. A candidate that the gate (tools/assembly.py)
refuses is never run. The others are compared with the plain PyTorch reference, then timed.
Measurements are kept in a file, so that a run that was stopped continues where it was.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logra_kernels import reference
from logra_kernels import triton as launchers
from logra_kernels.triton import heuristics
from logra_kernels.triton.catalogue import recorded
from logra_kernels.triton.heuristics import Rules, Table
from logra_kernels.triton.launch import architecture_of, trying
from tools.assembly import about, problems
from tools.timing import Timer

Config = dict[str, int]
Pair = tuple[Callable[[], Any], Callable[[], Any]]  # a call of our launcher, and of the reference
PRECISION = {"half": "ieee", "full": "ieee", "tf32": "tf32", "split": "bf16x6"}
HALF, FULL = torch.float16, torch.float32


class Random(NamedTuple):
    """An argument of normal values, which are drawn when a problem is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def on(self, device: str) -> Tensor:
        """The values; on the meta device, which draws nothing, only the shape."""
        if device == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.randn(self.shape, device=device, dtype=FULL).to(self.dtype)


@dataclass(frozen=True)
class Problem:
    """The calls that a rule of the table is measured by."""

    op: str  # of the table
    types: str | None  # None: the op has one rule for all
    launcher: str
    arguments: tuple[Any, ...]
    up_to: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The op, the types and the bounds of the sizes."""
        sizes = [f"{size} <= {value}" for size, value in self.up_to.items()]
        return ", ".join([self.op, *filter(None, [self.types]), *sizes])

    def make(self, device: str) -> Pair:
        """The calls on tensors of a device. What an op in place adds to is zero at each call."""
        made = [one.on(device) if isinstance(one, Random) else one for one in self.arguments]
        how = {"input_precision": PRECISION[self.types]} if self.types is not None else {}

        def call(function: Callable[..., Any], **options: str) -> Any:
            if not self.launcher.endswith("_"):
                return function(*made, **options)
            sums = torch.zeros_like(made[0])
            function(sums, *made[1:], **options)
            return sums

        ours, theirs = getattr(launchers, self.launcher), getattr(reference, self.launcher)
        return partial(call, ours, **how), partial(call, theirs)


def problems_to_measure() -> Iterator[Problem]:
    """One for each op, types and size class: the widths of a 7B model, K = 64, 8,192 tokens."""
    queries = [Random(FULL, (count, 8192)) for count in (1, 64)]
    scans: tuple[tuple[str, tuple[int, ...]], ...] = ("scores", ()), ("topk_scores", (20,))
    for types in heuristics.TYPES:
        dtype = HALF if types == "half" else FULL
        wide, small = Random(dtype, (16, 512, 4096)), Random(dtype, (16, 512, 64))
        proj, rows = Random(dtype, (64, 4096)), Random(dtype, (65_536, 8192))
        one_side, covariance = (small, wide, None, proj), Random(FULL, (4096, 4096))
        yield Problem("project", types, "project", (wide, proj))
        yield Problem("projected_gradients", types, "projected_gradients", (wide, wide, proj, proj))
        yield Problem("one_sided_gradients", types, "projected_gradients", one_side)
        yield Problem("per_sample_gradients", types, "per_sample_gradients", (small, small))
        folded = covariance, Random(dtype, (8192, 4096))
        yield Problem("covariance_update_", types, "covariance_update_", folded)
        for op, k in scans:
            if types == "half":
                yield Problem(op, types, op, (queries[0], rows, *k), {"queries": 16})
            yield Problem(op, types, op, (queries[1], rows, *k))
        scored = Random(dtype, (16_384, 4096)), covariance
        yield Problem("self_influence", types, "self_influence", scored)
    small, packed = Random(HALF, (16, 512, 64)), Random(HALF, (4096, 16_384))
    yield Problem("reduce_gradients", None, "per_sample_gradients", (small, small))
    folded = Random(FULL, (512, 512)), Random(HALF, (32_768, 512))
    yield Problem("add_covariances", None, "covariance_update_", folded)
    for op in ("merge_topk", "state_topk"):
        scanned = queries[1], Random(HALF, (65_536, 8192)), 20
        yield Problem(op, None, "topk_scores", scanned)
    columns = [16_384], [0]
    yield Problem("pack_rows", None, "pack_rows", (Random(FULL, packed.shape), *columns))
    yield Problem("unpack_rows", None, "unpack_rows", (packed, Random(FULL, (4096,)), *columns))


KERNELS = {
    "project": "_project_kernel",
    "projected_gradients": "_gradients_kernel",
    "one_sided_gradients": "_gradients_kernel",
    "per_sample_gradients": "_gradients_kernel",
    "reduce_gradients": "_reduce_kernel",
    "covariance_update_": "_covariance_kernel",
    "add_covariances": "_add_kernel",
    "scores": "_scores_kernel",
    "topk_scores": "_candidates_kernel",
    "merge_topk": "_merge_kernel",
    "state_topk": "_state_kernel",
    "self_influence": "_self_influence_kernel",
    "pack_rows": "_pack_kernel",
    "unpack_rows": "_unpack_kernel",
}
# The tiles that are tried.
SPACE: dict[str, dict[str, tuple[int, ...]]] = {
    "project": {"TOKENS": (32, 64, 128), "WIDTH": (32, 64, 128), "RANK": (32, 64)},
    "projected_gradients": {
        "CHUNK": (128, 256),
        "BLOCK": (32, 64, 128),
        "WIDTH": (32, 64),
        "RANK": (32, 64),
    },
    "one_sided_gradients": {
        "CHUNK": (128, 256),
        "BLOCK": (16, 32, 64, 128),
        "WIDTH": (32, 64),
        "RANK": (32, 64),
    },
    "per_sample_gradients": {"CHUNK": (128, 256), "BLOCK": (16, 32, 64), "RANK": (32, 64)},
    "reduce_gradients": {"REDUCE": (512, 1024, 2048)},
    "covariance_update_": {"BLOCK": (16, 32, 64), "TILE": (64, 128)},
    "add_covariances": {"ROWS": (8, 16, 32)},
    "scores": {"ROWS": (64, 128, 256), "QUERIES": (16, 32, 64), "DIM": (32, 64, 128)},
    "topk_scores": {"ROWS": (64, 128), "QUERIES": (16, 32, 64), "DIM": (32, 64, 128)},
    "merge_topk": {"MERGE": (512, 1024, 2048)},
    "state_topk": {"OTHERS": (8, 16, 32)},
    "self_influence": {"ROWS": (64, 128), "QUERIES": (32, 64, 128), "DIM": (32, 64, 128)},
    "pack_rows": {"BLOCK": (512, 1024, 2048, 4096)},
    "unpack_rows": {"BLOCK": (512, 1024, 2048, 4096)},
}
PIPELINED = {
    *("project", "projected_gradients", "one_sided_gradients", "per_sample_gradients"),
    *("covariance_update_", "scores", "topk_scores", "self_influence"),
}


def candidates(problem: Problem) -> Iterator[Config]:
    """Every configuration worth compiling; no two of them are the same for this problem."""
    space = SPACE[problem.op]
    stages = (2, 3, 4) if problem.op in PIPELINED else (1,)
    for *tiles, warps, depth in itertools.product(*space.values(), (4, 8), stages):
        config = dict(zip(space, tiles, strict=True))
        queries = problem.up_to.get("queries")
        if config.get("CHUNK", 0) % config.get("BLOCK", 1):
            continue
        if queries is not None and config["QUERIES"] > queries:
            continue
        yield config | {"num_warps": warps, "num_stages": depth}


# Milliseconds of a problem under a configuration, or why that is not to be used.
Measure = Callable[[Problem, Config], float | str]


class OnGpu:
    """The measure of a GPU: compile, compare with the reference, time."""

    def __init__(self, architecture: str, device: str = "cuda") -> None:
        self.architecture, self.device = architecture, device
        self._of: tuple[str, Any, list[Tensor]] | None = None  # the last problem's call and results
        self.timer = Timer(repeats=15)

    def __call__(self, problem: Problem, config: Config) -> float | str:
        """Milliseconds, or why the configuration is not to be used."""
        if bad := refused(problem, config, self.architecture):
            return bad
        if self._of is None or self._of[0] != problem.name:
            self._of = None  # frees the last problem's memory
            ours, expected = problem.make(self.device)
            self._of = problem.name, ours, _tensors(expected())
        _, ours, want = self._of
        with trying(problem.op, config):
            if error := wrong(_tensors(ours()), want, problem.types == "tf32"):
                return error
            return 1e3 * self.timer.median_s(ours)


def refused(problem: Problem, config: Config, architecture: str) -> str:
    """Why the gate does not let the configuration run; "" if it does. Needs no GPU."""
    ours, _ = problem.make("meta")
    with trying(problem.op, config):
        entries = recorded(problem.name, architecture, ours)
    for entry in entries:
        if entry.kernel_name != KERNELS[problem.op]:
            continue  # launched beside it, with tiles of another rule
        try:
            found = problems(about(entry, entry.compile()), architecture)
        except Exception as error:  # one of the compiler's: it has no such configuration
            found = [f"does not compile: {type(error).__name__}"]
        if found:
            return f"{entry.kernel_name}: {'; '.join(found)}"
    return ""


def wrong(got: list[Tensor], want: list[Tensor], rounded: bool) -> str:
    """Why results are refused; "" if they are good.

    They may be off by 1e-3 of the reference's largest value, or by 1e-2 of it for tf32.
    """
    for mine, theirs in zip(got, want, strict=True):
        limit = (1e-2 if rounded else 1e-3) * float(theirs.abs().max())
        error = float((mine.float() - theirs.float()).abs().max())
        if not error <= limit:
            return f"wrong: off by {error:.3g}, allowed is {limit:.3g}"
    return ""


def _tensors(result: Any) -> list[Tensor]:
    """A call's results without ids: which of two nearly equal scores is selected is no error."""
    tensors = [result] if isinstance(result, Tensor) else result
    return [tensor for tensor in tensors if tensor.is_floating_point()]


Results = dict[str, dict[str, float | str]]  # {problem: {configuration as JSON: ms or why not}}


def search(
    problems: list[Problem], measure: Measure, state: Path, say: Callable[[str], None]
) -> Results:
    """Measure what the state file lacks, and write the file after every measurement."""
    results: Results = json.loads(state.read_text()) if state.exists() else {}
    work = [(problem, config) for problem in problems for config in candidates(problem)]
    begun = time.monotonic()
    for done, (problem, config) in enumerate(work, 1):
        of_problem, key = results.setdefault(problem.name, {}), json.dumps(config)
        if key in of_problem:
            continue
        of_problem[key] = found = measure(problem, config)
        text = f"{found:.4f} ms" if isinstance(found, float) else found
        say(f"[{done}/{len(work)}, {time.monotonic() - begun:.0f} s] {problem.name} {key}: {text}")
        temporary = state.with_suffix(".part")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(state)
    return results


def rewritten(table: Table, architecture: str, problems: list[Problem], results: Results) -> Table:
    """The table with rules for this architecture: the fastest configuration of each problem.

    Problems that differ in a size that a split into calls can change get the same tiles along the
    summed axes: those with the least sum of times, each divided by its problem's best time. Where
    nothing was measured, the rules that held so far stay.
    """
    new: Table = json.loads(json.dumps(table))
    for op in {problem.op: None for problem in problems}:
        mine = [problem for problem in problems if problem.op == op]
        rules: Rules = []
        for types in dict.fromkeys(problem.types for problem in mine):
            some = [problem for problem in mine if problem.types == types]
            rules += _rules(op, some, results)
        if rules:
            before = heuristics.rules_of(new[op], architecture)
            measured = {rule.get("types") for rule in rules}
            kept = [] if None in measured else [r for r in before if r["types"] not in measured]
            new[op][architecture] = rules + kept
    found = heuristics.problems(new)
    if found:
        raise ValueError("the new table is not good: " + "; ".join(found))
    return new


def _rules(op: str, problems: list[Problem], results: Results) -> Rules:
    times: list[dict[str, float]] = []
    for problem in problems:
        of_problem = results.get(problem.name, {})
        times.append({key: ms for key, ms in of_problem.items() if isinstance(ms, float)})
    if not all(times):
        return []
    summed = [name for name in heuristics.TILES[op] if name in heuristics.SUMMED]

    def extents(key: str) -> tuple[int, ...]:
        config = json.loads(key)
        return tuple(config[name] for name in summed)

    shared = set.intersection(*({extents(key) for key in one} for one in times))
    if not shared:
        return []

    def cost(which: tuple[int, ...]) -> float:
        return sum(
            min(ms for key, ms in one.items() if extents(key) == which) / min(one.values())
            for one in times
        )

    best = min(sorted(shared), key=cost)
    rules = []
    for problem, one in zip(problems, times, strict=True):
        key = min((k for k in one if extents(k) == best), key=lambda k: one[k])
        rule: dict[str, Any] = {} if problem.types is None else {"types": problem.types}
        if problem.up_to:
            rule["up_to"] = problem.up_to
        rules.append(rule | {"config": json.loads(key)})
    # The first rule that holds is taken, so rules for small sizes come first.
    return sorted(rules, key=lambda rule: tuple(rule.get("up_to", {"": 1 << 62}).values()))


def main(arguments: list[str] | None = None) -> int:
    """Tune the ops that the command line asks for, and rewrite the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", metavar="OP", choices=list(SPACE), help="these ops")
    parser.add_argument("--table", type=Path, default=heuristics.PATH, help="the file to rewrite")
    parser.add_argument("--state", type=Path, help="measurements, to go on from")
    parser.add_argument("--list", action="store_true", help="say what would be tried, run nothing")
    parser.add_argument("--architecture", help="for --list: sm_90, gfx942, …")
    chosen = parser.parse_args(arguments)
    problems = [p for p in problems_to_measure() if p.op in (chosen.only or SPACE)]
    if chosen.list:
        architecture = chosen.architecture or "sm_90"
        for problem in problems:
            for config in candidates(problem):
                said = refused(problem, config, architecture) or "would be measured"
                print(f"{problem.name} {json.dumps(config)}: {said}", flush=True)
        return 0
    if not torch.cuda.is_available():
        print("tune: needs a GPU that torch can use, found none", file=sys.stderr)
        return 2
    architecture = architecture_of(torch.empty(0, device="cuda"))
    state = chosen.state or Path(f"tune-{architecture}.json")
    results = search(problems, OnGpu(architecture), state, lambda text: print(text, flush=True))
    table = rewritten(json.loads(chosen.table.read_text()), architecture, problems, results)
    chosen.table.write_text(heuristics.dumps(table))
    print(f"{chosen.table}: rules for {architecture} written from {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
