"""Two-stage answers beside the exact ranking: certified ones, and recall that is estimated.

Real gradients: those of bench.accuracy's models, of more examples than they were trained on where
there are some. Float16 rows are the finer store, and each smaller codec's rows are scanned.
Random queries: 1,000, over rows with duplicates, zeros and one huge row; every certified answer is
compared with the ranking of all finer rows, bit by bit. Settings whose data are not there are left
out.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import gpt, mlp
from bench.accuracy.methods import Rows, Subject
from bench.accuracy.setting import Setting, trained_model
from bench.harness import results
from bench.harness.cases import options, prepare
from bench.harness.tables import table
from logra_kernels.attribution import Attributor, InfluenceResult, TwoStage, compress_store
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Module, Store, StoreWriter, codec_names, row_codec

BEST = 20
FINER = "float16"
RECALLS = (0.9, 0.98)
IMAGES = 4_000
QUERIES, ROWS = 1_000, 5_000  # of the random queries
KEPT = ("top_rows", "top_scores", "bottom_rows", "bottom_scores")


def main(argv: list[str] | None = None) -> int:
    """Print the tables, and return 1 if a certified answer was not the exact one."""
    args = options(__doc__, "quick", "threads", "json").parse_args(argv)
    prepare(args.threads)
    wrong = 0
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "random queries": lambda: random_queries(100 if args.quick else QUERIES)
    }
    for setting in (mlp.SETTING,) if args.quick else (mlp.SETTING, gpt.SETTING):
        parts[setting.title] = partial(real_gradients, setting, args.quick)
    for title, records_of in parts.items():
        try:
            records = list(records_of())
        except FileNotFoundError as missing:
            print(f"\n{title} is left out: {missing}")
            continue
        print(f"\n{title}: the {BEST} best and the {BEST} worst of each query")
        print(table(records), flush=True)
        wrong += sum(record["equal"] != record["of"] for record in records)
        if args.json:
            results.append("answers", {"bench": "answers", "case": title, "rows": records})
    return int(wrong > 0)


def coarse_codecs() -> list[str]:
    """The codecs whose rows are smaller than the finer store's."""
    smaller = [name for name in codec_names() if row_codec(name).version > 1]
    return [name for name in smaller if name != FINER]


def random_queries(count: int) -> Iterator[dict[str, Any]]:
    """A row of the table for each codec and mode: certified answers over random rows."""
    generator = torch.Generator().manual_seed(0)
    modules = [Module("first", 16, 32), Module("second", 32, 16)]
    mix = torch.randn(1024, 1024, generator=generator) / 32
    rows = torch.randn(ROWS, 1024, generator=generator) @ mix
    rows *= torch.exp(torch.randn(ROWS, 1, generator=generator))
    rows[1000:1050] = rows[7]
    rows[2000:2010] = 0
    rows[3000] *= 1e4
    queries = torch.randn(count, 1024, generator=generator) @ mix
    queries[::2] = rows[torch.randint(ROWS, (len(queries[::2]),), generator=generator)]
    queries[::2] += 0.3 * torch.randn(len(queries[::2]), 1024, generator=generator) @ mix
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact"
        with StoreWriter.create(exact, modules=modules, dtype="float32", shard_rows=1500) as writer:
            writer.append(range(ROWS), rows.numpy())
        RawCurvature.rebuild(Store.open(exact)).save(Store.open(exact))
        for codec, finer, coarse in coarse_stores(Store.open(exact), Path(folder)):
            two, all_rows = TwoStage(Attributor(coarse), finer), Attributor(finer)
            for mode in ("dot", "l-relatif"):
                yield {"codec": codec, "mode": mode, **certified(two, all_rows, queries, mode)}


def real_gradients(setting: Setting, quick: bool) -> Iterator[dict[str, Any]]:
    """A row of the table for each projection, codec and mode."""
    data = setting.load()
    model = trained_model(setting, data)
    if setting.name == "mlp" and not quick:
        data = mlp.load(IMAGES)
    subject = Subject(setting, data, model)
    for rows in (
        Rows("eigen", "diagonal", "eigen", coordinates=setting.coordinates[1], dtype="float32"),
        Rows("random", "raw", rank=setting.ranks[-1], dtype="float32"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            run = rows.logged(subject, folder)
            run.eval()
            queries = subject.query_rows(run)
            for codec, finer, coarse in coarse_stores(Store.open(run.store.path), Path(folder)):
                two, all_rows = TwoStage(Attributor(coarse), finer), Attributor(finer)
                for mode in ("dot", "l-relatif"):
                    yield {
                        "rows": rows.name,
                        "D": coarse.dim,
                        "codec": codec,
                        "mode": mode,
                        **certified(two, all_rows, queries, mode),
                        **estimated(two, all_rows, queries, mode),
                        **times(two, queries, mode),
                    }


def coarse_stores(exact: Store, folder: Path) -> Iterator[tuple[str, Store, Store]]:
    """Each codec, the finer store, and a store in the codec that was made from it."""
    finer = compress_store(exact, folder / FINER, FINER)
    for codec in coarse_codecs():
        yield codec, finer, compress_store(finer, folder / codec, codec)


def certified(two: TwoStage, all_rows: Attributor, queries: Tensor, mode: str) -> dict[str, Any]:
    """How many certified answers are the exact ones, and how many rows they took."""
    exact = all_rows.top_k(queries, BEST, mode)
    found = two.top_k(queries, BEST, mode, certified=True)
    equal = sum(
        all(torch.equal(getattr(exact, key)[q], getattr(found, key)[q]) for key in KEPT)
        for q in range(len(queries))
    )
    needed = torch.tensor(found.answer.candidates, dtype=torch.float64) / two.scan.store.num_rows
    return {
        "of": len(queries),
        "equal": equal,
        "certified rows %": 100 * float(needed.median()),
        "at most %": 100 * float(needed.max()),
    }


def estimated(two: TwoStage, all_rows: Attributor, queries: Tensor, mode: str) -> dict[str, Any]:
    """The recall of a scan alone, and of answers with a recall as the target."""
    exact = all_rows.top_k(queries, BEST, mode)
    records: dict[str, Any] = {"scan": recall(two.scan.top_k(queries, BEST, mode), exact)}
    for target in RECALLS:
        found = two.top_k(queries, BEST, mode, recall=target)
        needed = torch.tensor(found.answer.candidates, dtype=torch.float64)
        assert found.answer.recall is not None
        assert found.answer.recall_interval is not None
        low, high = found.answer.recall_interval
        records[f"{target} rows %"] = 100 * float(needed.median()) / two.scan.store.num_rows
        records[f"{target} found"] = recall(found, exact)
        records[f"{target} estimated"] = f"{found.answer.recall:.4f} [{low:.4f}, {high:.4f}]"
    return records


def times(two: TwoStage, queries: Tensor, mode: str) -> dict[str, Any]:
    """Milliseconds of one query: the scan alone, and the answers; the best of five."""
    prepared = two.scan.prepare(queries[:1])

    def best(call: Any) -> float:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return 1e3 * min(taken)

    return {
        "scan, ms": best(lambda: two.scan.top_k(prepared, BEST, mode)),
        "200, ms": best(lambda: two.top_k(prepared, BEST, mode, candidates=200)),
        "0.98, ms": best(lambda: two.top_k(prepared, BEST, mode)),
        "certified, ms": best(lambda: two.top_k(prepared, BEST, mode, certified=True)),
    }


def recall(found: InfluenceResult, exact: InfluenceResult) -> float:
    """The part of the exact best and worst rows that was found."""
    ends: Sequence[tuple[Tensor, Tensor]] = (
        (found.top_rows, exact.top_rows),
        (found.bottom_rows, exact.bottom_rows),
    )
    hits = [
        len(set(got) & set(want)) / len(want)
        for one, other in ends
        for got, want in zip(one.tolist(), other.tolist(), strict=True)
    ]
    return sum(hits) / len(hits)


if __name__ == "__main__":
    sys.exit(main())
