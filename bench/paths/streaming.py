"""A store three times the page cache's budget: python -m bench.bench_streaming [--quick]

Top 10 of a store on disk, whose pages are evicted before every pass, in a control group that leaves
a third of the store for the page cache (where this process may make one). The disk's rate is that
of plain O_DIRECT reads of the same files into memory of huge pages, the best of several request
sizes and numbers of threads, in the same rounds. Memory: peak growth of this process during the
pass that is checked, anonymous and mapped; and what the pass left in the page cache. Baselines are
what one would write: a mapped file, and numpy.fromfile, in blocks of 1,024 rows.
"""

import argparse
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import _results
from bench._harness import common_parser, largest_error
from bench._page_cache import cached, evict, growth, limited
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Module, Shard, Store, StoreWriter, huge_buffer
from logra_kernels.store.files import DATA_OFFSET_BYTES

TOP = 10
MODULES = [Module(f"module.{i}", 16, 16) for i in range(64)]
SIZES = [module.size for module in MODULES]
DIM = sum(SIZES)
REQUESTS = [(1, 4), (2, 2), (2, 4), (4, 4)]  # threads, MiB


@dataclass
class Row:
    provider: str
    median_s: float
    spread_s: float
    gb_per_s: float
    of_disk: float
    anonymous_mib: float
    mapped_mib: float
    page_cache_mib: float


def make_store(path: Path, num_rows: int) -> Store:
    """Rows of which none equals another: 2,048 are drawn, the others have their columns moved."""
    base, scale = ops.pack_rows(torch.randn(2048, DIM), SIZES, [0] * len(SIZES))
    with StoreWriter.create(path, modules=MODULES) as writer:
        writer.set_module_exponents([0] * len(SIZES))
        for first in range(0, num_rows, len(base)):
            count = min(len(base), num_rows - first)
            rows = np.roll(base.numpy(), first // 128, axis=1)[:count]
            writer.append(range(first, first + count), rows, scale.numpy()[:count])
    store = Store.open(path)
    curvature = RawCurvature(MODULES)
    curvature.update(torch.from_numpy(store.take(range(2048))))
    curvature.save(store)
    return store


def read_directly(store: Store, threads: int, request_bytes: int) -> None:
    """Every byte of every shard's rows, in order, around the page cache."""
    todo = iter(
        [
            (shard, offset)
            for shard in store.shards
            for offset in range(0, shard.file_bytes, request_bytes)
        ]
    )
    files = {
        shard: os.open(shard.path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        for shard in store.shards
    }
    lock = threading.Lock()
    total = []

    def work() -> None:
        place = huge_buffer(request_bytes)
        place[::4096] = 0
        while True:
            with lock:
                shard, offset = next(todo, (None, 0))
            if shard is None:
                return
            total.append(os.preadv(files[shard], [place.data], offset))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for descriptor in files.values():
        os.close(descriptor)
    assert sum(total) == sum(shard.file_bytes for shard in store.shards)


class Baseline:
    """The same scores in a few lines of NumPy and torch, for one mode and one set of queries."""

    def __init__(self, attributor: Attributor, queries: Tensor) -> None:
        self.store = attributor.store
        ready = attributor.precondition(queries)  # [Q, D]
        # In float16's range: neither are queries subnormal, nor do products with rows overflow.
        self.unit = 0.005 / float(ready.square().mean().sqrt())
        self.halves = (ready * self.unit).half()
        self.norms = attributor.self_influence().sqrt().float()  # [N]

    def top(self, load: Callable[[Shard, int, int], np.ndarray]) -> Tensor:
        best: list[Tensor] = []
        for shard in self.store.shards:
            for start in range(0, shard.num_rows, 1024):
                block = torch.from_numpy(load(shard, start, min(1024, shard.num_rows - start)))
                here = slice(shard.first_row + start, shard.first_row + start + len(block))
                scale = torch.from_numpy(shard.row_scale[start : start + len(block)])
                scale = scale / self.norms[here] / self.unit
                scores = (self.halves @ block.T).float() * scale
                best = [torch.cat([*best, scores.topk(TOP).values], dim=1).topk(TOP).values]
        return best[0]


def mapped_file(shard: Shard, start: int, count: int) -> np.ndarray:
    # "c": torch warns about memory that may not be written
    return np.load(shard.path, mmap_mode="c")[start : start + count]


def read_file(shard: Shard, start: int, count: int) -> np.ndarray:
    offset = DATA_OFFSET_BYTES + 2 * DIM * start
    return np.fromfile(shard.path, np.float16, count * DIM, offset=offset).reshape(count, DIM)


def providers(store: Store, queries: dict[int, Tensor]) -> dict[str, Callable[[], Tensor]]:
    ways = {reading: Attributor(store, reading=reading) for reading in ("streamed", "mapped")}
    ways["streamed"].self_influence()  # known from here on

    def top(reading: str, count: int, mode: str) -> Tensor:
        found = ways[reading].top_k(queries[count], TOP, mode).top_scores
        assert found is not None
        return found

    few = min(queries)
    baseline = Baseline(ways["streamed"], queries[few])
    found = {
        f"logra streamed, Q={count}": lambda q=count: top("streamed", q, "l-relatif")
        for count in queries
    }
    return found | {
        f"logra streamed, Q={few}, dot": lambda: top("streamed", few, "dot"),
        f"logra mapped, Q={few}": lambda: top("mapped", few, "l-relatif"),
        f"numpy map, torch mm, Q={few}": lambda: baseline.top(mapped_file),
        f"numpy fromfile, torch mm, Q={few}": lambda: baseline.top(read_file),
    }


def check(
    store: Store, queries: dict[int, Tensor], calls: dict[str, Callable[[], Tensor]]
) -> dict[str, tuple[float, float, float]]:
    """Every provider once, against float64 products of a mapped pass; its memory in MiB."""
    memory = {}
    wanted = {}
    attributor = Attributor(store, reading="mapped")
    for count, rows in queries.items():
        for mode in ("l-relatif", "dot"):
            wanted[count, mode] = attributor.top_k(rows, TOP, mode).top_scores
    for name, call in calls.items():
        evict(store)
        got: list[Tensor] = []
        anonymous, mapped = growth(lambda call=call, got=got: got.append(call()))
        key = (int(name.split("Q=")[1].split(",")[0]), "dot" if "dot" in name else "l-relatif")
        if name.startswith("logra"):
            assert torch.equal(got[0], wanted[key]), f"{name}: other bits than the mapped way"
        else:  # fp16 queries and products: 11 bits
            assert largest_error(got[0], wanted[key]) <= 5e-3, name
        memory[name] = (anonymous / 2**20, mapped / 2**20, cached(store) / 2**20)
    return memory


def run(store: Store, args: argparse.Namespace) -> list[Row]:
    queries = {count: torch.randn(count, DIM) / DIM / 64 for count in (1, 16)}
    calls = providers(store, queries)
    memory = check(store, queries, calls)
    disk = {
        f"disk, {threads} x {mib} MiB": lambda t=threads, m=mib: read_directly(store, t, m << 20)
        for threads, mib in REQUESTS
    }
    times: dict[str, list[float]] = {name: [] for name in (*disk, *calls)}
    for _ in range(args.rounds or (3 if args.quick else 5)):
        order = [*disk.items(), *calls.items()]
        random.shuffle(order)
        for name, call in order:
            evict(store)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    size = sum(shard.file_bytes for shard in store.shards)
    least_s = min(statistics.median(times[name]) for name in disk)
    rows = []
    print(
        f"  {'provider':<36}{'median s':>9}{'± s':>7}{'GB/s':>7}{'of disk':>9}"
        f"{'anon MiB':>10}{'mapped':>8}{'left in cache':>15}"
    )
    for name, seconds in times.items():
        median_s = statistics.median(seconds)
        row = Row(
            provider=name,
            median_s=median_s,
            spread_s=max(seconds) - min(seconds),
            gb_per_s=size / median_s / 1e9,
            of_disk=least_s / median_s,
            anonymous_mib=memory[name][0] if name in memory else 0.0,
            mapped_mib=memory[name][1] if name in memory else 0.0,
            page_cache_mib=memory[name][2] if name in memory else 0.0,
        )
        rows.append(row)
        text = f"  {name:<36}{row.median_s:>9.3f}{row.spread_s:>7.3f}{row.gb_per_s:>7.2f}"
        text += f"{row.of_disk:>9.0%}"
        if name in memory:
            text += f"{row.anonymous_mib:>10.0f}{row.mapped_mib:>8.0f}{row.page_cache_mib:>15.0f}"
        print(text)
    return rows


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", "the curvature is of 2048 rows")
    parser = common_parser(__doc__)
    parser.add_argument("--gib", type=float, help="size of the store (default: 3; quick: 1)")
    parser.add_argument("--folder", help="where the store is made (default: the temporary folder)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    num_bytes = int((args.gib or (1 if args.quick else 3)) * 2**30)
    folder = Path(tempfile.mkdtemp(prefix="logra-bench-", dir=args.folder))
    try:
        store = make_store(folder / "store", num_bytes // (2 * DIM))
        evict(store)
        if cached(store):
            print(f"{folder}: this file system keeps its files in memory; nothing to measure")
            return
        budget = num_bytes // 3
        with torch.no_grad(), limited(budget) as group:
            where = f"page cache of {budget / 1e9:.2f} GB by {group}" if group else "no limit"
            title = f"N={store.num_rows}, D={DIM}, {num_bytes / 1e9:.2f} GB, cold"
            print(f"{torch.get_num_threads()} threads; streaming: {title}, {where}")
            rows = run(store, args)
        if args.json:
            ours = [row.of_disk for row in rows if row.provider.startswith("logra streamed, Q=1")]
            record = {
                "bench": "streaming",
                "case": f"{title}, {torch.get_num_threads()} threads",
                "params": {"limit": group},
                "of_disk": min(ours),
                "providers": [asdict(row) for row in rows],
            }
            _results.append("streaming", record)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
