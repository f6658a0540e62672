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

from bench.harness import results
from bench.harness.cases import (
    OURS,
    Call,
    Case,
    Effort,
    is_ours,
    measure,
    medians,
    options,
    prepare,
    time_in_turns,
)
from bench.harness.limits import Limits
from bench.harness.tables import table
from bench.ops import gradients, rows, scans
from bench.paths.attribution import TOP, squares, write_store
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature

PRODUCTS = 3  # of bfloat16 tiles for one of ours: rows in two parts, queries in two, three of four

# Both sides held to an instruction set: ours, oneDNN's, ATen's and MKL's variables.
VARIABLES = ("LOGRA_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
HOLDS = {
    "avx2": dict(zip(VARIABLES, ("avx2", "AVX2", "avx2", "AVX2"), strict=True)),
    "avx512": dict(zip(VARIABLES, ("avx512", "AVX512_CORE", "avx512", "AVX512"), strict=True)),
}
SPEND = Effort(5, 15, 1.5)


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
        if self.got is None:
            return "not measured"
        met = self.got >= self.asked if self.at_least else self.got <= self.asked
        return "met" if met else "missed"

    def row(self) -> dict[str, Any]:
        """The target as a line of the table."""
        asked = f"{'≥' if self.at_least else '≤'} {self.asked:,g}"
        row = {"what": self.what, "asked": asked, "got": self.got}
        return {**row, "verdict": self.verdict, "note": self.note}


@dataclass
class Setting:
    """The sizes that the targets mean; a test of this file makes them small."""

    num_rows: int = 8000
    dim: int = 16384
    spend: Effort = SPEND
    logging: tuple[int, int, int] = (8, 4, 128)  # blocks, N, T
    eigenbasis: tuple[int, int, int, int] = (4, 8, 256, 32768)  # blocks, N, T, D
    rank: int = 64
    width: int = 2048
    tokens: tuple[int, int] = (16, 512)

    def ratio(self, one: Call, other: Call) -> float:
        """The median time of one call over another's."""
        seconds = medians(time_in_turns({"one": one, "other": other}, self.spend))
        return seconds["one"] / seconds["other"]

    def rows(self) -> torch.Tensor:
        """Random rows [N, D] float16."""
        return torch.randn(self.num_rows, self.dim).half()


class Timed:
    """A case's providers that are right, timed in turns with the limits."""

    def __init__(self, case: Case, setting: Setting) -> None:
        record = measure(case, setting.spend)
        for name, why in record["left_out"].items():
            print(f"{case.op}, {name}: {why}")
        if OURS in record["left_out"]:
            raise RuntimeError(f"{case.op}: {case.title}: ours is wrong")
        self.case, self.limits = case, Limits(**record["limits"])
        self.seconds = {name: ms / 1e3 for name, ms in results.medians_ms(record).items()}
        self.best = min((n for n in self.seconds if not is_ours(n)), key=self.seconds.__getitem__)
        self.ours_s = self.seconds[OURS]

    def over(self, rival: str) -> float | None:
        """A rival's time over ours; None where the rival was wrong, and so not timed."""
        return self.seconds[rival] / self.ours_s if rival in self.seconds else None


def scan(setting: Setting) -> Iterator[Target]:
    """The scan in memory beside the machine's limits and torch."""
    stored_rows = setting.rows()
    for num_queries in (1, 4, 16, 256):
        timed = Timed(scans.scores(torch.randn(num_queries, setting.dim), stored_rows), setting)
        amx = timed.limits.amx_gflop_per_s
        note = "" if amx else "no AMX here"
        read = timed.case.num_bytes / timed.ours_s / 1e9 / timed.limits.read_gb_per_s
        rate = timed.case.flops / timed.ours_s / 1e9
        what = f"scan, Q={num_queries}"
        if num_queries <= 4:
            yield Target(f"{what}, of the read bandwidth", 0.85, read)
        if num_queries == 16:
            got = read if amx else None
            yield Target(f"{what}, AMX, of the read bandwidth", 0.6, got, note=note)
        if num_queries == 256:
            got = PRODUCTS * rate / amx if amx else None
            yield Target(f"{what}, of the AMX rate with tile loads", 0.7, got, note=note)
            yield Target(f"{what}, torch fp16 mm over ours", 2.0, timed.over("torch fp16 mm"))


def held_scan(setting: Setting) -> Target:
    """In this process, which is held to an instruction set already."""
    timed = Timed(scans.scores(torch.randn(16, setting.dim), setting.rows()), setting)
    what = f"scan, Q=16, both held to {ops.isa()}, best torch over ours"
    return Target(what, 3.0, timed.over(timed.best), note=f"the best is {timed.best}")


def held(_: Setting) -> Iterator[Target]:
    """`held_scan` in processes of their own."""
    for isa, variables in HOLDS.items():
        if isa not in ops.available_isas():
            what = f"scan, Q=16, both held to {isa}, best torch over ours"
            yield Target(what, 3.0, None, note=f"no {isa} here")
            continue
        done = subprocess.run(
            [sys.executable, "-m", "bench.targets", "--held"],
            env={**os.environ, **variables},
            cwd=results.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        yield Target(**json.loads(done.stdout.splitlines()[-1]))


def duties(setting: Setting) -> Iterator[Target]:
    """What l-RelatIF costs beside the dot product, and the ends beside all scores."""
    modules = squares(max(1, setting.dim // setting.rank**2), setting.rank)
    with tempfile.TemporaryDirectory(prefix="logra-bench-") as folder:
        stored_rows = torch.randn(setting.num_rows, sum(module.size for module in modules))
        store = write_store(Path(folder) / "store", modules, stored_rows)
        attributor = Attributor(store, RawCurvature.rebuild(store))
        attributor.self_influence()
        for num_queries in (1, 16, 64):
            top_k = partial(attributor.top_k, torch.randn(num_queries, store.dim), TOP)
            got = setting.ratio(partial(top_k, "l-relatif"), partial(top_k, "dot"))
            what = f"top {TOP} of a store, Q={num_queries}, l-RelatIF (sigma known) over dot"
            yield Target(what, 1.03, got, at_least=False)
    stored_rows = setting.rows()
    for num_queries in (1, 16, 64, 256):
        queries = torch.randn(num_queries, setting.dim)
        top = partial(ops.topk_scores, queries, stored_rows, TOP)
        got = setting.ratio(top, partial(ops.scores, queries, stored_rows))
        yield Target(f"top-k over scores, Q={num_queries}, k={TOP}", 1.1, got, at_least=False)


def logging_ops(setting: Setting) -> Iterator[Target]:
    """The ops of logging beside torch."""
    n, t = setting.tokens
    case = gradients.projected_gradients(n, t, setting.width, setting.rank, "fp32", "full")
    timed = Timed(case, setting)
    asked = 1.7 if timed.limits.amx_gflop_per_s else 1.25
    yield Target("projected gradients, fp32, torch over ours", asked, timed.over(timed.best))
    for num_rows, size in ((1024, 256), (1024, 1024), (256, setting.rank**2)):
        timed = Timed(rows.covariance_update(num_rows, size), setting)
        what = f"covariance, R={num_rows}, K={size}, addmm over ours"
        yield Target(what, 1.5, timed.over(timed.best))


def logging(setting: Setting) -> Iterator[Target]:
    """Logging a small language model beside the passes that it needs."""
    from bench.paths.logging import eigenbasis, language_model  # import transformers: optional

    blocks, _, _, coordinates = setting.eigenbasis
    chosen = f" of {blocks} blocks, D={coordinates:,} of an eigenbasis"
    random = language_model(*setting.logging, setting.rank)
    for which, case in (("", random), (chosen, eigenbasis(*setting.eigenbasis))):
        case.providers = {name: case.providers[name] for name in ("logra", "floor")}
        what = f"logging a small LM{which}, over its forward and activation-gradient pass"
        timed = Timed(case, setting)
        yield Target(what, 1.10, timed.ours_s / timed.seconds["floor"], at_least=False)


def of_peers(part: str, *rivals: str) -> Callable[[dict[str, Any]], float | None]:
    """Our rate over that of a library as released, in its best way, in a record of the peers."""

    def ratio(record: dict[str, Any]) -> float | None:
        if record["params"]["part"] != part:
            return None
        rates = results.rates(record)
        theirs = [rate for name, rate in rates.items() if name in rivals]
        ours = [rate for name, rate in rates.items() if is_ours(name)]
        return max(ours) / max(theirs) if ours and theirs else None

    return ratio


OUT_OF_CORE = ("Bergson FAISS Flat", "Bergson FAISS SQfp16", "Bergson Scorer, mapped")
# What other parts have stored: what it is, what is asked, their name, the figure of a record.
STORED: list[tuple[str, float, str, Callable[[dict[str, Any]], float | None]]] = [
    ("store of three times the page cache, Q=1, of the disk's rate", 0.9, "streaming",
     lambda record: record["of_disk"] if record["case"].startswith("Q=1,") else None),
    ("logging a small LM, over LogIX", 1.5, "peers", of_peers("logging", "LogIX")),
    ("logging a small LM, over Bergson", 1.5, "peers", of_peers("logging", "Bergson")),
    ("l-RelatIF pairs/s, over LogIX", 1000.0, "peers", of_peers("l-relatif", "LogIX")),
    ("influence pairs/s, over Bergson out of core", 10.0, "peers",
     of_peers("influence", *OUT_OF_CORE)),
    ("influence pairs/s over kronfluence's EKFAC, best over best", 6500.0, "table1",
     lambda record: record["ratios"].get("best over best")),
]  # fmt: skip


def stored() -> Iterator[Target]:
    """From the newest results of other parts: the least of a part's cases."""
    for what, asked, name, figure in STORED:
        found = [(figure(r), r["date"][:10], r["case"]) for r in results.latest(name)]
        got, date, case = min(
            ((got, date, case) for got, date, case in found if got is not None),
            default=(None, "no results yet", ""),
        )
        yield Target(what, asked, got, note=f"{date} {case}".rstrip())


GROUPS: dict[str, Callable[[Setting], Iterator[Target]]] = {
    "scan": scan,
    "held": held,
    "duties": duties,
    "ops": logging_ops,
    "logging": logging,
    "stored": lambda _: stored(),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    known = options(__doc__, "threads", "json")
    known.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    known.add_argument("--held", action="store_true", help=argparse.SUPPRESS)
    return known.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure the targets that the command line asks for, and print them."""
    args = parse(argv)
    setting = Setting()
    prepare(args.threads)
    with torch.no_grad():
        if args.held:
            print(json.dumps(asdict(held_scan(setting))))
            return
        for name in args.only:
            found = list(GROUPS[name](setting))
            print(table([target.row() for target in found]), flush=True)
            if args.json and name != "stored":
                for target in found:
                    record = {"case": target.what, **asdict(target), "verdict": target.verdict}
                    results.append("targets", record)


if __name__ == "__main__":
    main()
