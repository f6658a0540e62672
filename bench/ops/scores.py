"""The scan of stored rows, beside what a user of each library has at hand.

torch's fp16 product takes queries in fp16 and rounds the scores to fp16; its bf16 product has rows
in bf16, three bits less, from the start; fp32 widens all rows, or, as a careful user would, one
block at a time that stays in cache. numpy widens blocks too, since it has no fast fp16. FAISS keeps
copies of the rows (flat: fp32, twice the bytes) and returns the ten best only.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness.cases import OURS, Case, largest_error
from logra_kernels.ops import scores

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


class Faiss:
    """Indexes over the rows: flat inner products in fp32, and scalar-quantised to fp16."""

    def __init__(self, rows: Tensor) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        dim = rows.shape[1]
        fp16 = faiss.ScalarQuantizer.QT_fp16
        self.indexes: dict[str, Any] = {
            "faiss flat, top 10": faiss.IndexFlatIP(dim),
            "faiss SQfp16, top 10": faiss.IndexScalarQuantizer(
                dim, fp16, faiss.METRIC_INNER_PRODUCT
            ),
        }
        for index in self.indexes.values():
            index.train(rows[:1000].float().numpy())
            for block in rows.split(1000):
                index.add(block.float().numpy())

    def ways(self, queries: Tensor) -> dict[str, Way]:
        """A search by each index: the best scores of every query."""
        q = queries.numpy()

        def search(index: Any) -> Tensor:
            return torch.from_numpy(index.search(q, FAISS_TOP)[0])

        return {name: partial(search, index) for name, index in self.indexes.items()}


def faiss_over(rows: Tensor) -> Faiss | None:
    """None, and a line that says so, where FAISS is not installed."""
    try:
        return Faiss(rows)
    except ImportError:
        print("FAISS is left out: it is not installed (pip install '.[bench]')")
        return None


def unit(queries: Tensor, rows: Tensor) -> float:
    """The largest |q||x|, to which rounding errors of a product are in proportion."""
    return float(queries.norm(dim=1).max()) * max(float(x.norm()) for x in rows.float().split(256))


def case(
    queries: Tensor,
    rows: Tensor,
    scale: Tensor | None = None,
    numpy_too: bool = False,
    index: Faiss | None = None,
) -> Case:
    """Queries [Q, D] in fp32 over rows [R, D] in fp16, bf16 or fp32; scale [R]."""
    num_queries, (num_rows, dim) = len(queries), rows.shape
    kind = kind_of(rows)
    exact = widened_in_blocks(queries, rows)
    ways = torch_ways(queries, rows)
    if rows.dtype == torch.float16 and numpy_too:
        ways[BF16_ROWS] = torch_ways(queries, rows.bfloat16())["torch bf16 mm"]
        if torch.get_num_threads() > 1:  # numpy has its own pool, of as many threads as CPUs
            ways["numpy fp32 in blocks"] = partial(numpy_in_blocks, queries, rows)

    def scaled(way: Way) -> Tensor:
        return way() if scale is None else way() * scale

    providers: dict[str, Way] = {
        OURS: lambda: scores(queries, rows, scale),
        **{name: partial(scaled, way) for name, way in ways.items()},
    }
    largest = unit(queries, rows) * (1.0 if scale is None else float(scale.max()))
    found = {} if index is None else index.ways(queries)
    best = exact.topk(min(FAISS_TOP, num_rows)).values
    return Case(
        op="scores",
        title=f"Q={num_queries}, R={num_rows}, D={dim}, {kind} rows",
        providers={**providers, **found},
        expected=exact if scale is None else exact * scale,
        rtol=4e-3,  # of the largest |q||x|: bfloat16's products have 8 bits
        our_rtol=1e-5,
        unit=largest,
        num_bytes=float(rows.nbytes),
        flops=2.0 * num_queries * num_rows * dim,
        errors=dict.fromkeys(found, lambda got: largest_error(got, best, unit=largest)),
        apart=frozenset({BF16_ROWS}),
        params={"Q": num_queries, "R": num_rows, "D": dim, "rows": kind},
    )


def cases(quick: bool) -> Iterator[Case]:
    """The op's table."""
    dim, num_rows = (4096, 4000) if quick else (16384, 8000)
    rows = torch.randn(num_rows, dim).half()  # [R, D]
    scale = torch.rand(num_rows) + 0.5  # [R]
    index = faiss_over(rows)
    for num_queries in (1, 4, 16, 64) if quick else (1, 4, 16, 64, 256):
        yield case(torch.randn(num_queries, dim), rows, scale, numpy_too=True, index=index)
