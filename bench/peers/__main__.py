"""Logging and influence beside LogIX, Bergson, dattri and dattri-llm: python -m bench peers

Run by the interpreter of `make peers-env`: .venv-peers/bin/python -m bench.peers [--only logging …]

logging     tokens/s of a small language model: forward and backward pass, rows projected by the
            same matrices, the store finished. Without curvature, and with the raw covariances.
            "nothing kept" is the two passes alone, down to the embedding.
l-relatif   pairs/s of LogIX's "cosine" over a store, our norms and LogIX's inverses known already.
            LogIX has the first rows only: its time is proportional to their number. "repaired"
            also takes 256 rows at a time instead of 16.
influence   pairs/s of Eq. 3 with the queries preconditioned in the call.
whitened    pairs/s where both sides are normalised: Bergson's two-sided mode.

Before anything is timed the results are compared: rows with float64 autograd of one example at a
time, scores with float64 algebra on the rows. A library whose result is wrong is named, and not
timed. Libraries that are not installed are named too.

Beside the harness's columns stand the rate, our rate over the provider's (above 1: ours is faster),
and the bytes on disk for an example.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import results
from bench.harness.cases import (
    OURS,
    Call,
    Case,
    effort,
    is_ours,
    largest_error,
    measure,
    options,
    prepare,
    publish,
)
from bench.harness.memory import folder_bytes
from bench.peers import NAMES, peer
from bench.peers.setting import InfluenceSetting, Logger, LoggingSetting, attributor
from logra_kernels import ops
from logra_kernels.attribution import Attributor

TOP = 10
FLOAT32 = 1e-4  # sums of products in another order, of the largest value
HALF = 1e-3  # rows rounded to 11 bits, of the largest value


@dataclass
class Comparison:
    """A case, what it counts, and the files whose bytes grow with the examples."""

    case: Case
    unit: str
    count: float  # how many of the unit a call does
    counts: dict[str, float] = field(default_factory=dict)  # where a provider does another number
    examples: int = 1
    files: dict[str, list[Path]] = field(default_factory=dict)

    def run(self, part: str, args: argparse.Namespace) -> None:
        counts = dict.fromkeys(self.case.providers, self.count) | self.counts
        self.case.params = {"part": part, "unit": self.unit, "count": counts}
        record = measure(self.case, effort(args))
        rates = results.rates(record)
        ours = next(rate for name, rate in rates.items() if is_ours(name))
        for row in record["providers"]:
            name = row["provider"]
            row[f"{self.unit}_per_s"], row["ours_is"] = rates[name], ours / rates[name]
            if name in self.files:
                row["bytes"] = sum(map(folder_bytes, self.files[name])) // self.examples
        publish(record, args.json)


class Logged:
    """A logger as a provider: each call logs into a new folder, and the last folder is kept."""

    def __init__(self, logger: Any, setting: LoggingSetting, folder: Path) -> None:
        self.logger, self.setting = logger, setting
        self.folder = self.last = folder
        self.calls = 0
        self.files: list[Path] = []  # those that grow with the examples

    def __call__(self) -> Path:
        """Log into a new folder; the one before is removed."""
        shutil.rmtree(self.last, ignore_errors=True)
        self.calls += 1
        self.last = self.folder / f"store{self.calls}"
        self.logger(self.last)
        self.files[:] = self.last.rglob(self.logger.row_files)
        return self.last

    def error(self, path: Path) -> float:
        """The error of the first rows in the folder."""
        wanted = self.setting.first_rows
        return largest_error(self.logger.rows(path)[: len(wanted)], wanted)


def logging(quick: bool, folder: Path) -> Iterator[Comparison]:
    """Logging, with and without a curvature, in every library that is installed."""
    small = {"num_examples": 8, "batch_size": 4, "num_tokens": 32, "blocks": 2, "width": 128}
    for rank, curvature in ((16, False), (8, True)) if quick else ((64, False), (16, True)):
        setting = LoggingSetting(rank, **(small if quick else {}))
        loggers: dict[str, Any] = {OURS: Logger(setting, curvature)}
        if logix := peer("logix"):
            loggers["LogIX"] = logix.Logger(setting, curvature)
            loggers["LogIX, repaired"] = logix.Logger(setting, curvature, logix.REPAIRED)
        if bergson := peer("bergson"):
            loggers["Bergson"] = bergson.Logger(setting, curvature)
        if dattri := peer("dattri"):
            loggers["dattri, in memory"] = dattri.Logger(setting, curvature)
        if not curvature and (dattri_llm := peer("dattri_llm")):
            loggers["dattri-llm"] = dattri_llm.Logger(setting)
        logged = {
            name: Logged(logger, setting, folder / f"rank{rank}-{number}")
            for number, (name, logger) in enumerate(loggers.items())
        }
        passes, what = "nothing kept", "rows and raw covariances" if curvature else "rows"
        case = Case(
            "peers",
            f"logging {what}: {setting.title}",
            {**logged, passes: setting.passes_alone()},
            setting.first_rows,
            rtol=FLOAT32,
            our_rtol=HALF,
            errors={**{n: one.error for n, one in logged.items()}, passes: lambda _: 0.0},
            apart=frozenset({passes}),
            flops=setting.flops,
        )
        files = {n: one.files for n, one in logged.items() if n != "dattri, in memory"}
        tokens = setting.ids.numel()
        yield Comparison(case, "tokens", tokens, examples=len(setting.ids), files=files)


def influence_case(
    setting: InfluenceSetting,
    what: str,
    num_queries: int,
    mode: str,
    full: dict[str, Call],
    top: dict[str, Call],
    apart: tuple[str, ...] = (),
    files: dict[str, list[Path]] | None = None,
) -> Comparison:
    """`full` gives scores [Q, N], `top` the values of the TOP highest, [Q, TOP].

    The highest are known only where all rows are checked.
    """
    expected = setting.expected(num_queries, mode)
    num_rows, dim = setting.rows.shape
    unit = float(expected.abs().max())
    case = Case(
        "peers",
        f"{what}: {setting.title(num_queries)}",
        full | top,
        expected,
        rtol=HALF,  # for FAISS's fp16 as well as for our store
        errors=dict.fromkeys(
            top, partial(largest_error, expected=expected.topk(TOP).values, unit=unit)
        ),
        compare=lambda scores: scores[:, : setting.checked],
        unit=unit,
        apart=frozenset(apart),
        num_bytes=2.0 * num_rows * dim,
        flops=2.0 * num_queries * num_rows * dim,
    )
    return Comparison(case, "pairs", num_queries * num_rows, examples=num_rows, files=files or {})


def scores(asked: Attributor, queries: Tensor, mode: str) -> Call:
    return lambda: asked.scores(queries, mode).scores


def top(asked: Attributor, queries: Tensor, mode: str) -> Call:
    return lambda: asked.top_k(queries, TOP, mode).top_scores


def l_relatif(quick: bool, folder: Path) -> Iterator[Comparison]:
    """l-RelatIF scores beside LogIX's."""
    logix = peer("logix")
    if logix is None:
        return
    shape = (16, 4, 2000) if quick else (64, 4, 20_000)
    setting = InfluenceSetting(*shape, most_queries=16, checked=64)
    asked = attributor(folder / OURS, setting.modules, setting.rows)
    asked.self_influence()  # the norms are known from here on
    few = 256 if quick else 512
    rows = setting.rows[:few]
    theirs = logix.Influence(folder / "logix", setting.modules, rows, setting.covariances)
    for num_queries in (1, 16):
        queries = setting.queries[:num_queries]
        of_few: dict[str, Call] = {
            "LogIX": partial(theirs.scores, queries),
            "LogIX, repaired": partial(theirs.scores, queries, logix.REPAIRED, 256),
        }
        full = {OURS: scores(asked, queries, "l-relatif"), **of_few}
        what = f"l-RelatIF (LogIX: of the first {few} rows)"
        comparison = influence_case(
            *(setting, what, num_queries, "l-relatif", full, {}),
            apart=tuple(of_few),  # fewer rows: another problem
            files={OURS: [folder / OURS]},
        )
        comparison.counts = dict.fromkeys(of_few, float(num_queries * few))
        yield comparison


def influence(quick: bool, folder: Path) -> Iterator[Comparison]:
    """Influence of stored rows in every library that is installed."""
    setting = _middle_setting(quick)
    modules, rows = setting.modules, setting.rows
    asked = attributor(folder / OURS, modules, rows)
    bergson = dattri = None
    gradients = folder / "bergson" / "gradients.bin"
    if module := peer("bergson"):
        bergson = module.Influence(folder / "bergson", modules, rows, setting.covariances)
        flat = bergson.opened(factory="Flat")
        half = bergson.opened(factory="IVF1,SQfp16")
        twice = bergson.opened(factory="Flat", hessian=True)
        copied = bergson.opened(hessian=True)
    if module := peer("dattri"):
        dattri = module.Influence(folder / "dattri", modules, rows)
    files = {
        OURS: [folder / OURS],
        "Bergson Scorer, mapped": [gradients],
        "Bergson FAISS Flat": [gradients, folder / "bergson" / "faiss_Flat"],
        "Bergson FAISS SQfp16": [gradients, folder / "bergson" / "faiss_IVF1_SQfp16"],
    }
    for num_queries in (1, 16, 64):
        q = setting.queries[:num_queries]
        full: dict[str, Call] = {OURS: scores(asked, q, "dot")}
        ends: dict[str, Call] = {"logra, top 10": top(asked, q, "dot")}
        if bergson is not None:
            ends |= {
                "Bergson FAISS Flat": bergson.search(flat, q, TOP, by_hand=True),
                "Bergson FAISS SQfp16": bergson.search(half, q, TOP, by_hand=True),
                "Bergson FAISS, hessian_path": bergson.search(twice, q, TOP),
                "Bergson, index in memory": bergson.search(copied, q, TOP),
            }
            full["Bergson Scorer, mapped"] = partial(bergson.stream, q)
        if dattri is not None:
            full["dattri, in memory"] = partial(dattri.scores, q)
        apart = ("Bergson, index in memory", "dattri, in memory")
        yield influence_case(
            setting, "influence", num_queries, "dot", full, ends, apart, files=files
        )


def whitened(quick: bool, folder: Path) -> Iterator[Comparison]:
    """The whitened cosine beside Bergson's."""
    module = peer("bergson")
    if module is None:
        return
    setting, mode = _middle_setting(quick), "whitened-cosine"
    asked = attributor(folder / OURS, setting.modules, setting.rows)
    asked.self_influence()
    bergson = module.Influence(
        folder / "bergson", setting.modules, setting.rows, setting.covariances
    )
    copied = bergson.opened(hessian=True, unit_norm=True)
    faiss = bergson.opened(factory="Flat", hessian=True, unit_norm=True)
    for num_queries in (1, 16):
        q = setting.queries[:num_queries]
        full: dict[str, Call] = {
            OURS: scores(asked, q, mode),
            "Bergson Scorer, mapped": partial(bergson.stream, q, whitened=True),
        }
        ends: dict[str, Call] = {
            "logra, top 10": top(asked, q, mode),
            "Bergson, index in memory": bergson.search(copied, q, TOP),
            "Bergson FAISS, two-sided": bergson.search(faiss, q, TOP),
        }
        apart = ("Bergson, index in memory",)
        yield influence_case(setting, "whitened cosine", num_queries, mode, full, ends, apart)


def _middle_setting(quick: bool) -> InfluenceSetting:
    return InfluenceSetting(8, 6, 600, 64) if quick else InfluenceSetting(32, 24, 4000, 64)


PARTS: dict[str, Callable[[bool, Path], Iterator[Comparison]]] = {
    "logging": logging,
    "l-relatif": l_relatif,
    "influence": influence,
    "whitened": whitened,
}


def main(argv: list[str] | None = None) -> None:
    """Compare with the libraries that this Python has."""
    known = options(__doc__)
    known.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    args = known.parse_args(argv)
    prepare(args.threads)
    if ops.isa() is None:
        raise SystemExit(f"the C++ kernels are not loaded by {sys.executable}: nothing to compare")
    for name in NAMES:
        if peer(name) is None:
            print(f"left out: {name} is not installed (make peers-env)")
    with torch.no_grad():
        for part in args.only:
            with tempfile.TemporaryDirectory(prefix="logra-peers-") as folder:
                for comparison in PARTS[part](args.quick, Path(folder)):
                    comparison.run(part, args)


if __name__ == "__main__":
    main()
