"""Scan of stored rows: python -m bench.bench_scores [--quick]

The ways to do without us, each with what its user would have at hand: torch's fp16 product takes
queries in fp16 and rounds the scores to fp16; the bf16 product has its rows in bf16 (three bits
less) from the start; fp32 widens all rows, or, as a careful user would, a block at a time that
stays in cache; numpy widens blocks too, since it has no fast fp16. FAISS keeps copies of the rows
(flat: fp32, twice the bytes) and returns the ten best only.
"""

from collections.abc import Callable, Iterator

import numpy
import torch
from torch import Tensor

from bench._harness import Case, arguments, isa_providers, largest_error, run_cases
from logra_kernels.ops import scores

BLOCK = 1 << 19  # elements that are widened at a time: 2 MiB of float32
FAISS_TOP = 10
BF16_ROWS = "torch bf16 mm, bf16 rows"  # another store, of three bits less

Way = Callable[[], Tensor]


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
    num_rows, dim = rows.shape
    step = max(16, BLOCK // max(dim, 1))
    wide = torch.empty(min(step, num_rows), dim)
    out = torch.empty(len(queries), num_rows)
    for first in range(0, num_rows, step):
        part = wide[: min(step, num_rows - first)]
        part.copy_(rows[first : first + len(part)])
        out[:, first : first + len(part)] = queries @ part.T
    return out


def numpy_ways(queries: Tensor, rows: Tensor) -> dict[str, Way]:
    q, r = queries.numpy(), rows.numpy()
    step = max(16, BLOCK // rows.shape[1])

    def blocks() -> Tensor:
        out = numpy.empty((len(q), len(r)), numpy.float32)
        for first in range(0, len(r), step):
            part = r[first : first + step].astype(numpy.float32)
            numpy.matmul(q, part.T, out=out[:, first : first + step])
        return torch.from_numpy(out)

    return {"numpy fp32 in blocks": blocks}


class Faiss:
    """Indexes over the rows: flat inner products in fp32, and scalar-quantised to fp16."""

    def __init__(self, rows: Tensor) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        num_rows, dim = rows.shape
        kind = faiss.ScalarQuantizer.QT_fp16
        self.indexes = {
            "faiss flat, top 10": faiss.IndexFlatIP(dim),
            "faiss SQfp16, top 10": faiss.IndexScalarQuantizer(
                dim, kind, faiss.METRIC_INNER_PRODUCT
            ),
        }
        for index in self.indexes.values():
            for first in range(0, num_rows, 1000):
                block = rows[first : first + 1000].float().numpy()
                if first == 0:
                    index.train(block)
                index.add(block)

    def ways(self, queries: Tensor) -> dict[str, Way]:
        q = queries.numpy()

        def search(index: object) -> Tensor:
            return torch.from_numpy(index.search(q, FAISS_TOP)[0])

        return {name: lambda i=index: search(i) for name, index in self.indexes.items()}


def faiss_over(rows: Tensor) -> Faiss | None:
    """None, and a line that says so, where FAISS is not installed."""
    try:
        return Faiss(rows)
    except ImportError:
        print("FAISS is left out: it is not installed (pip install '.[bench]')")
        return None


def unit(queries: Tensor, rows: Tensor) -> float:
    """The largest |q||x|: rounding errors of a product are in proportion to that."""
    return float(queries.norm(dim=1).max()) * max(float(x.norm()) for x in rows.float().split(256))


def case(
    queries: Tensor,
    rows: Tensor,
    scale: Tensor | None = None,
    isas: bool = False,
    numpy_too: bool = False,
    index: Faiss | None = None,
) -> Case:
    """Queries [Q, D] in fp32 over rows [R, D] in fp16, bf16 or fp32; scale [R]."""

    def scaled(way: Way) -> Way:
        return way if scale is None else lambda: way() * scale

    num_queries, (num_rows, dim) = len(queries), rows.shape
    exact = widened_in_blocks(queries, rows)
    ways = torch_ways(queries, rows)
    if rows.dtype == torch.float16 and numpy_too:
        bf16 = rows.bfloat16()
        ways[BF16_ROWS] = torch_ways(queries, bf16)["torch bf16 mm"]
        if torch.get_num_threads() > 1:  # numpy has its own pool, of as many threads as CPUs
            ways |= numpy_ways(queries, rows)
    providers = {
        **isa_providers("logra", lambda: scores(queries, rows, scale), isas),
        **{name: scaled(way) for name, way in ways.items()},
    }
    largest = unit(queries, rows) * (1.0 if scale is None else float(scale.max()))
    errors = {}
    if index is not None:
        best = exact.topk(FAISS_TOP).values
        for name, way in index.ways(queries).items():
            providers[name] = way
            errors[name] = lambda got: largest_error(got, best, unit=largest)
    kind = str(rows.dtype)[6:]
    return Case(
        op="scores",
        title=f"Q={num_queries}, R={num_rows}, D={dim}, {kind} rows",
        providers=providers,
        expected=exact if scale is None else exact * scale,
        rtol=4e-3,  # of the largest |q||x|: bfloat16's products have 8 bits
        our_rtol=1e-5,
        unit=largest,
        num_bytes=float(rows.element_size() * num_rows * dim),
        flops=2.0 * num_queries * num_rows * dim,
        errors=errors,
        apart=frozenset({BF16_ROWS}),
        params={"Q": num_queries, "R": num_rows, "D": dim, "rows": kind},
    )


def cases(quick: bool, isas: bool) -> Iterator[Case]:
    dim, num_rows = (4096, 4000) if quick else (16384, 8000)
    rows = torch.randn(num_rows, dim).half()  # [R, D]
    scale = torch.rand(num_rows) + 0.5  # [R]
    index = faiss_over(rows)
    for num_queries in (1, 4, 16, 64) if quick else (1, 4, 16, 64, 256):
        queries = torch.randn(num_queries, dim)  # [Q, D]
        yield case(queries, rows, scale, isas, numpy_too=True, index=index)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick, args.isas), args)


if __name__ == "__main__":
    main()
