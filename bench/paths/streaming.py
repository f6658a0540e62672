"""A store three times the page cache's budget: python -m bench.paths.streaming [--gib 3]

Top 10 of a store on disk, whose pages are evicted before every pass, in a control group that leaves
a third of the store for the page cache (where this process may make one). The disk's rate is that
of plain O_DIRECT reads of the same files into memory of huge pages, the best of several request
sizes and numbers of threads, in the same rounds. Memory: how far that of this process rises during
a pass, and what the pass leaves in the page cache. Baselines are what one would write: a mapped
file, and numpy.fromfile, in blocks of 1,024 rows.
"""

import argparse
import os
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import results
from bench.harness.cases import Case, effort, measure, options, prepare, publish
from bench.harness.memory import PeakMemory, cached, evict, limited
from bench.paths import attribution
from bench.paths.attribution import TOP, Baseline, mapped_file, squares
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Shard, Store, StoreWriter, huge_buffer
from logra_kernels.store.files import DATA_OFFSET_BYTES

REQUESTS = [(1, 4), (2, 2), (2, 4), (4, 4)]  # threads, MiB


def make_store(path: Path, num_rows: int, num_modules: int = 64) -> Store:
    """Rows that all differ: 2,048 are drawn, the others are these with their columns moved."""
    modules = squares(num_modules, 16)
    sizes = [module.size for module in modules]
    base, scale = ops.pack_rows(torch.randn(2048, sum(sizes)), sizes, [0] * len(sizes))
    with StoreWriter.create(path, modules=modules) as writer:
        writer.set_module_exponents([0] * len(sizes))
        for first in range(0, num_rows, len(base)):
            count = min(len(base), num_rows - first)
            rows = np.roll(base.numpy(), first // 128, axis=1)[:count]
            writer.append(range(first, first + count), rows, scale.numpy()[:count])
    store = Store.open(path)
    curvature = RawCurvature(modules)
    curvature.update(torch.from_numpy(store.take(range(2048))))
    curvature.save(store)
    return store


def read_directly(store: Store, threads: int, request_bytes: int) -> int:
    """Every byte of every shard's rows, in order, around the page cache; how many they were."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    files = [(os.open(shard.path, flags), shard.file_bytes) for shard in store.shards]
    place = threading.local()

    def begin() -> None:
        place.buffer = huge_buffer(request_bytes)
        place.buffer[::4096] = 0

    def read(request: tuple[int, int]) -> int:
        file, offset = request
        return os.preadv(file, [place.buffer.data], offset)

    requests = [(file, at) for file, size in files for at in range(0, size, request_bytes)]
    try:
        with ThreadPoolExecutor(threads, initializer=begin) as pool:
            return sum(pool.map(read, requests))
    finally:
        for file, _ in files:
            os.close(file)


def read_file(dim: int, shard: Shard, start: int, count: int) -> "np.ndarray[Any, Any]":
    offset = DATA_OFFSET_BYTES + 2 * dim * start
    return np.fromfile(shard.path, np.float16, count * dim, offset=offset).reshape(count, dim)


def from_disk(store: Store, queries: Tensor) -> Case:
    """Ours must have the bits of the mapped way; a read of the disk must have every byte."""
    streamed, mapped = (Attributor(store, reading=way) for way in ("streamed", "mapped"))
    streamed.self_influence()  # known from here on
    baseline = Baseline(streamed, queries)
    num_bytes = sum(shard.file_bytes for shard in store.shards)
    disk = {
        f"disk, {threads} x {mib} MiB": partial(read_directly, store, threads, mib << 20)
        for threads, mib in REQUESTS
    }
    expected = mapped.top_k(queries, TOP).top_scores
    return attribution.case(
        "streaming",
        store,
        queries,
        {
            "logra streamed": lambda: streamed.top_k(queries, TOP).top_scores,
            "logra mapped": lambda: mapped.top_k(queries, TOP).top_scores,
            "numpy map, torch mm": partial(baseline.top, mapped_file),
            "numpy fromfile, torch mm": partial(baseline.top, partial(read_file, store.dim)),
            **disk,
        },
        expected=expected,
        our_rtol=0.0,
        errors=dict.fromkeys(disk, lambda got: float(got != num_bytes)),
        apart=frozenset(disk),
        before=partial(evict, store),
    )


def run(store: Store, num_queries: int, args: argparse.Namespace, limit: str) -> None:
    case = from_disk(store, torch.randn(num_queries, store.dim))
    record = measure(case, effort(args), limited=False)
    disk_ms = min(ms for name, ms in results.medians_ms(record).items() if name in case.apart)
    for row in record["providers"]:
        evict(store)
        peak = PeakMemory()
        case.providers[row["provider"]]()
        row["of_disk"] = disk_ms / row["median_ms"]
        if row["provider"] == "logra streamed":
            record["of_disk"] = row["of_disk"]
        row["own_mib"], row["left_in_cache_mib"] = peak.stop() / 2**20, cached(store) / 2**20
    record["params"] = {"page cache": limit}
    publish(record, args.json)


def main(argv: list[str] | None = None) -> None:
    """Make the store, limit the page cache, and print the tables."""
    warnings.filterwarnings("ignore", "the curvature is of 2048 rows")
    known = options(__doc__)
    known.add_argument("--gib", type=float, help="size of the store (default: 3; quick: 1)")
    known.add_argument("--folder", help="where the store is made (default: the temporary folder)")
    args = known.parse_args(argv)
    prepare(args.threads)
    num_bytes = int((args.gib or (1 if args.quick else 3)) * 2**30)
    with tempfile.TemporaryDirectory(prefix="logra-bench-", dir=args.folder) as folder:
        store = make_store(Path(folder) / "store", num_bytes // (2 * 64 * 256))
        evict(store)
        if cached(store):
            print(f"{folder}: this file system keeps its files in memory; nothing to measure")
            return
        with torch.no_grad(), limited(num_bytes // 3) as limit:
            print(f"a third of the store for the page cache: {limit}")
            for num_queries in (1, 16):
                run(store, num_queries, args, limit)


if __name__ == "__main__":
    main()
