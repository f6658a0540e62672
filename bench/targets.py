"""What this package holds itself to, as ratios within one run: python -m bench.targets

Measured here: the scan in memory, its two extra duties (l-RelatIF, the ends kept), the ops beside
torch, and logging beside its floor. What other parts measure (disk, peers, Table 1) is taken from
the newest of their results in bench/results/, with its date.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import _limits, _results, bench_covariance_update, bench_logging, bench_scores
from bench import bench_projected_gradients as projected
from bench._harness import OURS, Case, Provider, check, time_providers
from bench._limits import Limits
from bench.bench_attribution import make_store
from bench.grid import HOLDS
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Module

PRODUCTS = 3  # of bfloat16 tiles for one of ours: rows in two parts, queries in two, three of four


@dataclass
class Target:
    what: str
    asked: float
    got: float | None  # None: it could not be measured here
    at_least: bool = True  # else at most
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.got is None:
            return "not measured"
        met = self.got >= self.asked if self.at_least else self.got <= self.asked
        return "met" if met else "missed"


@dataclass
class Setting:
    """Small for a test of this file, and as large as the targets mean them."""

    num_rows: int = 8000
    dim: int = 16384
    rounds: int = 15
    budget_s: float = 1.5
    logging: tuple[int, int, int] = (8, 4, 128)  # blocks, N, T
    rank: int = 64
    width: int = 2048
    tokens: tuple[int, int] = (16, 512)


def medians(providers: dict[str, Provider], setting: Setting) -> dict[str, float]:
    times = time_providers(providers, 5, setting.rounds, setting.budget_s)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def of_case(case: Case, setting: Setting) -> dict[str, float]:
    """Seconds of the providers that are right, and of the probes of the limits."""
    good, _, left_out = check(case)
    for name, why in left_out.items():
        print(f"{case.op}, {name}: {why}")
    return medians(
        {**good, **{name: call for name, (_, call) in _limits.probes().items()}}, setting
    )


def over_best(seconds: dict[str, float], names: Callable[[str], bool]) -> float | None:
    """The best of the named over the best of ours."""
    probes = (_limits.READ, _limits.FMA)
    others = [value for name, value in seconds.items() if names(name) and name not in probes]
    ours = [value for name, value in seconds.items() if name.startswith(OURS)]
    return min(others) / min(ours) if others and ours else None


def scan(setting: Setting, limits: Limits) -> Iterator[Target]:
    rows = torch.randn(setting.num_rows, setting.dim).half()
    amx = limits.amx_gflop_per_s
    for num_queries in (1, 4, 16, 256):
        case = bench_scores.case(torch.randn(num_queries, setting.dim), rows)
        seconds = of_case(case, setting)
        ours = min(value for name, value in seconds.items() if name.startswith(OURS))
        now = _limits.refined(limits, seconds.pop(_limits.READ), seconds.pop(_limits.FMA))
        read = case.num_bytes / ours / 1e9 / now.read_gb_per_s
        rate = case.flops / ours / 1e9
        if num_queries <= 4:
            yield Target(f"scan, Q={num_queries}, of the read bandwidth", 0.85, read)
        if num_queries == 16:
            note = "" if amx else "no AMX here"
            yield Target(
                "scan, Q=16, AMX, of the read bandwidth", 0.6, read if amx else None, note=note
            )
            share = rate / now.fma_gflop_per_s
            yield Target(
                "scan, Q=16, of the fp32 FMA rate", 0.0, share, note="no bar: for the record"
            )
        if num_queries == 256:
            note = "" if amx else "no AMX here"
            got = PRODUCTS * rate / amx if amx else None
            yield Target("scan, Q=256, of the AMX rate with tile loads", 0.7, got, note=note)
            got = over_best(seconds, lambda name: name == "torch fp16 mm")
            yield Target("scan, Q=256, torch fp16 mm over ours", 2.0, got)


def held_scan(setting: Setting) -> Target:
    """In this process, which is held to an instruction set already."""
    rows = torch.randn(setting.num_rows, setting.dim).half()
    case = bench_scores.case(torch.randn(16, setting.dim), rows)
    seconds = of_case(case, setting)
    best = min((v, k) for k, v in seconds.items() if k.startswith("torch"))[1]
    got = over_best(seconds, lambda name: not name.startswith(OURS))
    what = f"scan, Q=16, both held to {ops.isa()}, best torch over ours"
    return Target(what, 3.0, got, note=f"the best is {best}")


def held(isa: str) -> Target:
    """`held_scan` in a process of its own."""
    what = f"scan, Q=16, both held to {isa}, best torch over ours"
    if isa not in ops.available_isas():
        return Target(what, 3.0, None, note=f"no {isa} here")
    done = subprocess.run(
        [sys.executable, "-m", "bench.targets", "--held", isa],
        env={**os.environ, **HOLDS[isa]},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Target(**json.loads(done.stdout.splitlines()[-1]))


def duties(setting: Setting) -> Iterator[Target]:
    """What l-RelatIF costs beside the dot product, and keeping the ends beside all scores."""
    dim = setting.rank**2 * max(1, setting.dim // setting.rank**2)
    modules = [
        Module(f"module.{i}", setting.rank, setting.rank) for i in range(dim // setting.rank**2)
    ]
    folder = Path(tempfile.mkdtemp(prefix="logra-bench-"))
    try:
        store = make_store(folder / "store", setting.num_rows, modules)
        diagonal = RawCurvature.rebuild(store)
        attributor = Attributor(store, diagonal)
        attributor.self_influence()
        for num_queries in (1, 16, 64):
            queries = torch.randn(num_queries, store.dim)
            seconds = medians(
                {
                    mode: lambda m=mode, q=queries: attributor.top_k(q, 10, m).top_scores
                    for mode in ("dot", "l-relatif")
                },
                setting,
            )
            what = f"top 10 of a store, Q={num_queries}, l-RelatIF (sigma known) over dot"
            yield Target(what, 1.03, seconds["l-relatif"] / seconds["dot"], at_least=False)
    finally:
        shutil.rmtree(folder)
    rows = torch.randn(setting.num_rows, setting.dim).half()
    for num_queries in (1, 16, 64, 256):
        queries = torch.randn(num_queries, setting.dim)
        seconds = medians(
            {
                "scores": lambda q=queries: ops.scores(q, rows),
                "top": lambda q=queries: ops.topk_scores(q, rows, 10).top_scores,
            },
            setting,
        )
        what = f"top-k over scores, Q={num_queries}, k=10"
        yield Target(what, 1.1, seconds["top"] / seconds["scores"], at_least=False)


def logging_ops(setting: Setting, limits: Limits) -> Iterator[Target]:
    amx = limits.amx_gflop_per_s is not None
    n, t = setting.tokens
    case = projected.case(n, t, setting.width, setting.rank, "fp32", "full")
    got = over_best(of_case(case, setting), lambda name: not name.startswith(OURS))
    yield Target("projected gradients, fp32, torch over ours", 1.7 if amx else 1.25, got)
    for num_rows, size in ((1024, 256), (1024, 1024), (256, setting.rank**2)):
        case = bench_covariance_update.case(num_rows, size)
        got = over_best(of_case(case, setting), lambda name: not name.startswith(OURS))
        yield Target(f"covariance, R={num_rows}, K={size}, addmm over ours", 1.5, got)


def logging(setting: Setting) -> Iterator[Target]:
    case = bench_logging.language_model(*setting.logging, setting.rank)
    case.providers = {name: case.providers[name] for name in ("logra", "floor")}
    seconds = of_case(case, setting)
    what = "logging a small LM, over its forward and activation-gradient pass"
    yield Target(what, 1.10, seconds["logra"] / seconds["floor"], at_least=False)


def stored(folder: Path = _results.RESULTS) -> Iterator[Target]:
    """From the newest results of the parts that others than this one measure."""
    yield from _of_streaming(_results.latest("streaming", folder))
    yield from _of_peers(_results.latest("peers", folder))
    yield from _of_table1(_results.latest("table1", folder))


def _of_streaming(records: list[dict]) -> Iterator[Target]:
    what = "scan of a store of three times the page cache's budget, of the disk's rate"
    yield from _newest(what, 0.9, [(r, r.get("of_disk")) for r in records], least=False)


def _of_peers(records: list[dict]) -> Iterator[Target]:
    """Our rate over that of a library as released, in its best way; the least of a part's cases."""
    out_of_core = ("Bergson FAISS", "Bergson Scorer, mapped")
    for what, part, names, bar in (
        ("logging a small LM, over LogIX", "logging", ("LogIX",), 1.5),
        ("logging a small LM, over Bergson", "logging", ("Bergson",), 1.5),
        ("l-RelatIF pairs/s, over LogIX", "l-relatif", ("LogIX",), 1000.0),
        ("influence pairs/s, over Bergson out of core", "influence", out_of_core, 10.0),
        ("pairs/s over bergson score, which runs the model", "model", ("bergson score",), 10.0),
    ):
        found = []
        for record in records:
            if record["params"].get("part") == part:
                rates = _results.rates(record)
                ours = [rate for name, rate in rates.items() if name.startswith(OURS)]
                # "LogIX, repaired" and "LogIX with logra's ops" are not LogIX as released.
                exact = [rates[name] for name in names if name in rates]
                ways = [r for name, r in rates.items() if name.startswith("Bergson FAISS")]
                theirs = exact + (ways if "Bergson FAISS" in names else [])
                if ours and theirs:
                    found.append((record, max(ours) / max(theirs)))
        yield from _newest(what, bar, found, least=True)


def _of_table1(records: list[dict]) -> Iterator[Target]:
    for name in ("largest over smallest batch", "best over best"):
        found = [(r, r.get("ratios", {}).get(name)) for r in records]
        what = f"influence pairs/s over kronfluence's EKFAC, {name}"
        yield from _newest(what, 6500.0, found, least=True)


def _newest(
    what: str, asked: float, found: list[tuple[dict, float | None]], least: bool
) -> Iterator[Target]:
    values = [(value, record) for record, value in found if value is not None]
    if not values:
        yield Target(what, asked, None, note="no results yet")
        return
    value, record = (min if least else max)(values, key=lambda pair: pair[0])
    yield Target(what, asked, value, note=f"{record['date'][:10]}: {record['case']}")


GROUPS: dict[str, Callable[[Setting, Limits], Iterator[Target]]] = {
    "scan": scan,
    "held": lambda setting, limits: (held(isa) for isa in HOLDS),
    "duties": lambda setting, limits: duties(setting),
    "ops": logging_ops,
    "logging": lambda setting, limits: logging(setting),
    "stored": lambda setting, limits: stored(),
}


def line(target: Target) -> str:
    sign = "≥" if target.at_least else "≤"
    got = (
        ""
        if target.got is None
        else f"{target.got:,.3g}"
        if target.got < 100
        else f"{target.got:,.0f}"
    )
    asked = f"{sign} {target.asked:,g}" if target.asked else ""
    verdict = target.verdict if target.asked else ""
    return f"{target.what:<76}{asked:>9}{got:>10}  {verdict:<13}{target.note}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--held", choices=list(HOLDS), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="append to bench/results/targets.jsonl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setting = Setting()
    torch.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        if args.held:
            print(json.dumps(asdict(held_scan(setting))))
            return
        limits = _limits.measure(9)
        print(f"{torch.get_num_threads()} threads, isa {ops.isa()}, {limits.line()}")
        print(f"{'':<76}{'asked':>9}{'got':>10}")
        for name in args.only:
            for target in GROUPS[name](setting, limits):
                print(line(target), flush=True)
                if args.json and name != "stored":
                    record = {"bench": "targets", "case": target.what, **asdict(target)}
                    _results.append("targets", {**record, "verdict": target.verdict})


if __name__ == "__main__":
    main()
