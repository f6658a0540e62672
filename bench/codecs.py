"""Codecs of rows: bytes, accuracy beside float32 rows, and the speed of a scan.

accuracy  real gradients of the settings of bench.accuracy, scored by an Attributor of each store.
          Every codec's store is made of the float32 one by `compress_store`, with the float32
          rows' own curvature. Settings whose data are not there are left out.
scans     random rows in memory, in turns.
disk      one query of stores on disk, in turns, with the page cache emptied before each.

bench.peers.codecs has other libraries' scans beside ours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.accuracy import gpt, mlp
from bench.accuracy.methods import Rows, Subject
from bench.accuracy.setting import Setting, trained_model
from bench.harness import results
from bench.harness.cases import effort, medians, options, prepare, time_in_turns
from bench.harness.limits import BYTES, READ, probes
from bench.harness.tables import table
from bench.paths import compressed
from logra_kernels import ops, reference
from logra_kernels.attribution import Attributor, compress_store
from logra_kernels.evaluation import recall_at
from logra_kernels.evaluation.lds import spearman
from logra_kernels.store import Store, codec_names

PARTS = ("accuracy", "scans", "disk")
BEST = 20
PLANES = {"int4": 4, "int2": 2, "sign": 1}  # bits an element
ROW_BYTES = 1 << 28  # of float16 rows whose scan is timed


def main(argv: list[str] | None = None) -> int:
    known = options(__doc__, "quick", "threads", "rounds", "json")
    known.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    known.add_argument("--gib", type=float, help="float16 rows on disk (default: 1; quick: 1/8)")
    known.add_argument("--folder", help="where stores are made (default: the temporary folder)")
    args = known.parse_args(argv)
    prepare(args.threads)
    threads = f"{torch.get_num_threads()} threads, {ops.isa()}"
    if "accuracy" in args.only:
        for setting in (mlp.SETTING,) if args.quick else (mlp.SETTING, gpt.SETTING):
            try:
                records = list(accuracy(setting))
            except FileNotFoundError as missing:
                print(f"\n{setting.title} is left out: {missing}")
                continue
            publish(f"{setting.title}, beside float32 rows", setting.title, records, args)
    if "scans" in args.only:
        records = []
        for num_queries in (1, 16, 64):
            for dim in (8192,) if args.quick else (8192, 32768, 65536):
                records += scan_rates(num_queries, dim, args)
        publish(f"A scan in memory, {threads}", "scans", records, args)
    if "disk" in args.only:
        with torch.no_grad():
            records = list(compressed.from_disk(args))
        if records:
            publish(f"One query from disk, {threads}", "disk", records, args)
    return 0


def publish(
    title: str, case: str, records: list[dict[str, object]], args: argparse.Namespace
) -> None:
    """Print a table; append it to bench/results/codecs.jsonl if it is to be stored."""
    print(f"\n{title}")
    print(table(records), flush=True)
    if args.json:
        results.append("codecs", {"bench": "codecs", "case": case, "rows": records})


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


def scan_rates(num_queries: int, dim: int, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row for each codec: its scan beside the machine's read bandwidth and rate of bytes.

    Every codec has as many rows, so narrow ones may lie in the last level of cache.
    """
    elements = (ROW_BYTES >> 3 if args.quick else ROW_BYTES) // 2
    calls, row_bytes = scans(num_queries, dim, elements)
    byte_work = ops.limits.multiply_bytes(1e8) / 2
    beside = {READ: probes()[READ][1], BYTES: lambda: ops.limits.multiply_bytes(1e8)}
    seconds = medians(time_in_turns({**calls, **beside}, effort(args)))
    read_rate, byte_rate = probes()[READ][0] / seconds[READ], byte_work / seconds[BYTES]
    count = elements // dim
    for name in calls:
        products = num_queries * count * dim * (2 if name == "int8" else 1) / seconds[name]
        yield {
            "queries": num_queries,
            "D": dim,
            "codec": name,
            "ms": 1e3 * seconds[name],
            "x float16": seconds["float16"] / seconds[name],
            "GB/s": count * row_bytes[name] / seconds[name] / 1e9,
            "of read": count * row_bytes[name] / seconds[name] / read_rate,
            "of byte products": None if name == "float16" else products / byte_rate,
        }


def scans(
    num_queries: int, dim: int, elements: int
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """Calls of the scans of as many rows in every codec, checked; and the bytes of a row."""
    count = elements // dim
    queries, scale = torch.randn(num_queries, dim), torch.rand(count)
    halves = torch.randn(count, dim).half()
    codes = (30 * halves).clamp(-127, 127).to(torch.int8)
    bits = [torch.randint(256, (count, dim // 8), dtype=torch.uint8) for _ in range(4)]
    calls: dict[str, Callable[[], Tensor]] = {
        "float16": partial(ops.scores, queries, halves, scale),
        "int8": partial(ops.scores, queries, codes, scale),
    }
    row_bytes = {"float16": 2 * dim, "int8": dim}
    few = min(24, count)
    wanted = {
        "float16": queries @ halves[:few].float().T * scale[:few],
        "int8": reference.scores(queries, codes[:few], scale[:few]),
    }
    for name, planes in PLANES.items():
        levels = torch.linspace(-120, 120, 2**planes).round().to(torch.int8)
        calls[name] = partial(ops.plane_scores, queries, bits[:planes], levels, scale)
        row_bytes[name] = planes * dim // 8
        first = [plane[:few] for plane in bits[:planes]]
        wanted[name] = reference.plane_scores(queries, first, levels, scale[:few])
    for name, call in calls.items():
        rtol, atol = (1e-3, 1e-1) if name == "float16" else (0.0, 0.0)
        torch.testing.assert_close(call()[:, :few], wanted[name], rtol=rtol, atol=atol)
    return calls, row_bytes


if __name__ == "__main__":
    sys.exit(main())
