"""Top 10 by l-RelatIF over a store on disk: python -m bench.bench_attribution [--quick]

"sigma known": the norms lie beside the store; "sigma computed": a first pass under a damping. The
baselines read the same mapped shards, in blocks of the same size, with what the case knows: torch
widens a block to float32 for sigma (K^2 a row and module), and for the scores multiplies in fp16,
or widens too. The file is in the page cache; the preconditioner is ready in every case.
"""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench._harness import Case, arguments, run_cases
from logra_kernels import ops
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.rows import share
from logra_kernels.store import Module, Store, StoreWriter

TOP = 10
RANK = 16  # K = 256 a module


def make_store(path: Path, num_rows: int, modules: list[Module]) -> Store:
    sizes = [module.size for module in modules]
    with StoreWriter.create(path, modules=modules) as writer:
        writer.set_module_exponents([0] * len(modules))
        for first in range(0, num_rows, 1000):
            rows = torch.randn(min(1000, num_rows - first), sum(sizes))
            packed, scale = ops.pack_rows(rows, sizes, [0] * len(modules))
            names = range(first, first + len(rows))
            writer.append(names, packed.numpy(), scale.numpy())
    return Store.open(path)


class Baseline:
    """The same in a page of torch: u from the same curvature, blocks, topk, merge."""

    def __init__(self, attributor: Attributor, queries: Tensor) -> None:
        self.store, self.block_rows = attributor.store, attributor.block_rows
        self.queries = attributor.precondition(queries)  # [Q, D]
        self.factors = list(attributor.preconditioner.factors.values())
        self.sigma = attributor.self_influence().float()  # [N]

    def top(self, half: bool, sigma_known: bool) -> Tensor:
        queries = self.queries.half() if half else self.queries
        best: list[Tensor] = []
        for first, rows, row_scale in self.store.blocks(self.block_rows):
            block, scale = share(rows), share(row_scale)
            wide = None if half and sigma_known else block.float()
            if sigma_known:
                sigma = self.sigma[first : first + len(block)]
            else:
                parts = wide.split([len(w) for w in self.factors], dim=1)
                pairs = zip(parts, self.factors, strict=True)
                sigma = sum((part @ w.T).square().sum(1) for part, w in pairs) * scale**2
            product = queries @ block.T if half else queries @ wide.T
            scores = product.float() * (scale / sigma.sqrt())
            best.append(scores.topk(TOP).values)
            best = [torch.cat(best, dim=1).topk(TOP).values]
        return best[0]


def cases(quick: bool, folder: Path) -> Iterator[Case]:
    num_rows, num_modules = (6000, 16) if quick else (20000, 64)
    modules = [Module(f"module.{i}", RANK, RANK) for i in range(num_modules)]
    store = make_store(folder / "store", num_rows, modules)
    curvature = RawCurvature.rebuild(store)
    attributor = Attributor(store, curvature, reading="mapped")
    resident = Attributor(store, curvature, reading="resident")
    dampings = itertools.count(1)
    for num_queries in (1, 16) if quick else (1, 16, 64):
        # 1 / 64: so that torch's fp16 products with rows of up to 2**15 do not overflow
        queries = torch.randn(num_queries, store.dim) / store.dim / 64
        baseline = Baseline(attributor, queries)

        def fresh(queries: Tensor = queries) -> Tensor:
            """A damping no pass has seen, so close to the others that the scores are theirs."""
            made = Attributor(store, curvature, damping_scale=0.1 + 1e-9 * next(dampings))
            return made.top_k(queries, TOP).top_scores

        title = f"Q={num_queries}, N={num_rows}, D={store.dim}, fp16 store"
        scan = 2.0 * num_queries * num_rows * store.dim
        sigma = 2.0 * num_rows * store.dim * RANK**2
        common = {
            "expected": baseline.top(half=False, sigma_known=True),
            "rtol": 5e-3,  # of the largest score: torch's fp16 queries and output have 11 bits
            "num_bytes": 2.0 * num_rows * store.dim,
        }
        yield Case(
            op="attribution",
            title=f"{title}, sigma known",
            providers={
                "logra Attributor.top_k": lambda q=queries: attributor.top_k(q, TOP).top_scores,
                "logra resident": lambda q=queries: resident.top_k(q, TOP).top_scores,
                "torch fp16 mm, topk": lambda b=baseline: b.top(half=True, sigma_known=True),
                "torch fp32 mm, topk": lambda b=baseline: b.top(half=False, sigma_known=True),
            },
            flops=scan,
            **common,
        )
        yield Case(
            op="attribution",
            title=f"{title}, sigma computed",
            providers={
                "logra Attributor, factorising": fresh,
                "torch fp32 mm, topk": lambda b=baseline: b.top(half=False, sigma_known=False),
            },
            flops=scan + sigma,
            **common,
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    folder = Path(tempfile.mkdtemp(prefix="logra-bench-"))
    try:
        run_cases(cases(args.quick, folder), args)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
