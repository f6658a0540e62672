"""Codecs of rows: bytes, accuracy beside float32 rows, and the speed of a scan.

Accuracy: real gradients of the settings of bench.accuracy, scored by an Attributor of each store.
Every codec's store is made of the float32 one by `compress_store`, with the float32 rows' own
curvature. Speed: random rows in memory, in turns. Settings whose data are not there are left out.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.accuracy import gpt, mlp
from bench.accuracy.methods import Rows, Subject
from bench.accuracy.setting import Setting, trained_model
from bench.harness import results
from bench.harness.cases import effort, medians, options, prepare, time_in_turns
from bench.harness.tables import table
from logra_kernels import ops
from logra_kernels.attribution import Attributor, compress_store
from logra_kernels.evaluation import recall_at
from logra_kernels.evaluation.lds import spearman
from logra_kernels.store import Store, codec_names

BEST = 20
ROW_BYTES = 1 << 28  # of float16 rows whose scan is timed


def main(argv: list[str] | None = None) -> int:
    args = options(__doc__, "quick", "threads", "rounds", "json").parse_args(argv)
    prepare(args.threads)
    for setting in (mlp.SETTING,) if args.quick else (mlp.SETTING, gpt.SETTING):
        try:
            records = list(accuracy(setting))
        except FileNotFoundError as missing:
            print(f"\n{setting.title} is left out: {missing}")
            continue
        print(f"\n{setting.title}, beside float32 rows")
        print(table(records))
        if args.json:
            results.append("codecs", {"bench": "codecs", "case": setting.title, "rows": records})
    rows = []
    for num_queries in (1, 16, 64):
        for dim in (8192,) if args.quick else (1024, 8192, 65536):
            spent = effort(args)
            calls = scans(num_queries, dim, (ROW_BYTES >> 3 if args.quick else ROW_BYTES) // 2)
            seconds = medians(time_in_turns(calls, spent))
            rows.append(
                {
                    "queries": num_queries,
                    "D": dim,
                    **{f"{name}, ms": 1e3 * taken for name, taken in seconds.items()},
                    "int8 x float16": seconds["float16"] / seconds["int8"],
                }
            )
    print(f"\nA scan in memory, {torch.get_num_threads()} threads, {ops.isa()}")
    print(table(rows))
    if args.json:
        results.append("codecs", {"bench": "codecs", "case": "scans", "rows": rows})
    return 0


def accuracy(setting: Setting) -> Iterator[dict[str, object]]:
    """A row of the table for each projection, codec and mode."""
    data = setting.load()
    subject = Subject(setting, data, trained_model(setting, data))
    for rows in (
        Rows("eigen", "diagonal", "eigen", coordinates=setting.coordinates[1], dtype="float32"),
        Rows("random", "raw", rank=setting.ranks[-1], dtype="float32"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            run = rows.logged(subject, folder)
            run.eval()
            queries = subject.query_rows(run)
            exact = Store.open(run.store.path)
            for codec in codec_names():
                if codec == exact.dtype:
                    continue
                made = compress_store(exact, Path(folder) / codec, codec)
                for mode in ("dot", "l-relatif"):
                    want = Attributor(exact).scores(queries, mode).scores
                    got = Attributor(made).scores(queries, mode).scores
                    best = [set(one.tolist()) for one in want.topk(BEST).indices]
                    found = recall_at(got.topk(BEST).indices.numpy(), best, BEST)
                    correlation = spearman(got.double().numpy(), want.double().numpy())
                    yield {
                        "rows": rows.name,
                        "codec": codec,
                        "D": made.dim,
                        "bytes a row": made.row_bytes,
                        "mode": mode,
                        "Spearman": float(correlation.mean()),
                        f"recall@{BEST}": float(found.mean()),
                    }


def scans(num_queries: int, dim: int, elements: int) -> dict[str, Callable[[], object]]:
    """Calls of `ops.scores` over the same rows in both codecs."""
    count = elements // dim
    queries, scale = torch.randn(num_queries, dim), torch.rand(count)
    halves = torch.randn(count, dim).half()
    codes = (30 * halves).clamp(-127, 127).to(torch.int8)
    return {
        "float16": lambda: ops.scores(queries, halves, scale),
        "int8": lambda: ops.scores(queries, codes, scale),
    }


if __name__ == "__main__":
    sys.exit(main())
