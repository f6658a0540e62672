"""Logging and influence beside LogIX, Bergson, dattri and dattri-llm, as installed by
`make peers-env`: .venv-peers/bin/python -m bench.bench_peers [--quick] [--only logging …]

logging     tokens/s of a small language model: forward and backward pass, rows projected by the
            same matrices, the store finished. Without curvature, and with the raw covariances.
            "nothing kept" is the two passes alone, down to the embedding.
l-relatif   pairs/s of LogIX's "cosine" over a store, the norms of our rows known already, LogIX's
            inverses too. LogIX has the first rows only: its time is proportional to their number.
            Repaired, it also takes 256 rows at a time instead of 16.
influence   pairs/s of Eq. 3 with the questions preconditioned in the call; then of the gradients'
            plain dot product, for dattri-llm has no curvature of rows.
whitened    pairs/s where both sides are normalised: Bergson's two-sided mode.
model       pairs/s of what `bergson score` does, which is to run the model again for every set of
            questions.

Before anything is timed the results are compared: rows with float64 autograd of one example at a
time, scores with float64 algebra on the rows. A library whose result is wrong is named, and not
timed. Libraries that are not installed are named too.

Below each of the harness's tables stand the rate, the provider's time over ours (above 1: ours is
faster), bytes on disk an example, and by how much the resident memory grew at most in one call
(files mapped and read count).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import _limits
from bench._harness import OURS, Case, Row, common_parser, largest_error, run_case
from bench.peers import NAMES, missing, ours
from bench.peers.influence import InfluenceSetting
from bench.peers.setting import LoggingSetting
from logra_kernels import ops

TOP = 10
FLOAT32 = 1e-4  # sums of products in another order, of the largest value
HALF = 1e-3  # rows rounded to 11 bits, of the largest value


@dataclass
class Comparison:
    """A case, what it counts, and what the harness does not know of its providers."""

    case: Case
    unit: str
    count: float  # of the unit, in a call
    bytes_per_example: dict[str, Callable[[], float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)  # of providers with another count

    def count_of(self, provider: str) -> float:
        return self.counts.get(provider, self.count)


class Watched:
    """A provider; its first call is watched for how far the resident memory grows."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.grown_mib: float | None = None

    def __call__(self) -> Any:
        if self.grown_mib is not None or not _forget_peak():
            return self.call()
        before = _resident_kib("VmRSS")
        result = self.call()
        self.grown_mib = (_resident_kib("VmHWM") - before) / 1024
        return result


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return False
    return True


def _resident_kib(key: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(float(line.split()[1]) for line in status.splitlines() if line.startswith(key))


class Logged:
    """A logger as a provider: every call into a folder of its own, the last one kept."""

    def __init__(self, logger: Any, folder: Path) -> None:
        self.logger, self.folder = logger, folder
        self.last: Path | None = None
        self.calls = 0

    def __call__(self) -> Path:
        if self.last is not None:
            shutil.rmtree(self.last, ignore_errors=True)
        self.calls += 1
        self.last = self.logger(self.folder / f"store{self.calls}")
        return self.last

    def bytes_per_example(self, num_examples: int) -> float:
        """Of the files that grow with the examples."""
        assert self.last is not None
        return sum(map(bytes_of, self.last.rglob(self.logger.row_files))) / num_examples


def logging_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    small = {"num_examples": 8, "batch_size": 4, "num_tokens": 32, "blocks": 2, "width": 128}
    for rank, curvature in ((16, False), (8, True)) if quick else ((64, False), (16, True)):
        setting = LoggingSetting(rank, **(small if quick else {}))
        loggers: dict[str, Any] = {"logra": ours.Logger(setting, curvature)}
        if missing("logix") is None:
            from bench.peers import with_logix

            loggers["LogIX"] = with_logix.Logger(setting, curvature)
            loggers["LogIX, repaired"] = with_logix.Logger(setting, curvature, with_logix.REPAIRED)
        if missing("bergson") is None:
            from bench.peers import with_bergson

            loggers["Bergson"] = with_bergson.Logger(setting, curvature)
        if missing("dattri") is None:
            from bench.peers import with_dattri

            loggers["dattri, in memory"] = with_dattri.Logger(setting, curvature)
        if missing("dattri_llm") is None and not curvature:
            from bench.peers import with_dattri_llm

            loggers["dattri-llm"] = with_dattri_llm.Logger(setting)
        providers: dict[str, Any] = {}
        errors, sizes = {}, {}
        for number, (name, logger) in enumerate(loggers.items()):
            logged = Logged(logger, folder / f"rank{rank}-{number}")
            providers[name] = Watched(logged)
            errors[name] = _error_of_rows(logger, setting)
            if name != "dattri, in memory":
                sizes[name] = _size(logged, setting)
        passes = "nothing kept"
        providers[passes] = Watched(_passes_alone(setting))
        errors[passes] = lambda _: 0.0
        what = "rows and raw covariances" if curvature else "rows"
        yield Comparison(
            Case(
                "peers",
                f"logging {what}: {setting.title}",
                providers,
                setting.first_rows,
                rtol=FLOAT32,
                our_rtol=HALF,
                errors=errors,
                apart=frozenset({passes}),
                num_bytes=0.0,
                flops=setting.flops,
            ),
            "tokens",
            setting.num_tokens,
            sizes,
        )


def _error_of_rows(logger: Any, setting: LoggingSetting) -> Callable[[Any], float]:
    return lambda path: largest_error(
        logger.rows(path)[: len(setting.first_rows)], setting.first_rows
    )


def _size(logged: Logged, setting: LoggingSetting) -> Callable[[], float]:
    return lambda: logged.bytes_per_example(len(setting.ids))


def _passes_alone(setting: LoggingSetting) -> Callable[[], None]:
    model = setting.probe()

    def run() -> None:
        for _, ids in setting.batches():
            model.zero_grad()
            with torch.enable_grad():
                setting.summed_loss(model, ids).backward()

    return run


def influence_case(
    setting: InfluenceSetting,
    what: str,
    num_queries: int,
    mode: str,
    full: dict[str, Callable[[], Tensor]],
    top: dict[str, Callable[[], Tensor]],
    apart: frozenset[str] = frozenset(),
    stores: dict[str, list[Path]] | None = None,
) -> Comparison:
    """`full` gives scores [Q, N], `top` the values of the TOP highest, [Q, TOP]."""
    expected = setting.expected(num_queries, mode)
    num_rows, dim = setting.rows.shape
    unit = float(expected.abs().max())
    errors = {}
    if setting.checked == num_rows:
        highest = expected.topk(TOP).values
        errors = {name: lambda got: largest_error(got, highest, unit=unit) for name in top}
    elif top:
        raise ValueError("top: the highest rows are known only where all rows are checked")
    providers = {name: Watched(call) for name, call in {**full, **top}.items()}
    return Comparison(
        Case(
            "peers",
            f"{what}: {setting.title(num_queries)}",
            providers,
            expected,
            rtol=HALF,  # for FAISS's fp16 as well as for our store
            errors=errors,
            compare=lambda scores: scores[:, : setting.checked],
            unit=unit,
            apart=apart,
            num_bytes=2.0 * num_rows * dim,
            flops=2.0 * num_queries * num_rows * dim,
        ),
        "pairs",
        num_queries * num_rows,
        {name: _share(paths, num_rows) for name, paths in (stores or {}).items()},
    )


def _share(paths: list[Path], num_rows: int) -> Callable[[], float]:
    return lambda: sum(map(bytes_of, paths)) / num_rows


def bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return sum(file.stat().st_size for file in files)


def l_relatif_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    if missing("logix") is not None:
        return
    from bench.peers import with_logix

    shape = (16, 4, 2000) if quick else (64, 4, 20_000)
    setting = InfluenceSetting(*shape, most_queries=16, checked=64)
    attributor = ours.attributor(folder / "logra", setting.modules, setting.rows, curvature=True)
    attributor.self_influence()  # the norms are known from here on
    few = 256 if quick else 512
    peer = with_logix.Influence(
        folder / "logix", setting.modules, setting.rows[:few], setting.covariances
    )
    for num_queries in (1, 16):
        queries = setting.queries[:num_queries]
        comparison = influence_case(
            setting,
            f"l-RelatIF (LogIX: of the first {few} rows)",
            num_queries,
            "l-relatif",
            {
                "logra": lambda q=queries: attributor.scores(q, "l-relatif").scores,
                "LogIX": lambda q=queries: peer.scores(q),
                "LogIX, repaired": lambda q=queries: peer.scores(q, with_logix.REPAIRED, 256),
            },
            {},
        )
        theirs = dict.fromkeys(("LogIX", "LogIX, repaired"), float(num_queries * few))
        comparison.counts = theirs
        comparison.case.apart = frozenset(theirs)  # fewer rows: another problem
        comparison.bytes_per_example = {
            "logra": _share([folder / "logra"], len(setting.rows)),
            "LogIX": _share(list((folder / "logix").glob("*.mmap")), few),
        }
        yield comparison


def influence_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    setting = _middle_setting(quick)
    curved = ours.attributor(folder / "logra", setting.modules, setting.rows, curvature=True)
    plain = ours.attributor(folder / "logra-plain", setting.modules, setting.rows, curvature=False)
    bergson = dattri = dattri_llm = None
    gradients = folder / "bergson" / "gradients.bin"
    if missing("bergson") is None:
        from bench.peers import with_bergson

        bergson = with_bergson.Influence(
            folder / "bergson", setting.modules, setting.rows, setting.covariances
        )
        flat = bergson.opened(factory="Flat")
        half = bergson.opened(factory="IVF1,SQfp16")
        twice = bergson.opened(factory="Flat", hessian=True)
        copied = bergson.opened(hessian=True)
    if missing("dattri") is None:
        from bench.peers import with_dattri

        dattri = with_dattri.Influence(folder / "dattri", setting.modules, setting.rows)
    for num_queries in (1, 16, 64):
        q = setting.queries[:num_queries]
        full = {"logra": lambda q=q: curved.scores(q, "dot").scores}
        top = {"logra, top 10": lambda q=q: curved.top_k(q, TOP, "dot").top_scores}
        if bergson is not None:
            top |= {
                "Bergson FAISS Flat": lambda q=q: flat.search(bergson.preconditioned(q), TOP)[0],
                "Bergson FAISS SQfp16": lambda q=q: half.search(bergson.preconditioned(q), TOP)[0],
                "Bergson FAISS, hessian_path": lambda q=q: twice.search(bergson.nested(q), TOP)[0],
                "Bergson, index in memory": lambda q=q: copied.search(bergson.nested(q), TOP)[0],
            }
            full["Bergson Scorer, mapped"] = lambda q=q: bergson.stream(q)
        if dattri is not None:
            full["dattri, in memory"] = lambda q=q: dattri.scores(q)
        yield influence_case(
            setting,
            "influence",
            num_queries,
            "dot",
            full,
            top,
            frozenset({"Bergson, index in memory", "dattri, in memory"}),
            {
                "logra": [folder / "logra"],
                "Bergson Scorer, mapped": [gradients],
                "Bergson FAISS Flat": [gradients, folder / "bergson" / "faiss_Flat"],
                "Bergson FAISS SQfp16": [gradients, folder / "bergson" / "faiss_IVF1_SQfp16"],
            },
        )

    if missing("dattri_llm") is None:
        from bench.peers import with_dattri_llm

        dattri_llm = with_dattri_llm.Influence(folder / "dattri-llm", setting.modules, setting.rows)
    for num_queries in (1, 16):
        q = setting.queries[:num_queries]
        full = {"logra": lambda q=q: plain.scores(q, "dot").scores}
        top = {"logra, top 10": lambda q=q: plain.top_k(q, TOP, "dot").top_scores}
        if dattri_llm is not None:
            full["dattri-llm TracIn"] = lambda q=q: dattri_llm.scores(q)
        if bergson is not None:
            top["Bergson FAISS SQfp16"] = lambda q=q: half.search(bergson.nested(q), TOP)[0]
        stores = {"logra": [folder / "logra-plain"]}
        if dattri_llm is not None:
            stores["dattri-llm TracIn"] = [folder / "dattri-llm" / "train"]
        yield influence_case(
            setting, "dot product", num_queries, "identity", full, top, stores=stores
        )


def whitened_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    if missing("bergson") is not None:
        return
    from bench.peers import with_bergson

    setting = _middle_setting(quick)
    curved = ours.attributor(folder / "logra", setting.modules, setting.rows, curvature=True)
    curved.self_influence()
    bergson = with_bergson.Influence(
        folder / "bergson", setting.modules, setting.rows, setting.covariances
    )
    copied = bergson.opened(hessian=True, unit_norm=True)
    faiss = bergson.opened(factory="Flat", hessian=True, unit_norm=True)
    for num_queries in (1, 16):
        q = setting.queries[:num_queries]
        full = {
            "logra": lambda q=q: curved.scores(q, "whitened-cosine").scores,
            "Bergson Scorer, mapped": lambda q=q: bergson.stream(q, whitened=True),
        }
        top = {
            "logra, top 10": lambda q=q: curved.top_k(q, TOP, "whitened-cosine").top_scores,
            "Bergson, index in memory": lambda q=q: copied.search(bergson.nested(q), TOP)[0],
            "Bergson FAISS, two-sided": lambda q=q: faiss.search(bergson.nested(q), TOP)[0],
        }
        yield influence_case(
            setting,
            "whitened cosine",
            num_queries,
            "whitened-cosine",
            full,
            top,
            frozenset({"Bergson, index in memory"}),
        )


def _middle_setting(quick: bool) -> InfluenceSetting:
    return InfluenceSetting(8, 6, 600, 64) if quick else InfluenceSetting(32, 24, 4000, 64)


def model_comparisons(quick: bool, folder: Path) -> Iterator[Comparison]:
    """The rows of a logged model as questions to it, and to its store."""
    if missing("bergson") is not None:
        return
    from bergson import Scorer

    from bench.peers import with_bergson
    from logra_kernels.attribution import Attributor

    small = {"num_examples": 8, "batch_size": 4, "num_tokens": 32, "blocks": 2, "width": 128}
    setting = LoggingSetting(16, **(small if quick else {}))
    logger = ours.Logger(setting, curvature=False)
    store = logger(folder / "logra")
    rows = logger.rows(store)
    num_queries = min(16, len(rows))
    queries = rows[:num_queries]
    attributor = Attributor(store, "none")
    peer = with_bergson.Logger(setting, curvature=False)
    sizes = [module.size for module in setting.modules]
    asked = dict(zip(peer.names, queries.split(sizes, dim=1), strict=True))
    calls = iter(range(1000))

    def score() -> Tensor:
        writer = with_bergson.Kept(len(rows), num_queries)
        scorer = Scorer(asked, peer.names, writer, torch.device("cpu"), torch.float32)
        peer(folder / f"scores{next(calls)}", scorer)
        return writer.scores.T

    expected = queries.double() @ rows.double().T
    yield Comparison(
        Case(
            "peers",
            f"dot product, from the model: Q={num_queries}, {setting.title}",
            {
                "logra, from its store": Watched(lambda: attributor.scores(queries, "dot").scores),
                "bergson score": Watched(score),
            },
            expected,
            rtol=HALF,
            num_bytes=2.0 * rows.numel(),
            flops=2.0 * num_queries * rows.numel(),
        ),
        "pairs",
        expected.numel(),
    )


PARTS: dict[str, Callable[[bool, Path], Iterator[Comparison]]] = {
    "logging": logging_comparisons,
    "l-relatif": l_relatif_comparisons,
    "influence": influence_comparisons,
    "whitened": whitened_comparisons,
    "model": model_comparisons,
}


def show(comparison: Comparison, rows: list[Row]) -> None:
    """Rates and ratios, and what only this bench knows."""
    unit = f"{comparison.unit}/s"
    rates = {row.provider: comparison.count_of(row.provider) / row.median_ms * 1e3 for row in rows}
    our_rate = next((rate for name, rate in rates.items() if name.startswith(OURS)), None)
    print(f"  {'':<28}{unit:>14}{'ours is':>11}{'least ms':>11}{'bytes':>11}{'MiB':>7}")
    for row in rows:
        rate = rates[row.provider]
        times = "" if our_rate is None else f"{our_rate / rate:,.2f} x"
        size = comparison.bytes_per_example.get(row.provider)
        bytes_text = f"{size():,.0f}" if size else ""
        provider = comparison.case.providers[row.provider]
        grown = provider.grown_mib if isinstance(provider, Watched) else None
        grown_text = "" if grown is None else f"{grown:.0f}"
        print(
            f"  {row.provider:<28}{rate:>14,.0f}{times:>11}{row.least_ms:>11.3f}{bytes_text:>11}"
            f"{grown_text:>7}"
        )


def run(parts: list[str], args: Any, folder: Path) -> None:
    limits = _limits.measure(5 if args.quick else 9)
    print(f"{torch.get_num_threads()} threads, isa {ops.isa()}, {limits.line()}")
    for part in parts:
        inside = folder / part
        inside.mkdir()
        for comparison in PARTS[part](args.quick, inside):
            names = comparison.case.providers
            comparison.case.params |= {
                "part": part,
                "unit": comparison.unit,
                "count": {name: comparison.count_of(name) for name in names},
            }
            rows = run_case(comparison.case, limits, args)
            show(comparison, rows)
        shutil.rmtree(inside)


def main(argv: list[str] | None = None) -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if ops.isa() is None:
        raise SystemExit(f"the C++ kernels are not loaded by {sys.executable}: nothing to compare")
    for name in NAMES:
        why = missing(name)
        if why is not None:
            print(f"left out: {why}")
    folder = Path(tempfile.mkdtemp(prefix="logra-peers-"))
    try:
        with torch.no_grad():
            run(args.only, args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
