"""Scans of rows of few bits beside FAISS, turbovec and RaBitQLib: python -m bench codec-peers

Every library holds the same rows, scans all of them, and gives each query's 20 best by inner
product. Rows: l-RelatIF's g / √sigma of the MLP of bench.accuracy in its eigenbasis, rotated as
stores of few bits hold them, so that no library has to rotate them; Gaussian ones where its images
are not there. Queries are preconditioned and rotated the same way.

recall@20 of 200 queries is beside the exact float32 products, with nothing re-ranked. Our scans
give the 20 worst rows too. A query that comes alone and a batch of 64 are timed, all in turns.

FAISS       SQ8, SQ4 (IndexScalarQuantizer), IndexRaBitQ, IndexRaBitQFastScan, IndexEDEN. RaBitQ is
            trained on zeros: around the rows' mean it finds fewer of the best products.
turbovec    4 bits, calibrated on 1,024 of the rows, as its documentation says.
RaBitQLib   IvfIndex of one cluster around 0, which is an exhaustive scan.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.accuracy import mlp
from bench.accuracy.methods import Rows, Subject
from bench.accuracy.setting import trained_model
from bench.harness import results
from bench.harness.cases import OURS, Call, effort, medians, options, prepare, time_in_turns
from bench.harness.tables import table
from logra_kernels import ops, rows
from logra_kernels.attribution import Attributor
from logra_kernels.evaluation import recall_at
from logra_kernels.store import Module, RowLayout, Store, row_codec
from logra_kernels.store.codecs import Planes
from logra_kernels.store.rotation import Rotation

TOP = 20
IMAGES, DIM = 10_000, 8192
BATCHES = (1, 64)
CALIBRATED = 1024

Search = Callable[[Tensor], Any]  # queries [q, D] float32 -> row numbers [q, TOP]
Index = tuple[Search, float]  # and the bytes of a row


def gradients(count: int) -> tuple[Tensor, Tensor]:
    """Rows [N, D] and preconditioned queries [200, D] whose products are l-RelatIF's scores.

    Raises:
        FileNotFoundError: the images are not there.
    """
    data = mlp.SETTING.load()
    model = trained_model(mlp.SETTING, data)
    subject = Subject(mlp.SETTING, mlp.load(count), model)
    kind = Rows("eigen", "diagonal", "eigen", coordinates=DIM, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        run = kind.logged(subject, folder)
        run.eval()
        asked = subject.query_rows(run)
        store = Store.open(run.store.path)
        attributor = Attributor(store)
        queries = attributor.precondition(asked)
        sigma = attributor.self_influence()
        found = torch.from_numpy(store.take(range(store.num_rows)))
        found = (found.double() / sigma.sqrt()[:, None]).float()
        few = slice(0, 200)
        scores = attributor.scores(asked[:1], "l-relatif").scores[:, few]
    torch.testing.assert_close(queries[:1] @ found[few].T, scores, rtol=1e-3, atol=1e-5)
    return found, queries


def rotated(values: Tensor) -> Tensor:
    """As stores of few bits rotate their rows."""
    rotation = Rotation(values.shape[1])
    return torch.cat([torch.from_numpy(rotation.forward(v.numpy())) for v in values.split(500)])


def ours(data: Tensor) -> Iterator[tuple[str, Callable[[], Index]]]:
    """Scans of rows in memory, for each codec; and float16."""
    halves = data.half()

    def float16() -> Index:
        return (lambda q: ops.topk_scores(q, halves, TOP).top_ids), 2.0 * data.shape[1]

    yield f"{OURS} float16", float16
    for name in ("int8", "int4", "int2", "sign"):
        yield f"{OURS} {name}", partial(our_codec, data, name)


def our_codec(data: Tensor, name: str) -> Index:
    codec, layout = row_codec(name), RowLayout((Module("row", 1, data.shape[1]),))
    parts = [rows.encode(codec, some, layout, [0]) for some in data.split(500)]
    stored = torch.cat([part[0] for part in parts])
    scale = torch.cat([part[1] for part in parts if part[1] is not None])
    size = stored.shape[1] * stored.element_size() + 4
    if not isinstance(codec, Planes):
        return (lambda q: ops.topk_scores(q, stored, TOP, scale).top_ids), size
    planes = [plane.contiguous() for plane in stored.chunk(len(codec.data), dim=1)]
    levels = torch.from_numpy(codec.levels)
    return (lambda q: ops.topk_plane_scores(q, planes, levels, TOP, scale).top_ids), size


def faiss_indices(data: Tensor, threads: int) -> Iterator[tuple[str, Callable[[], Index]]]:
    import faiss

    faiss.omp_set_num_threads(threads)
    dim, product = data.shape[1], faiss.METRIC_INNER_PRODUCT
    kinds = faiss.ScalarQuantizer
    made: dict[str, Callable[[], Any]] = {
        "SQ8": lambda: faiss.IndexScalarQuantizer(dim, kinds.QT_8bit, product),
        "SQ4": lambda: faiss.IndexScalarQuantizer(dim, kinds.QT_4bit, product),
        "RaBitQ": lambda: faiss.IndexRaBitQ(dim, product),
        "RaBitQFastScan": lambda: faiss.IndexRaBitQFastScan(dim, product),
        "EDEN 4": lambda: faiss.IndexEDEN(dim, product, 4),
        "EDEN 1": lambda: faiss.IndexEDEN(dim, product, 1),
    }

    def build(name: str) -> Index:
        index = made[name]()
        index.train(np.zeros((1, dim), np.float32) if "RaBitQ" in name else data.numpy())
        index.add(data.numpy())
        return (lambda q: index.search(q.numpy(), TOP)[1]), float(index.code_size)

    for name in made:
        yield f"FAISS {name}", partial(build, name)


def turbovec_indices(data: Tensor, threads: int) -> Iterator[tuple[str, Callable[[], Index]]]:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when the first search starts
    import turbovec

    def build() -> Index:
        index = turbovec.TurboQuantIndex(dim=data.shape[1], bit_width=4)
        sample = torch.randperm(len(data))[:CALIBRATED]
        index.calibrate(data[sample].numpy())
        index.add(data.numpy())
        index.prepare()
        return (lambda q: index.search(q.numpy(), TOP)[1]), data.shape[1] / 2

    yield "turbovec 4", build


def rabitqlib_indices(data: Tensor, threads: int) -> Iterator[tuple[str, Callable[[], Index]]]:
    import rabitqlib

    def build(bits: int) -> Index:
        count, dim = data.shape
        index = rabitqlib.IvfIndex(dim, count, 1, bits, metric="ip")
        index.build(data.numpy(), np.zeros((1, dim), np.float32), np.zeros(count, np.uint32))
        search = partial(index.search, nprobe=1, num_threads=threads)
        return (lambda q: search(q.numpy(), TOP)[0].astype(np.int64)), bits * dim / 8

    for bits in (4, 1):
        yield f"RaBitQLib {bits}", partial(build, bits)


LIBRARIES = {
    "faiss": faiss_indices,
    "turbovec": turbovec_indices,
    "rabitqlib": rabitqlib_indices,
}


def compared(data: Tensor, queries: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each index and batch."""
    threads = torch.get_num_threads()
    builders = dict(ours(data))
    for library, indices in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed (make peers-env)")
            continue
        builders |= dict(indices(data, threads))
    best = [set(one.tolist()) for one in (queries @ data.T).topk(TOP).indices]
    made: dict[str, Index] = {}
    recall: dict[str, float] = {}
    for name, build in builders.items():
        try:
            made[name] = build()
            found = np.asarray(made[name][0](queries))
        except Exception as error:  # a library that refuses such rows is named
            made.pop(name, None)
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:200]}")
            continue
        recall[name] = float(recall_at(found, best, TOP).mean())
    records = []
    for batch in BATCHES:
        asked = queries[:batch].contiguous()
        calls: dict[str, Call] = {n: partial(search, asked) for n, (search, _) in made.items()}
        seconds = medians(time_in_turns(calls, effort(args)))
        for name, taken in seconds.items():
            pairs = batch * len(data) / taken
            records.append(
                {
                    "queries": batch,
                    "rows in": name,
                    "bytes a row": made[name][1],
                    f"recall@{TOP}": recall[name],
                    "ms": 1e3 * taken,
                    "rows/s": pairs,
                    "G coordinates/s": pairs * data.shape[1] / 1e9,
                }
            )
    return records


def main(argv: list[str] | None = None) -> int:
    args = options(__doc__, "quick", "threads", "rounds", "json").parse_args(argv)
    prepare(args.threads)
    count = IMAGES // 5 if args.quick else IMAGES
    title = f"{count:,} rows of {DIM:,}"
    try:
        data, queries = gradients(count)
    except FileNotFoundError as missing:
        print(f"Gaussian rows: {missing}")
        data, queries = torch.randn(count, DIM), torch.randn(200, DIM)
        title += ", Gaussian"
    with torch.no_grad():
        records = compared(rotated(data), rotated(queries), args)
    print(f"\n{title}, {torch.get_num_threads()} threads, {ops.isa()}")
    print(table(records))
    if args.json:
        case = "peers"
        results.append("codecs", {"bench": "codecs", "case": case, "title": title, "rows": records})
    return 0


if __name__ == "__main__":
    sys.exit(main())
