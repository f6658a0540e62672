"""A store three times the page cache's budget: python -m bench.paths.streaming [--gib 3]

Top 10 of a store on disk, whose pages are evicted before every pass, in a control group that leaves
a third of the store for the page cache (where this process may make one). The disk's rate is that
of plain O_DIRECT reads of the same files into memory of huge pages, the best of several request
sizes and numbers of threads, in the same rounds. Memory: how far that of this process rises during
the pass that is checked, anonymous and mapped; and what the pass left in the page cache. Baselines
are what one would write: a mapped file, and numpy.fromfile, in blocks of 1,024 rows.
"""

import argparse
import os
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import results as stored
from bench.harness.cases import is_ours, largest_error, medians, parser, prepare
from bench.harness.memory import PeakMemory
from bench.harness.page_cache import cached, evict, limited
from bench.paths.attribution import TOP, squares
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Shard, Store, StoreWriter, huge_buffer
from logra_kernels.store.files import DATA_OFFSET_BYTES

MODULES = squares(64, 16)
SIZES = [module.size for module in MODULES]
DIM = sum(SIZES)
REQUESTS = [(1, 4), (2, 2), (2, 4), (4, 4)]  # threads, MiB

Call = Callable[[], Any]


@dataclass
class Row:
    """One provider's times, and the memory that it held."""

    provider: str
    median_s: float
    spread_s: float
    gb_per_s: float
    of_disk: float
    anonymous_mib: float
    mapped_mib: float
    page_cache_mib: float

    def line(self) -> str:
        """The row as a line of the table."""
        return (
            f"  {self.provider:<36}{self.median_s:>9.3f}{self.spread_s:>7.3f}{self.gb_per_s:>7.2f}"
            f"{self.of_disk:>9.0%}{self.anonymous_mib:>10.0f}{self.mapped_mib:>8.0f}"
            f"{self.page_cache_mib:>15.0f}"
        )


def make_store(path: Path, num_rows: int) -> Store:
    """Rows that all differ: 2,048 are drawn, the others are these with their columns moved."""
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
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    files = {shard: os.open(shard.path, flags) for shard in store.shards}
    lock = threading.Lock()
    total = []

    def work() -> None:
        place = huge_buffer(request_bytes)
        place[::4096] = 0
        while True:
            with lock:
                request = next(todo, None)
            if request is None:
                return
            shard, offset = request
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
        # In float16's range: no query is subnormal, and no product with a row overflows.
        self.unit = 0.005 / float(ready.square().mean().sqrt())
        self.halves = (ready * self.unit).half()
        self.norms = attributor.self_influence().sqrt().float()  # [N]

    def top(self, load: Callable[[Shard, int, int], "np.ndarray[Any, Any]"]) -> Tensor:
        """The best scores [Q, k] over all shards, whose blocks `load` reads."""
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


def mapped_file(shard: Shard, start: int, count: int) -> "np.ndarray[Any, Any]":
    """A block of a shard, mapped."""
    # "c": torch warns about memory that may not be written
    rows: np.ndarray[Any, Any] = np.load(shard.path, mmap_mode="c")
    return rows[start : start + count]


def read_file(shard: Shard, start: int, count: int) -> "np.ndarray[Any, Any]":
    """A block of a shard, read."""
    offset = DATA_OFFSET_BYTES + 2 * DIM * start
    return np.fromfile(shard.path, np.float16, count * DIM, offset=offset).reshape(count, DIM)


def providers(store: Store, queries: dict[int, Tensor]) -> dict[str, Call]:
    """The ways from the store to the top k, by name."""
    ways = {reading: Attributor(store, reading=reading) for reading in ("streamed", "mapped")}
    ways["streamed"].self_influence()  # known from here on

    def top(reading: str, count: int, mode: str = "l-relatif") -> Tensor | None:
        return ways[reading].top_k(queries[count], TOP, mode).top_scores

    few = min(queries)
    baseline = Baseline(ways["streamed"], queries[few])
    return {
        **{f"logra streamed, Q={count}": partial(top, "streamed", count) for count in queries},
        f"logra streamed, Q={few}, dot": partial(top, "streamed", few, "dot"),
        f"logra mapped, Q={few}": partial(top, "mapped", few),
        f"numpy map, torch mm, Q={few}": partial(baseline.top, mapped_file),
        f"numpy fromfile, torch mm, Q={few}": partial(baseline.top, read_file),
    }


def check(
    store: Store, queries: dict[int, Tensor], calls: dict[str, Call]
) -> dict[str, tuple[float, float, float]]:
    """Every provider once, against a mapped pass; the three columns of its memory, in MiB."""
    memory = {}
    attributor = Attributor(store, reading="mapped")
    wanted: dict[tuple[int, str], Any] = {
        (count, mode): attributor.top_k(rows, TOP, mode).top_scores
        for count, rows in queries.items()
        for mode in ("l-relatif", "dot")
    }
    for name, call in calls.items():
        evict(store)
        peak = PeakMemory()
        got = call()
        risen = peak.stop()
        key = (int(name.split("Q=")[1].split(",")[0]), "dot" if "dot" in name else "l-relatif")
        if is_ours(name):
            assert torch.equal(got, wanted[key]), f"{name}: other bits than the mapped way"
        else:  # fp16 queries and products: 11 bits
            assert largest_error(got, wanted[key]) <= 5e-3, name
        memory[name] = (risen["anonymous"] / 2**20, risen["mapped"] / 2**20, cached(store) / 2**20)
    return memory


def run(store: Store, rounds: int) -> list[Row]:
    """Time the disk and the providers in turns, from a cold page cache."""
    queries = {count: torch.randn(count, DIM) / DIM / 64 for count in (1, 16)}
    calls = providers(store, queries)
    memory = check(store, queries, calls)
    disk = {
        f"disk, {threads} x {mib} MiB": partial(read_directly, store, threads, mib << 20)
        for threads, mib in REQUESTS
    }
    times: dict[str, list[float]] = {name: [] for name in (*disk, *calls)}
    for _ in range(rounds):
        order: list[tuple[str, Call]] = [*disk.items(), *calls.items()]
        random.shuffle(order)
        for name, call in order:
            evict(store)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    size = sum(shard.file_bytes for shard in store.shards)
    seconds = medians(times)
    least_s = min(seconds[name] for name in disk)
    print(
        f"  {'provider':<36}{'median s':>9}{'± s':>7}{'GB/s':>7}{'of disk':>9}"
        f"{'anon MiB':>10}{'mapped':>8}{'left in cache':>15}"
    )
    rows = []
    for name, median_s in seconds.items():
        spread_s = max(times[name]) - min(times[name])
        rates = size / median_s / 1e9, least_s / median_s
        rows.append(Row(name, median_s, spread_s, *rates, *memory.get(name, (0.0, 0.0, 0.0))))
        print(rows[-1].line())
    return rows


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Make the store, limit the page cache, and print the table."""
    num_bytes = int((args.gib or (1 if args.quick else 3)) * 2**30)
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
        rows = run(store, args.rounds or (3 if args.quick else 5))
    if args.json:
        record = {
            "bench": "streaming",
            "case": f"{title}, {torch.get_num_threads()} threads",
            "params": {"limit": group},
            "of_disk": min(r.of_disk for r in rows if r.provider.startswith("logra streamed, Q=1")),
            "providers": [asdict(row) for row in rows],
        }
        stored.append("streaming", record)


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    warnings.filterwarnings("ignore", "the curvature is of 2048 rows")
    known = parser(__doc__)
    known.add_argument("--gib", type=float, help="size of the store (default: 3; quick: 1)")
    known.add_argument("--folder", help="where the store is made (default: the temporary folder)")
    args = known.parse_args(argv)
    prepare(args.threads)
    with tempfile.TemporaryDirectory(prefix="logra-bench-", dir=args.folder) as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
