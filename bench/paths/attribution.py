"""Top 10 by l-RelatIF over a store whose file is in the page cache.

The norms are known and the preconditioner is ready in every call. The baselines read the same
mapped shards in blocks, and multiply preconditioned queries in fp16 or, widened, in fp32.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness.cases import OURS, Call, Case
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Module, Shard, Store, StoreWriter

TOP = 10
BLOCK_ROWS = 1024

Load = Callable[[Shard, int, int], "np.ndarray[Any, Any]"]  # of so many rows from a first one


def squares(count: int, rank: int) -> list[Module]:
    """Modules of rank × rank columns."""
    return [Module(f"module.{i}", rank, rank) for i in range(count)]


def write_store(path: Path, modules: list[Module], rows: Tensor) -> Store:
    """Rows [N, D] in fp16, their numbers as ids."""
    sizes, exponents = [module.size for module in modules], [0] * len(modules)
    with StoreWriter.create(path, modules=modules) as writer:
        writer.set_module_exponents(exponents)
        for first in range(0, len(rows), 1000):
            packed, scale = ops.pack_rows(rows[first : first + 1000], sizes, exponents)
            ids = range(first, first + len(packed))
            writer.append(ids, packed.numpy(), scale.numpy())
    return Store.open(path)


def opened(path: Path, num_rows: int, num_modules: int) -> Attributor:
    """An attributor over a new store of random rows, its σ known."""
    modules = squares(num_modules, 16)  # K = 256 each
    store = write_store(path, modules, torch.randn(num_rows, num_modules * 256))
    attributor = Attributor(store, RawCurvature.rebuild(store), reading="mapped")
    attributor.self_influence()  # known from here on
    return attributor


def mapped_file(shard: Shard, start: int, count: int) -> "np.ndarray[Any, Any]":
    # "c": torch warns about memory that may not be written
    rows: np.ndarray[Any, Any] = np.load(shard.path, mmap_mode="c")
    return rows[start : start + count]


class Baseline:
    """The same scores in a few lines of NumPy and torch."""

    def __init__(self, attributor: Attributor, queries: Tensor) -> None:
        self.store = attributor.store
        ready = attributor.precondition(queries)  # [Q, D]
        # In float16's range: no query is subnormal, and no product with a row overflows.
        self.unit = 0.005 / float(ready.square().mean().sqrt())
        self.queries = ready * self.unit
        self.norms = attributor.self_influence().sqrt().float()  # [N]

    def top(self, load: Load, dtype: torch.dtype = torch.float16) -> Tensor:
        """The best scores [Q, k] over all shards, whose blocks `load` reads."""
        best: list[Tensor] = []
        queries = self.queries.to(dtype)
        for shard in self.store.shards:
            for start in range(0, shard.num_rows, BLOCK_ROWS):
                count = min(BLOCK_ROWS, shard.num_rows - start)
                block = torch.from_numpy(load(shard, start, count))
                scale = torch.from_numpy(shard.row_scale[start : start + count])
                scale = scale / self.norms[shard.first_row + start :][:count] / self.unit
                scores = (queries @ block.to(dtype).T).float() * scale
                best = [torch.cat([*best, scores.topk(TOP).values], dim=1).topk(TOP).values]
        return best[0]


def case(op: str, store: Store, queries: Tensor, providers: dict[str, Call], **more: Any) -> Case:
    """The top k of a store by l-RelatIF, by these providers."""
    return Case(
        op,
        f"Q={len(queries)}, N={store.num_rows}, D={store.dim}, fp16 store, sigma known",
        providers,
        rtol=5e-3,  # of the largest score: torch's fp16 queries and output have 11 bits
        num_bytes=2.0 * store.num_rows * store.dim,
        flops=2.0 * len(queries) * store.num_rows * store.dim,
        **more,
    )


def in_memory(attributor: Attributor, num_queries: int) -> Case:
    queries = torch.randn(num_queries, attributor.store.dim)
    baseline = Baseline(attributor, queries)
    providers: dict[str, Call] = {
        OURS: lambda: attributor.top_k(queries, TOP).top_scores,
        "torch fp16 mm, topk": partial(baseline.top, mapped_file),
        "torch fp32 mm, topk": partial(baseline.top, mapped_file, torch.float32),
    }
    expected = baseline.top(mapped_file, torch.float32)
    return case("attribution", attributor.store, queries, providers, expected=expected)


def cases(quick: bool) -> Iterator[Case]:
    """The table: one store, growing numbers of queries."""
    with tempfile.TemporaryDirectory(prefix="logra-bench-") as folder:
        attributor = opened(Path(folder) / "store", *((6000, 16) if quick else (20000, 64)))
        for num_queries in (1, 16) if quick else (1, 16, 64):
            yield in_memory(attributor, num_queries)
