"""Top 10 by l-RelatIF over a store whose file is in the page cache.

The norms are known and the preconditioner is ready in every call. The baselines read the same
mapped shards in blocks of the same size, and multiply preconditioned queries in fp16 or, widened,
in fp32.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.harness.cases import OURS, Case
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.rows import share
from logra_kernels.store import Module, Store, StoreWriter

TOP = 10


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


def case(attributor: Attributor, num_queries: int) -> Case:
    """The top k of a store by l-RelatIF, beside the same in torch and NumPy."""
    store = attributor.store
    # 1 / 64: so that torch's fp16 products with rows of up to 2**15 do not overflow
    queries = torch.randn(num_queries, store.dim) / store.dim / 64
    ready = attributor.precondition(queries)  # [Q, D]
    norms = attributor.self_influence().sqrt().float()  # [N]

    def in_torch(dtype: torch.dtype) -> Tensor:
        best: list[Tensor] = []
        for first, rows, row_scale, _ in store.blocks(attributor.block_rows):
            block, scale = share(rows), share(row_scale) / norms[first : first + len(rows)]
            scores = (ready.to(dtype) @ block.to(dtype).T).float() * scale
            best = [torch.cat([*best, scores.topk(TOP).values], dim=1).topk(TOP).values]
        return best[0]

    return Case(
        op="attribution",
        title=f"Q={num_queries}, N={store.num_rows}, D={store.dim}, fp16 store, sigma known",
        providers={
            OURS: lambda: attributor.top_k(queries, TOP).top_scores,
            "torch fp16 mm, topk": partial(in_torch, torch.float16),
            "torch fp32 mm, topk": partial(in_torch, torch.float32),
        },
        expected=in_torch(torch.float32),
        rtol=5e-3,  # of the largest score: torch's fp16 queries and output have 11 bits
        num_bytes=2.0 * store.num_rows * store.dim,
        flops=2.0 * num_queries * store.num_rows * store.dim,
    )


def opened(path: Path, num_rows: int, num_modules: int) -> Attributor:
    """An attributor over a new store of random rows, its σ known."""
    modules = squares(num_modules, 16)  # K = 256 each
    store = write_store(path, modules, torch.randn(num_rows, num_modules * 256))
    attributor = Attributor(store, RawCurvature.rebuild(store), reading="mapped")
    attributor.self_influence()  # known from here on
    return attributor


def cases(quick: bool) -> Iterator[Case]:
    """The table: one store, growing numbers of queries."""
    num_rows, num_modules = (6000, 16) if quick else (20000, 64)
    with tempfile.TemporaryDirectory(prefix="logra-bench-") as folder:
        attributor = opened(Path(folder) / "store", num_rows, num_modules)
        for num_queries in (1, 16) if quick else (1, 16, 64):
            yield case(attributor, num_queries)


def small(num_queries: int) -> Case:
    """A case that stands alone: its store is made for it and goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="logra-bench-")
    made = case(opened(Path(folder.name) / "store", 6000, 16), num_queries)
    made.params["folder"] = folder  # kept as long as the case
    return made
