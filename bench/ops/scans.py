"""The scan of stored rows, its two ends, and the rows' norms, beside what a user has at hand.

torch's fp16 product takes queries in fp16 and rounds the scores to fp16; its bf16 product has rows
in bf16, three bits less, from the start; fp32 widens all rows, or, as a careful user would, one
block at a time that stays in cache. numpy widens blocks too, since it has no fast fp16. FAISS keeps
copies of the rows (flat: fp32, twice the bytes) and returns the ten best only.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness.cases import DTYPES, OURS, Call, Case, largest_error
from logra_kernels import ops

BLOCK = 1 << 19  # elements that are widened at a time: 2 MiB of float32
FAISS_TOP = 10
BF16_ROWS = "torch bf16 mm, bf16 rows"  # another store, of three bits less

Way = Callable[[], Tensor]


def kind_of(rows: Tensor) -> str:
    """The rows' type without "torch."."""
    return str(rows.dtype).removeprefix("torch.")


def torch_ways(queries: Tensor, rows: Tensor) -> dict[str, Way]:
    """Plain torch: the float32 scores [Q, R] of float32 queries [Q, D] and rows [R, D]."""
    if rows.dtype == torch.float32:
        return {"torch fp32 mm": lambda: queries @ rows.T}
    short = {torch.float16: "fp16", torch.bfloat16: "bf16"}[rows.dtype]
    narrow = queries.to(rows.dtype)
    return {
        f"torch {short} mm": lambda: (narrow @ rows.T).float(),
        "torch fp32 mm": lambda: queries @ rows.float().T,
        "torch fp32 mm in blocks": lambda: widened_in_blocks(queries, rows),
    }


def widened_in_blocks(queries: Tensor, rows: Tensor) -> Tensor:
    """Scores [Q, R] in torch: blocks of rows that stay in the cache are widened to float32."""
    num_rows, dim = rows.shape
    step = max(16, BLOCK // max(dim, 1))
    wide = torch.empty(min(step, num_rows), dim)
    out = torch.empty(len(queries), num_rows)
    for first in range(0, num_rows, step):
        part = wide[: min(step, num_rows - first)]
        part.copy_(rows[first : first + len(part)])
        out[:, first : first + len(part)] = queries @ part.T
    return out


def numpy_in_blocks(queries: Tensor, rows: Tensor) -> Tensor:
    """The same in NumPy."""
    q, r = queries.numpy(), rows.numpy()
    step = max(16, BLOCK // rows.shape[1])
    out = np.empty((len(q), len(r)), np.float32)
    for first in range(0, len(r), step):
        part = r[first : first + step].astype(np.float32)
        np.matmul(q, part.T, out=out[:, first : first + step])
    return torch.from_numpy(out)


def faiss_indexes(rows: Tensor) -> dict[str, Any]:
    """Inner products in fp32 and in scalar-quantised fp16; {} and a line where FAISS is missing."""
    try:
        import faiss
    except ImportError:
        print("FAISS is left out: it is not installed (pip install '.[bench]')")
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    dim, fp16 = rows.shape[1], faiss.ScalarQuantizer.QT_fp16
    indexes: dict[str, Any] = {
        "faiss flat, top 10": faiss.IndexFlatIP(dim),
        "faiss SQfp16, top 10": faiss.IndexScalarQuantizer(dim, fp16, faiss.METRIC_INNER_PRODUCT),
    }
    for index in indexes.values():
        index.train(rows[:1000].float().numpy())
        for block in rows.split(1000):
            index.add(block.float().numpy())
    return indexes


def unit(queries: Tensor, rows: Tensor) -> float:
    """The largest |q||x|, to which rounding errors of a product are in proportion."""
    return float(queries.norm(dim=1).max()) * max(float(x.norm()) for x in rows.float().split(256))


def scores(
    queries: Tensor,
    rows: Tensor,
    scale: Tensor | None = None,
    numpy_too: bool = False,
    indexes: dict[str, Any] | None = None,
) -> Case:
    """Queries [Q, D] in fp32 over rows [R, D] in fp16, bf16 or fp32; scale [R]."""
    num_queries, (num_rows, dim) = len(queries), rows.shape
    exact = widened_in_blocks(queries, rows)
    ways = torch_ways(queries, rows)
    if rows.dtype == torch.float16 and numpy_too:
        ways[BF16_ROWS] = torch_ways(queries, rows.bfloat16())["torch bf16 mm"]
        if torch.get_num_threads() > 1:  # numpy has its own pool, of as many threads as CPUs
            ways["numpy fp32 in blocks"] = partial(numpy_in_blocks, queries, rows)

    def scaled(way: Way) -> Tensor:
        return way() if scale is None else way() * scale

    def search(index: Any) -> Tensor:
        """A provider's call: the best scores of every query, for FAISS has no scale of rows."""
        return torch.from_numpy(index.search(queries.numpy(), FAISS_TOP)[0])

    providers: dict[str, Call] = {
        OURS: lambda: ops.scores(queries, rows, scale),
        **{name: partial(scaled, way) for name, way in ways.items()},
        **{name: partial(search, index) for name, index in (indexes or {}).items()},
    }
    size = unit(queries, rows) * (1.0 if scale is None else float(scale.max()))
    top = exact.topk(min(FAISS_TOP, num_rows)).values
    return Case(
        "scores",
        f"Q={num_queries}, R={num_rows}, D={dim}, {kind_of(rows)} rows",
        providers,
        exact if scale is None else exact * scale,
        rtol=4e-3,  # of the largest |q||x|: bfloat16's products have 8 bits
        our_rtol=1e-5,
        unit=size,
        errors={name: partial(largest_error, expected=top, unit=size) for name in indexes or {}},
        apart=frozenset({BF16_ROWS}),
        num_bytes=float(rows.nbytes),
        flops=2.0 * num_queries * num_rows * dim,
        params={"Q": num_queries, "R": num_rows, "D": dim, "rows": kind_of(rows)},
    )


def topk_scores(queries: Tensor, rows: Tensor, k: int) -> Case:
    """The same, of which k at either end are kept. Torch has all scores in memory."""
    num_queries, (num_rows, dim) = len(queries), rows.shape

    def ours() -> tuple[Tensor, Tensor]:
        out = ops.topk_scores(queries, rows, k)
        return out.top_scores, out.bottom_scores

    def ends(way: Way) -> tuple[Tensor, Tensor]:
        found = way()
        return found.topk(k).values, found.topk(k, largest=False).values

    ways = torch_ways(queries, rows)
    return Case(
        "topk_scores",
        f"Q={num_queries}, R={num_rows}, D={dim}, k={k}, {kind_of(rows)} rows",
        {OURS: ours, **{f"{name}, topk": partial(ends, way) for name, way in ways.items()}},
        ends(lambda: widened_in_blocks(queries, rows)),
        rtol=4e-3,  # of the largest |q||x|: bfloat16's products have 8 bits
        our_rtol=1e-5,
        unit=unit(queries, rows),
        num_bytes=float(rows.nbytes),
        flops=2.0 * num_queries * num_rows * dim,
    )


def self_influence(num_rows: int, size: int, dtype: str = "fp16") -> Case:
    """R rows of K columns under a triangular factor [K, K], as Cholesky gives it."""
    rows = torch.randn(num_rows, size).to(DTYPES[dtype])  # [R, K]
    factor = torch.randn(size, size).tril() / math.sqrt(size)  # [K, K]

    def in_torch() -> Tensor:
        return (rows.float() @ factor.T).square().sum(1)

    return Case(
        "self_influence",
        f"R={num_rows}, K={size}, {dtype} rows",
        {OURS: lambda: ops.self_influence(rows, factor), "torch fp32 mm, square": in_torch},
        in_torch(),
        rtol=1e-4,
        num_bytes=float(rows.nbytes),
        flops=1.0 * num_rows * size * size,
    )


def all_scores(quick: bool) -> Iterator[Case]:
    dim, num_rows = (4096, 4000) if quick else (16384, 8000)
    rows = torch.randn(num_rows, dim).half()  # [R, D]
    scale = torch.rand(num_rows) + 0.5  # [R]
    indexes = faiss_indexes(rows)
    for num_queries in (1, 4, 16, 64) if quick else (1, 4, 16, 64, 256):
        yield scores(torch.randn(num_queries, dim), rows, scale, True, indexes)


def ends(quick: bool) -> Iterator[Case]:
    shapes = [(1, 4000, 4096, 20), (16, 4000, 4096, 20)]
    shapes = shapes if quick else [*shapes, (64, 8000, 8192, 100), (64, 20000, 512, 1000)]
    for num_queries, num_rows, dim, k in shapes:
        yield topk_scores(torch.randn(num_queries, dim), torch.randn(num_rows, dim).half(), k)


def norms(quick: bool) -> Iterator[Case]:
    shapes = [(4000, 64), (4000, 256)]
    for shape in shapes if quick else [*shapes, (4000, 1024), (2000, 4096)]:
        yield self_influence(*shape)
