"""Logging and influence beside LogIX, Bergson, dattri and dattri-llm: python -m bench peers

Run by the interpreter of `make peers-env`: .venv-peers/bin/python -m bench.peers [--only logging …]

logging     tokens/s of a small language model: forward and backward pass, rows projected by the
            same matrices, the store finished. Without curvature, and with the raw covariances.
            "nothing kept" is the two passes alone, down to the embedding.
l-relatif   pairs/s of LogIX's "cosine" over a store, our norms and LogIX's inverses known already.
            LogIX has the first rows only: its time is proportional to their number. "repaired"
            also takes 256 rows at a time instead of 16.
influence   pairs/s of Eq. 3 with the queries preconditioned in the call; then of the gradients'
            plain dot product, for dattri-llm has no curvature of rows.
whitened    pairs/s where both sides are normalised: Bergson's two-sided mode.
model       pairs/s of `bergson score`, which runs the model again for every set of queries.

Before anything is timed the results are compared: rows with float64 autograd of one example at a
time, scores with float64 algebra on the rows. A library whose result is wrong is named, and not
timed. Libraries that are not installed are named too.

Below each table stand the rate, the provider's time over ours (above 1: ours is faster), and bytes
on disk an example.
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

from bench.harness import limits as machine_limits
from bench.harness.cases import OURS, Case, Row, is_ours, largest_error, parser, prepare, run_case
from bench.harness.memory import folder_bytes
from bench.peers import NAMES, missing, ours, peer
from bench.peers.influence import InfluenceSetting
from bench.peers.setting import LoggingSetting
from logra_kernels import ops
from logra_kernels.attribution import Attributor

TOP = 10
FLOAT32 = 1e-4  # sums of products in another order, of the largest value
HALF = 1e-3  # rows rounded to 11 bits, of the largest value

Calls = dict[str, Callable[[], Any]]


@dataclass
class Comparison:
    """A case, what it counts, and what the harness does not know of its providers."""

    case: Case
    unit: str
    count: float  # how many of the unit a call does
    bytes_per_example: dict[str, Callable[[], float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)  # where a provider does another number

    def count_of(self, provider: str) -> float:
        """How many of the unit a call of the provider does."""
        return self.counts.get(provider, self.count)


class Logged:
    """A logger as a provider: each call logs into a new folder, and the last folder is kept."""

    def __init__(self, logger: Any, setting: LoggingSetting, folder: Path) -> None:
        self.logger, self.setting, self.folder = logger, setting, folder
        self.last = folder
        self.calls = 0

    def __call__(self) -> Path:
        """Log into a new folder; the one before is removed."""
        shutil.rmtree(self.last, ignore_errors=True)
        self.calls += 1
        self.last = self.logger(self.folder / f"store{self.calls}")
        return self.last

    def error(self, path: Path) -> float:
        """The error of the first rows in the folder."""
        wanted = self.setting.first_rows
        return largest_error(self.logger.rows(path)[: len(wanted)], wanted)

    def bytes_per_example(self) -> float:
        """The size of the files that grow with the examples, for each example."""
        files = self.last.rglob(self.logger.row_files)
        return sum(map(folder_bytes, files)) / len(self.setting.ids)


def logging_setting(rank: int, quick: bool) -> LoggingSetting:
    """The setting of the logging comparisons."""
    small = {"num_examples": 8, "batch_size": 4, "num_tokens": 32, "blocks": 2, "width": 128}
    return LoggingSetting(rank, **(small if quick else {}))


def logging_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    """Logging, with and without a curvature, in every library that is installed."""
    for rank, curvature in ((16, False), (8, True)) if quick else ((64, False), (16, True)):
        setting = logging_setting(rank, quick)
        loggers: dict[str, Any] = {OURS: ours.Logger(setting, curvature)}
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
            num_bytes=0.0,
            flops=setting.flops,
        )
        sizes = {n: one.bytes_per_example for n, one in logged.items() if n != "dattri, in memory"}
        yield Comparison(case, "tokens", setting.num_tokens, sizes)


def influence_case(
    setting: InfluenceSetting,
    what: str,
    num_queries: int,
    mode: str,
    full: Calls,
    top: Calls,
    apart: tuple[str, ...] = (),
    stores: dict[str, list[Path]] | None = None,
) -> Comparison:
    """`full` gives scores [Q, N], `top` the values of the TOP highest, [Q, TOP]."""
    expected = setting.expected(num_queries, mode)
    num_rows, dim = setting.rows.shape
    unit = float(expected.abs().max())
    errors = {}
    if setting.checked == num_rows:
        highest = expected.topk(TOP).values
        errors = dict.fromkeys(top, lambda got: largest_error(got, highest, unit=unit))
    elif top:
        raise ValueError("top: the highest rows are known only where all rows are checked")
    case = Case(
        "peers",
        f"{what}: {setting.title(num_queries)}",
        full | top,
        expected,
        rtol=HALF,  # for FAISS's fp16 as well as for our store
        errors=errors,
        compare=lambda scores: scores[:, : setting.checked],
        unit=unit,
        apart=frozenset(apart),
        num_bytes=2.0 * num_rows * dim,
        flops=2.0 * num_queries * num_rows * dim,
    )
    sizes = {name: _share(paths, num_rows) for name, paths in (stores or {}).items()}
    return Comparison(case, "pairs", num_queries * num_rows, sizes)


def _share(paths: list[Path], num_rows: int) -> Callable[[], float]:
    return lambda: sum(map(folder_bytes, paths)) / num_rows


def l_relatif_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    """l-RelatIF scores beside LogIX's."""
    logix = peer("logix")
    if logix is None:
        return
    shape = (16, 4, 2000) if quick else (64, 4, 20_000)
    setting = InfluenceSetting(*shape, most_queries=16, checked=64)
    attributor = ours.attributor(folder / "logra", setting.modules, setting.rows, curvature=True)
    attributor.self_influence()  # the norms are known from here on
    few = 256 if quick else 512
    theirs = logix.Influence(
        folder / "logix", setting.modules, setting.rows[:few], setting.covariances
    )
    for num_queries in (1, 16):
        queries = setting.queries[:num_queries]
        of_few: Calls = {
            "LogIX": partial(theirs.scores, queries),
            "LogIX, repaired": partial(theirs.scores, queries, logix.REPAIRED, 256),
        }
        comparison = influence_case(
            setting,
            f"l-RelatIF (LogIX: of the first {few} rows)",
            num_queries,
            "l-relatif",
            {OURS: ours.scores(attributor, queries, "l-relatif"), **of_few},
            {},
            tuple(of_few),  # fewer rows: another problem
            {OURS: [folder / "logra"]},
        )
        comparison.counts = dict.fromkeys(of_few, float(num_queries * few))
        rows = list((folder / "logix").glob("*.mmap"))
        comparison.bytes_per_example["LogIX"] = _share(rows, few)
        yield comparison


def influence_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    """Influence and dot products of stored rows in every library that is installed."""
    setting = _middle_setting(quick)
    modules, rows = setting.modules, setting.rows
    curved = ours.attributor(folder / "logra", modules, rows, curvature=True)
    plain = ours.attributor(folder / "logra-plain", modules, rows, curvature=False)
    bergson = dattri = dattri_llm = None
    gradients = folder / "bergson" / "gradients.bin"
    if module := peer("bergson"):
        bergson = module.Influence(folder / "bergson", modules, rows, setting.covariances)
        flat = bergson.opened(factory="Flat")
        half = bergson.opened(factory="IVF1,SQfp16")
        twice = bergson.opened(factory="Flat", hessian=True)
        copied = bergson.opened(hessian=True)
    if module := peer("dattri"):
        dattri = module.Influence(folder / "dattri", modules, rows)
    if module := peer("dattri_llm"):
        dattri_llm = module.Influence(folder / "dattri-llm", modules, rows)
    for num_queries in (1, 16, 64):
        q = setting.queries[:num_queries]
        full: Calls = {OURS: ours.scores(curved, q, "dot")}
        top: Calls = {"logra, top 10": ours.top(curved, q, TOP, "dot")}
        if bergson is not None:
            top |= {
                "Bergson FAISS Flat": bergson.search(flat, q, TOP, by_hand=True),
                "Bergson FAISS SQfp16": bergson.search(half, q, TOP, by_hand=True),
                "Bergson FAISS, hessian_path": bergson.search(twice, q, TOP),
                "Bergson, index in memory": bergson.search(copied, q, TOP),
            }
            full["Bergson Scorer, mapped"] = partial(bergson.stream, q)
        if dattri is not None:
            full["dattri, in memory"] = partial(dattri.scores, q)
        yield influence_case(
            setting,
            "influence",
            num_queries,
            "dot",
            full,
            top,
            ("Bergson, index in memory", "dattri, in memory"),
            {
                OURS: [folder / "logra"],
                "Bergson Scorer, mapped": [gradients],
                "Bergson FAISS Flat": [gradients, folder / "bergson" / "faiss_Flat"],
                "Bergson FAISS SQfp16": [gradients, folder / "bergson" / "faiss_IVF1_SQfp16"],
            },
        )
    stores = {OURS: [folder / "logra-plain"], "dattri-llm TracIn": [folder / "dattri-llm/train"]}
    for num_queries in (1, 16):
        q = setting.queries[:num_queries]
        full = {OURS: ours.scores(plain, q, "dot")}
        top = {"logra, top 10": ours.top(plain, q, TOP, "dot")}
        if dattri_llm is not None:
            full["dattri-llm TracIn"] = partial(dattri_llm.scores, q)
        if bergson is not None:
            top["Bergson FAISS SQfp16"] = bergson.search(half, q, TOP)
        yield influence_case(
            setting, "dot product", num_queries, "identity", full, top, stores=stores
        )


def whitened_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    """The whitened cosine beside Bergson's."""
    module = peer("bergson")
    if module is None:
        return
    setting = _middle_setting(quick)
    curved = ours.attributor(folder / "logra", setting.modules, setting.rows, curvature=True)
    curved.self_influence()
    bergson = module.Influence(
        folder / "bergson", setting.modules, setting.rows, setting.covariances
    )
    copied = bergson.opened(hessian=True, unit_norm=True)
    faiss = bergson.opened(factory="Flat", hessian=True, unit_norm=True)
    mode = "whitened-cosine"
    for num_queries in (1, 16):
        q = setting.queries[:num_queries]
        full: Calls = {
            OURS: ours.scores(curved, q, mode),
            "Bergson Scorer, mapped": partial(bergson.stream, q, whitened=True),
        }
        top: Calls = {
            "logra, top 10": ours.top(curved, q, TOP, mode),
            "Bergson, index in memory": bergson.search(copied, q, TOP),
            "Bergson FAISS, two-sided": bergson.search(faiss, q, TOP),
        }
        apart = ("Bergson, index in memory",)
        yield influence_case(setting, "whitened cosine", num_queries, mode, full, top, apart)


def _middle_setting(quick: bool) -> InfluenceSetting:
    return InfluenceSetting(8, 6, 600, 64) if quick else InfluenceSetting(32, 24, 4000, 64)


def model_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    """The rows of a logged model are the queries, asked of the model and of its store."""
    bergson = peer("bergson")
    if bergson is None:
        return
    setting = logging_setting(16, quick)
    logger = ours.Logger(setting, curvature=False)
    store = logger(folder / "logra")
    rows = logger.rows(store)
    queries = rows[: min(16, len(rows))]
    theirs = bergson.Logger(setting, curvature=False)
    calls = iter(range(1000))

    def score() -> Tensor:
        scores: Tensor = theirs.scores(folder / f"scores{next(calls)}", queries)
        return scores

    case = Case(
        "peers",
        f"dot product, from the model: Q={len(queries)}, {setting.title}",
        {
            "logra, from its store": ours.scores(Attributor(store, "none"), queries, "dot"),
            "bergson score": score,
        },
        queries.double() @ rows.double().T,
        rtol=HALF,
        num_bytes=2.0 * rows.numel(),
        flops=2.0 * len(queries) * rows.numel(),
    )
    yield Comparison(case, "pairs", len(queries) * len(rows))


PARTS: dict[str, Callable[[bool, Path], Iterator[Comparison]]] = {
    "logging": logging_comparisons,
    "l-relatif": l_relatif_comparisons,
    "influence": influence_comparisons,
    "whitened": whitened_comparisons,
    "model": model_comparisons,
}


def show(comparison: Comparison, rows: list[Row]) -> None:
    """Print rates, ratios and bytes, which the harness does not know."""
    unit = f"{comparison.unit}/s"
    rates = {row.provider: comparison.count_of(row.provider) / row.median_ms * 1e3 for row in rows}
    our_rate = next((rate for name, rate in rates.items() if is_ours(name)), None)
    print(f"  {'':<28}{unit:>14}{'ours is':>11}{'least ms':>11}{'bytes':>11}")
    for row in rows:
        rate = rates[row.provider]
        times = "" if our_rate is None else f"{our_rate / rate:,.2f} x"
        size = comparison.bytes_per_example.get(row.provider)
        bytes_text = f"{size():,.0f}" if size else ""
        print(f"  {row.provider:<28}{rate:>14,.0f}{times:>11}{row.least_ms:>11.3f}{bytes_text:>11}")


def run(parts: list[str], args: argparse.Namespace, folder: Path) -> None:
    """Run the parts, each in a folder of its own."""
    limits = machine_limits.measure(5 if args.quick else 9)
    print(machine_limits.header(limits))
    for part in parts:
        inside = folder / part
        inside.mkdir()
        for comparison in PARTS[part](args.quick, inside):
            counts = {name: comparison.count_of(name) for name in comparison.case.providers}
            comparison.case.params |= {"part": part, "unit": comparison.unit, "count": counts}
            show(comparison, run_case(comparison.case, limits, args))
        shutil.rmtree(inside)


def main(argv: list[str] | None = None) -> None:
    """Compare with the libraries that this Python has."""
    known = parser(__doc__)
    known.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    args = known.parse_args(argv)
    prepare(args.threads)
    if ops.isa() is None:
        raise SystemExit(f"the C++ kernels are not loaded by {sys.executable}: nothing to compare")
    for name in NAMES:
        if why := missing(name):
            print(f"left out: {why}")
    with tempfile.TemporaryDirectory(prefix="logra-peers-") as folder, torch.no_grad():
        run(args.only, args, Path(folder))


if __name__ == "__main__":
    main()
