"""Measure the GPU kernels' configurations on the GPU that is here, and rewrite their table.

    python -m bench.tune                       # everything, for the GPU that is here
    python -m bench.tune --only scores project
    python -m bench.tune --list --architecture sm_90    # what would be tried; needs no GPU

Each candidate is compiled ahead of time first: one that spills, takes too much shared memory,
copies less than 16 bytes at a time or meets the wrong matrix unit is never run (the gate of
tests/test_triton_ahead_of_time.py). What is left is checked against the plain PyTorch reference,
then timed. Measurements are kept in a file, so that a run that was stopped goes on where it was.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from logra_kernels import reference
from logra_kernels.triton import (
    _launch,
    covariance_update_,
    heuristics,
    pack_rows,
    per_sample_gradients,
    project,
    projected_gradients,
    scores,
    self_influence,
    topk_scores,
    unpack_rows,
)

Config = dict[str, int]
Rules = dict[str, dict[str, list[dict[str, Any]]]]
TYPES = {"half": torch.float16, "full": torch.float32, "tf32": torch.float32, "split": None}
PRECISION = {"half": "ieee", "full": "ieee", "tf32": "tf32", "split": "bf16x6"}


@dataclass(frozen=True)
class Problem:
    """What a rule of the table is measured by."""

    op: str  # of the table
    types: str | None  # None: the op has one rule for all
    make: Callable[[str], tuple[Callable[[], Any], Callable[[], Any]]]  # device -> ours, reference
    up_to: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        sizes = [f"{size} <= {value}" for size, value in self.up_to.items()]
        return ", ".join([self.op, *filter(None, [self.types]), *sizes])


def randn(*shape: int, dtype: torch.dtype = torch.float16, device: str) -> Tensor:
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def problems_to_measure() -> Iterator[Problem]:
    """One for each op, types and size class: the widths of a 7B model, K = 64, 8,192 tokens."""
    for types in heuristics.TYPES:
        dtype, how = TYPES[types] or torch.float32, {"input_precision": PRECISION[types]}
        yield Problem("project", types, _project(dtype, how))
        yield Problem("projected_gradients", types, _gradients(dtype, how, "both"))
        yield Problem("one_sided_gradients", types, _gradients(dtype, how, "out"))
        yield Problem("per_sample_gradients", types, _gradients(dtype, how, "none"))
        yield Problem("covariance_update_", types, _covariance(dtype, how))
        for op in ("scores", "topk_scores"):
            if types == "half":
                yield Problem(op, types, _scan(op, 1, dtype, how), {"queries": 16})
            yield Problem(op, types, _scan(op, 64, dtype, how))
        yield Problem("self_influence", types, _self_influence(dtype, how))
    half = torch.float16, {"input_precision": "ieee"}
    yield Problem("reduce_gradients", None, _gradients(*half, "none"))
    yield Problem("add_covariances", None, _covariance(*half, few=True))
    yield Problem("merge_topk", None, _scan("topk_scores", 64, *half))
    yield Problem("state_topk", None, _scan("topk_scores", 64, *half))
    yield Problem("pack_rows", None, _pack())
    yield Problem("unpack_rows", None, _unpack())


def _project(dtype: torch.dtype, how: dict[str, str]) -> Any:
    def make(device: str) -> Any:
        x = randn(16, 512, 4096, dtype=dtype, device=device)
        proj = randn(64, 4096, dtype=dtype, device=device)
        return (lambda: project(x, proj, **how)), (lambda: reference.project(x, proj))

    return make


def _gradients(dtype: torch.dtype, how: dict[str, str], sides: str) -> Any:
    def make(device: str) -> Any:
        wide, proj = (16, 512, 4096), randn(64, 4096, dtype=dtype, device=device)
        x = randn(*(wide if sides == "both" else (16, 512, 64)), dtype=dtype, device=device)
        dy = randn(*(wide if sides != "none" else (16, 512, 64)), dtype=dtype, device=device)
        if sides == "none":
            ours: Any = lambda: per_sample_gradients(x, dy, **how)  # noqa: E731
            return ours, lambda: reference.per_sample_gradients(x, dy)
        operands = x, dy, proj if sides == "both" else None, proj
        return (
            lambda: projected_gradients(*operands, **how),
            lambda: reference.projected_gradients(*operands),
        )

    return make


def _covariance(dtype: torch.dtype, how: dict[str, str], few: bool = False) -> Any:
    def make(device: str) -> Any:
        size, count = (512, 32_768) if few else (4096, 8192)
        rows = randn(count, size, dtype=dtype, device=device)

        def ours() -> Tensor:
            cov = torch.zeros(size, size, device=device)
            covariance_update_(cov, rows, **how)
            return cov

        return ours, lambda: reference.covariance_update_(
            torch.zeros(size, size, device=device), rows
        )

    return make


def _scan(op: str, num_queries: int, dtype: torch.dtype, how: dict[str, str]) -> Any:
    def make(device: str) -> Any:
        rows = randn(65_536, 8192, dtype=dtype, device=device)
        queries = randn(num_queries, 8192, dtype=torch.float32, device=device)
        if op == "scores":
            return (
                lambda: scores(queries, rows, **how),
                lambda: reference.scores(queries, rows),
            )
        # which of two nearly equal scores is taken is no error: the values are compared
        return (
            lambda: topk_scores(queries, rows, 20, **how)[::2],
            lambda: reference.topk_scores(queries, rows, 20)[::2],
        )

    return make


def _self_influence(dtype: torch.dtype, how: dict[str, str]) -> Any:
    def make(device: str) -> Any:
        rows = randn(16_384, 4096, dtype=dtype, device=device)
        factor = randn(4096, 4096, dtype=torch.float32, device=device)
        return (
            lambda: self_influence(rows, factor, **how),
            lambda: reference.self_influence(rows, factor),
        )

    return make


def _pack() -> Any:
    def make(device: str) -> Any:
        rows = randn(4096, 16_384, dtype=torch.float32, device=device)
        arguments: Any = [16_384], [0]
        return (
            lambda: pack_rows(rows, *arguments),
            lambda: reference.pack_rows(rows, *arguments),
        )

    return make


def _unpack() -> Any:
    def make(device: str) -> Any:
        packed = randn(4096, 16_384, device=device)
        scale = torch.ones(4096, device=device)
        arguments: Any = packed, scale, [16_384], [0]
        return (
            lambda: unpack_rows(*arguments),
            lambda: reference.unpack_rows(*arguments),
        )

    return make


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
# the tiles that are tried
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
    "add_covariances": {"STRIP": (8, 16, 32)},
    "scores": {"ROWS": (64, 128, 256), "QUERIES": (16, 32, 64), "DIM": (32, 64, 128)},
    "topk_scores": {"ROWS": (64, 128), "QUERIES": (16, 32, 64), "DIM": (32, 64, 128)},
    "merge_topk": {"MERGE": (512, 1024, 2048)},
    "state_topk": {"OTHERS": (8, 16, 32)},
    "self_influence": {"ROWS": (64, 128), "QUERIES": (32, 64, 128), "DIM": (32, 64, 128)},
    "pack_rows": {"BLOCK": (512, 1024, 2048, 4096)},
    "unpack_rows": {"BLOCK": (512, 1024, 2048, 4096)},
}
WITHOUT_STAGES = set(SPACE) - {
    *("project", "projected_gradients", "one_sided_gradients", "per_sample_gradients"),
    *("covariance_update_", "scores", "topk_scores", "self_influence"),
}


def candidates(problem: Problem) -> Iterator[Config]:
    """Every configuration worth compiling: not two that are the same to this problem."""
    space = SPACE[problem.op]
    stages = (1,) if problem.op in WITHOUT_STAGES else (2, 3, 4)
    for *tiles, warps, depth in itertools.product(*space.values(), (4, 8), stages):
        config = dict(zip(space, tiles, strict=True))
        queries = problem.up_to.get("queries")
        if config.get("CHUNK", 0) % config.get("BLOCK", 1):
            continue
        if queries is not None and config["QUERIES"] > queries:
            continue
        yield config | {"num_warps": warps, "num_stages": depth}


class Measure(Protocol):
    def __call__(self, problem: Problem, config: Config) -> float | str:
        """Milliseconds, or why the configuration is not to be used."""


class OnGpu:
    """Compile, check, time."""

    def __init__(self, architecture: str, device: str = "cuda") -> None:
        self.architecture, self.device = architecture, device
        self._of: tuple[str, Any, Any] | None = None  # one problem's operands at a time
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def __call__(self, problem: Problem, config: Config) -> float | str:
        if bad := refused(problem, config, self.architecture):
            return bad
        if self._of is None or self._of[0] != problem.name:
            self._of = None  # frees the last one's
            ours, expected = problem.make(self.device)
            self._of = problem.name, ours, _tensors(expected())
        _, ours, want = self._of
        with _launch.trying(problem.op, config):
            if error := wrong(_tensors(ours()), want, problem.types == "tf32"):
                return error
            return self.milliseconds(ours)

    def milliseconds(self, call: Callable[[], Any], samples: int = 15) -> float:
        """Median, with a cold L2 cache."""
        taken = []
        for _ in range(samples + 3):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
        return statistics.median(taken[3:])


def refused(problem: Problem, config: Config, architecture: str) -> str:
    """Why the gate does not let the configuration be run; "" if it does. Needs no GPU."""
    from bench._assembly import about, problems
    from logra_kernels.triton.catalogue import recorded

    ours, _ = problem.make("meta")
    with _launch.trying(problem.op, config):
        entries = recorded(problem.name, architecture, ours)
    for entry in entries:
        if entry.kernel_name != KERNELS[problem.op]:
            continue  # launched beside it, by other rules
        try:
            found = problems(about(entry, entry.compile()), architecture)
        except Exception as error:  # the compiler's own; no such configuration then
            found = [f"does not compile: {type(error).__name__}"]
        if found:
            return f"{entry.kernel_name}: {'; '.join(found)}"
    return ""


def wrong(got: list[Tensor], want: list[Tensor], rounded: bool) -> str:
    """Results are near the reference's: by 1e-3 of the largest value, 1e-2 for tf32."""
    for mine, theirs in zip(got, want, strict=True):
        limit = (1e-2 if rounded else 1e-3) * float(theirs.abs().max())
        error = float((mine.float() - theirs.float()).abs().max())
        if not error <= limit:
            return f"wrong: off by {error:.3g}, allowed is {limit:.3g}"
    return ""


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


Results = dict[str, dict[str, float | str]]  # {problem: {configuration as JSON: ms or why not}}


def search(
    problems: list[Problem], measure: Measure, state: Path, say: Callable[[str], None]
) -> Results:
    """Measure what the state file does not hold yet; it is written after every measurement."""
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


def rewritten(table: Rules, architecture: str, problems: list[Problem], results: Results) -> Rules:
    """The table with this architecture's rules: the fastest of each problem.

    Problems that differ in a size that a split into calls can change get tiles of one extent along
    the summed axes: those whose times, each over its problem's best, add up to least. Where nothing
    was measured, the rules that held so far stay.
    """
    new = json.loads(json.dumps(table))
    for op in {problem.op: None for problem in problems}:
        mine = [problem for problem in problems if problem.op == op]
        rules: list[dict[str, Any]] = []
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


def _rules(op: str, problems: list[Problem], results: Results) -> list[dict[str, Any]]:
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
    # the smallest sizes first, every size last
    return sorted(rules, key=lambda rule: tuple(rule.get("up_to", {"": 1 << 62}).values()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__.split("\n")[0]
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
    architecture = _launch.architecture_of(torch.empty(0, device="cuda"))
    state = chosen.state or Path(f"tune-{architecture}.json")
    results = search(problems, OnGpu(architecture), state, lambda text: print(text, flush=True))
    table = rewritten(json.loads(chosen.table.read_text()), architecture, problems, results)
    chosen.table.write_text(heuristics.dumps(table))
    print(f"{chosen.table}: rules for {architecture} written from {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
