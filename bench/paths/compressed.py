"""One query of stores on disk that hold the same rows in several codecs.

Random float16 rows are compressed, without a Cholesky whitening, as eigenbasis rows are. Each
store's rows are then written many times over, with other row scales. Stores know their norms, and
are read around the page cache, which is emptied before each call. A two-stage answer scans a store
of few bits, and scores 2 % of the rows again from the float16 store. Checked before anything is
timed: streamed answers have the bits of mapped ones, and re-ranked scores those of float16 rows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.harness.cases import Effort, medians, time_in_turns
from bench.harness.memory import cached, evict
from bench.paths.streaming import make_store
from logra_kernels.attribution import Attributor, InfluenceResult, TwoStage, compress_store
from logra_kernels.attribution.plan import PreparedQueries
from logra_kernels.store import Store, StoreWriter

TOP = 20
MODULES, DIM = 128, 32_768
FEW = 2048  # different rows
CODECS = ("int8", "int4", "sign")
RERANKED = ("int4", "sign")
SHARE = 0.02  # of the rows that are scored again, both ends together
MODES = ("l-relatif", "dot")

Call = Callable[[], InfluenceResult]


def from_disk(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row of the table for each mode and way."""
    gib = args.gib or (1 / 8 if args.quick else 1)
    times = max(1, round(gib * 2**30 / (2 * DIM * FEW)))
    with tempfile.TemporaryDirectory(prefix="logra-bench-", dir=args.folder) as folder:
        few = make_store(Path(folder) / "few", FEW, MODULES)
        Attributor(few).self_influence()  # known from here on; compressed stores come with it
        stores = {"float16": repeated(few, Path(folder) / "float16", times)}
        for codec in CODECS:
            made = compress_store(few, Path(folder) / f"few {codec}", codec, whiten=False)
            stores[codec] = repeated(made, Path(folder) / codec, times)
        empty(stores)
        if any(map(cached, stores.values())):
            print("this file system keeps its files in memory; nothing to measure")
            return
        streamed = {name: Attributor(one, reading="streamed") for name, one in stores.items()}
        queries = streamed["float16"].prepare(torch.randn(1, DIM))
        for mode in MODES:
            yield from mode_rows(stores, streamed, queries, mode, args)


def repeated(few: Store, path: Path, times: int) -> Store:
    """A store's rows, written `times` times into another, with scales times powers of two."""
    rotation = few.basis.rotation
    with StoreWriter.create(
        path,
        modules=few.modules,
        dtype=few.dtype,
        rotation=None if rotation is None else rotation.seed,
    ) as writer:
        writer.set_module_exponents(few.module_exponents)
        stored, scale, _ = few.gather(np.arange(few.num_rows))
        for turn in range(times):
            numbers = range(turn * few.num_rows, (turn + 1) * few.num_rows)
            writer.append(numbers, stored, scale * np.float32(2.0 ** (turn % 8)))
    for name in few.curvatures:
        Store.open(path).save_curvature(name, *few.load_curvature(name))
    made = Store.open(path)
    for key, meta in few.self_influence_keys():  # in units of the rows' scales
        norms = few.self_influence_cache(key, meta)
        every = np.concatenate([norms.read(index) for index in range(len(few.shards))] * times)
        cache = made.self_influence_cache(key, meta)
        for index, shard in enumerate(made.shards):
            cache.write(index, every[shard.first_row : shard.first_row + shard.num_rows])
    return made


def mode_rows(
    stores: dict[str, Store],
    streamed: dict[str, Attributor],
    queries: PreparedQueries,
    mode: str,
    args: argparse.Namespace,
) -> Iterator[dict[str, object]]:
    """The rows of one mode, checked and then timed in turns."""
    halves = streamed["float16"]
    count = halves.store.num_rows
    at_each_end = max(TOP, int(count * SHARE / 2))
    calls: dict[str, Call] = {
        name: partial(one.top_k, queries, TOP, mode) for name, one in streamed.items()
    }
    row_bytes = {name: float(one.row_bytes) for name, one in stores.items()}
    two_stage = {name: TwoStage(streamed[name], stores["float16"]) for name in RERANKED}
    for name, two in two_stage.items():
        both = f"{name}, float16"
        calls[both] = partial(two.top_k, queries, TOP, mode, candidates=at_each_end)
        row_bytes[both] = row_bytes[name] + SHARE * row_bytes["float16"]
    check(stores, calls, queries, mode)
    seconds = medians(time_in_turns(calls, effort(args), partial(empty, stores)))
    for name, taken in seconds.items():
        yield {
            "mode": mode,
            "rows": name,
            "D": DIM,
            "N": count,
            "bytes a row": round(row_bytes[name]),
            "ms": 1e3 * taken,
            "GB/s": count * row_bytes[name] / taken / 1e9,
            "x float16": seconds["float16"] / taken,
        }


def effort(args: argparse.Namespace) -> Effort:
    """Calls take long where the disk is slow: a few of each."""
    rounds = args.rounds or (3 if args.quick else 7)
    return Effort(rounds, rounds, float("inf"))


def empty(stores: dict[str, Store]) -> None:
    """Drop every store's rows from the page cache."""
    for store in stores.values():
        evict(store)


def check(
    stores: dict[str, Store], calls: dict[str, Call], queries: PreparedQueries, mode: str
) -> None:
    """Streamed answers are the mapped ones, and re-ranked scores those of the finer rows.

    Raises:
        AssertionError: they are not.
    """
    for name, store in stores.items():
        got, want = calls[name](), Attributor(store, reading="mapped").top_k(queries, TOP, mode)
        torch.testing.assert_close(got.top_rows, want.top_rows, rtol=0, atol=0)
        torch.testing.assert_close(got.top_scores, want.top_scores, rtol=0, atol=0)
    exact = Attributor(stores["float16"], reading="streamed").scores(queries, mode).scores
    for name in RERANKED:
        got = calls[f"{name}, float16"]()
        want_scores = exact.gather(1, got.top_rows)
        torch.testing.assert_close(got.top_scores, want_scores, rtol=0, atol=0)
