"""What this package holds itself to, as ratios within one run: python -m bench.targets

Measured here: the scan in memory, l-RelatIF and top k beside the plain scan, the ops beside torch,
and logging beside its floor. What other parts measure (disk, peers, Table 1) is taken from the
newest of their results in bench/results/, with its date.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.grid import HOLDS
from bench.harness import limits as machine_limits
from bench.harness import results
from bench.harness.cases import Case, Provider, check, is_ours, medians, prepare, time_providers
from bench.harness.limits import Limits
from bench.ops import covariance_update, projected_gradients, scores
from bench.paths.attribution import TOP, squares, write_store
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature

PRODUCTS = 3  # of bfloat16 tiles for one of ours: rows in two parts, queries in two, three of four


@dataclass
class Target:
    """One figure beside what is asked of it."""

    what: str
    asked: float
    got: float | None  # None: it could not be measured here
    at_least: bool = True  # else at most
    note: str = ""

    @property
    def verdict(self) -> str:
        """Says "met", "missed" or "not measured"."""
        if self.got is None:
            return "not measured"
        met = self.got >= self.asked if self.at_least else self.got <= self.asked
        return "met" if met else "missed"


@dataclass
class Setting:
    """The sizes that the targets mean; a test of this file makes them small."""

    num_rows: int = 8000
    dim: int = 16384
    rounds: int = 15
    budget_s: float = 1.5
    logging: tuple[int, int, int] = (8, 4, 128)  # blocks, N, T
    rank: int = 64
    width: int = 2048
    tokens: tuple[int, int] = (16, 512)

    def seconds(self, providers: dict[str, Provider]) -> dict[str, float]:
        """The median of each."""
        return medians(time_providers(providers, 5, self.rounds, self.budget_s))

    def rows(self) -> torch.Tensor:
        """Random rows [N, D] float16."""
        return torch.randn(self.num_rows, self.dim).half()


class Timed:
    """A case's providers that are right, timed in turns with the probes of the limits."""

    def __init__(self, case: Case, setting: Setting) -> None:
        good, _, left_out = check(case)
        for name, why in left_out.items():
            print(f"{case.op}, {name}: {why}")
        probes = machine_limits.probes()
        times = time_providers(
            {**good, **{name: call for name, (_, call) in probes.items()}},
            5,
            setting.rounds,
            setting.budget_s,
        )
        self.seconds = medians({name: times[name] for name in good})
        self.probes = {name: times[name] for name in probes}
        self.ours_s = min((s for name, s in self.seconds.items() if is_ours(name)), default=None)
        rivals = {name: s for name, s in self.seconds.items() if not is_ours(name)}
        self.best = min(rivals, key=rivals.__getitem__, default=None)

    def over(self, rival: str | None) -> float | None:
        """A rival's time over ours."""
        if self.ours_s is None or rival is None or rival not in self.seconds:
            return None
        return self.seconds[rival] / self.ours_s


def scan(setting: Setting, limits: Limits) -> Iterator[Target]:
    """The scan in memory beside the machine's limits and torch."""
    rows = setting.rows()
    amx = limits.amx_gflop_per_s
    no_amx = "" if amx else "no AMX here"
    for num_queries in (1, 4, 16, 256):
        case = scores.case(torch.randn(num_queries, setting.dim), rows)
        timed = Timed(case, setting)
        assert timed.ours_s is not None
        now = machine_limits.refined(limits, timed.probes)
        read = case.num_bytes / timed.ours_s / 1e9 / now.read_gb_per_s
        rate = case.flops / timed.ours_s / 1e9
        what = f"scan, Q={num_queries}"
        if num_queries <= 4:
            yield Target(f"{what}, of the read bandwidth", 0.85, read)
        if num_queries == 16:
            got = read if amx else None
            yield Target(f"{what}, AMX, of the read bandwidth", 0.6, got, note=no_amx)
            share, note = rate / now.fma_gflop_per_s, "no bar: for the record"
            yield Target(f"{what}, of the fp32 FMA rate", 0.0, share, note=note)
        if num_queries == 256:
            got = PRODUCTS * rate / amx if amx else None
            yield Target(f"{what}, of the AMX rate with tile loads", 0.7, got, note=no_amx)
            yield Target(f"{what}, torch fp16 mm over ours", 2.0, timed.over("torch fp16 mm"))


def held_scan(setting: Setting) -> Target:
    """In this process, which is held to an instruction set already."""
    timed = Timed(scores.case(torch.randn(16, setting.dim), setting.rows()), setting)
    what = f"scan, Q=16, both held to {ops.isa()}, best torch over ours"
    return Target(what, 3.0, timed.over(timed.best), note=f"the best is {timed.best}")


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
    """What l-RelatIF costs beside the dot product, and the ends beside all scores."""
    modules = squares(max(1, setting.dim // setting.rank**2), setting.rank)
    with tempfile.TemporaryDirectory(prefix="logra-bench-") as folder:
        rows = torch.randn(setting.num_rows, sum(module.size for module in modules))
        store = write_store(Path(folder) / "store", modules, rows)
        attributor = Attributor(store, RawCurvature.rebuild(store))
        attributor.self_influence()
        for num_queries in (1, 16, 64):
            top_k = partial(attributor.top_k, torch.randn(num_queries, store.dim), TOP)
            seconds = setting.seconds({m: partial(top_k, m) for m in ("dot", "l-relatif")})
            what = f"top {TOP} of a store, Q={num_queries}, l-RelatIF (sigma known) over dot"
            yield Target(what, 1.03, seconds["l-relatif"] / seconds["dot"], at_least=False)
    rows = setting.rows()
    for num_queries in (1, 16, 64, 256):
        queries = torch.randn(num_queries, setting.dim)
        seconds = setting.seconds(
            {
                "scores": partial(ops.scores, queries, rows),
                "top": partial(ops.topk_scores, queries, rows, TOP),
            }
        )
        what = f"top-k over scores, Q={num_queries}, k={TOP}"
        yield Target(what, 1.1, seconds["top"] / seconds["scores"], at_least=False)


def logging_ops(setting: Setting, limits: Limits) -> Iterator[Target]:
    """The ops of logging beside torch."""
    amx = limits.amx_gflop_per_s is not None
    n, t = setting.tokens
    timed = Timed(
        projected_gradients.case(n, t, setting.width, setting.rank, "fp32", "full"), setting
    )
    asked = 1.7 if amx else 1.25
    yield Target("projected gradients, fp32, torch over ours", asked, timed.over(timed.best))
    for num_rows, size in ((1024, 256), (1024, 1024), (256, setting.rank**2)):
        timed = Timed(covariance_update.case(num_rows, size), setting)
        what = f"covariance, R={num_rows}, K={size}, addmm over ours"
        yield Target(what, 1.5, timed.over(timed.best))


def logging(setting: Setting) -> Iterator[Target]:
    """Logging a small language model beside the passes that it needs."""
    from bench.paths.logging import language_model  # imports transformers, which is optional

    case = language_model(*setting.logging, setting.rank)
    case.providers = {name: case.providers[name] for name in ("logra", "floor")}
    over = Timed(case, setting).over("floor")
    what = "logging a small LM, over its forward and activation-gradient pass"
    yield Target(what, 1.10, None if over is None else 1 / over, at_least=False)


def stored(folder: Path = results.RESULTS) -> Iterator[Target]:
    """From the newest results of other parts."""
    yield from _of_streaming(results.latest("streaming", folder))
    yield from _of_peers(results.latest("peers", folder))
    yield from _of_table1(results.latest("table1", folder))


def _of_streaming(records: list[dict[str, Any]]) -> Iterator[Target]:
    what = "scan of a store of three times the page cache's budget, of the disk's rate"
    yield from _newest(what, 0.9, [(r, r.get("of_disk")) for r in records], least=False)


def _of_peers(records: list[dict[str, Any]]) -> Iterator[Target]:
    """Our rate over that of a library as released, in its best way; the least of a part's cases."""
    out_of_core = ("Bergson FAISS", "Bergson Scorer, mapped")
    for what, part, names, bar in (
        ("logging a small LM, over LogIX", "logging", ("LogIX",), 1.5),
        ("logging a small LM, over Bergson", "logging", ("Bergson",), 1.5),
        ("l-RelatIF pairs/s, over LogIX", "l-relatif", ("LogIX",), 1000.0),
        ("influence pairs/s, over Bergson out of core", "influence", out_of_core, 10.0),
        ("pairs/s over bergson score, which runs the model", "model", ("bergson score",), 10.0),
    ):
        found: list[tuple[dict[str, Any], float | None]] = []
        for record in records:
            if record["params"].get("part") == part:
                rates = results.rates(record)
                ours = [rate for name, rate in rates.items() if is_ours(name)]
                # "LogIX, repaired" and "LogIX with logra's ops" are not LogIX as released.
                exact = [rates[name] for name in names if name in rates]
                ways = [r for name, r in rates.items() if name.startswith("Bergson FAISS")]
                theirs = exact + (ways if "Bergson FAISS" in names else [])
                if ours and theirs:
                    found.append((record, max(ours) / max(theirs)))
        yield from _newest(what, bar, found, least=True)


def _of_table1(records: list[dict[str, Any]]) -> Iterator[Target]:
    for name in ("largest over smallest batch", "best over best"):
        found = [(r, r.get("ratios", {}).get(name)) for r in records]
        what = f"influence pairs/s over kronfluence's EKFAC, {name}"
        yield from _newest(what, 6500.0, found, least=True)


def _newest(
    what: str, asked: float, found: list[tuple[dict[str, Any], float | None]], least: bool
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
    """A target as a line of the table."""
    sign = "≥" if target.at_least else "≤"
    got = "" if target.got is None else format(target.got, ",.0f" if target.got >= 100 else ".3g")
    asked = f"{sign} {target.asked:,g}" if target.asked else ""
    verdict = target.verdict if target.asked else ""
    return f"{target.what:<76}{asked:>9}{got:>10}  {verdict:<13}{target.note}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--held", choices=list(HOLDS), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="append to bench/results/targets.jsonl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure the targets that the command line asks for, and print them."""
    args = parse(argv)
    setting = Setting()
    prepare(threads=None)
    with torch.no_grad():
        if args.held:
            print(json.dumps(asdict(held_scan(setting))))
            return
        limits = machine_limits.measure(9)
        print(machine_limits.header(limits))
        print(f"{'':<76}{'asked':>9}{'got':>10}")
        for name in args.only:
            for target in GROUPS[name](setting, limits):
                print(line(target), flush=True)
                if args.json and name != "stored":
                    record = {"bench": "targets", "case": target.what, **asdict(target)}
                    results.append("targets", {**record, "verdict": target.verdict})


if __name__ == "__main__":
    main()
