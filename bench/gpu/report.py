"""What the GPU kernels should reach, by arithmetic: python -m bench.gpu.report [--out FILE]

A prediction, not a measurement: nothing is run, and no GPU is needed. Each kernel is compiled ahead
of time as its launcher would launch it for the given problem; its registers and shared memory say
how many programs a multiprocessor holds. From these, the sizes and the GPU's data sheet follow the
times that a launch takes at least:

    memory      bytes that must be read and written once, at the memory's bandwidth
    L2          bytes that programs read again from the second-level cache, at its bandwidth
    arithmetic  multiplications and additions, at 70 % of the peak (what dense products reach)
    latency     memory bytes over what all programs keep in flight, at 800 ns a round trip
    last wave   what the last, incomplete round of programs loses by being few

`of memory` is the time for memory over the longest of these: 1.00 means bound by bandwidth.
Bandwidths of L2 are measured ones from publications, not data sheets.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import results as stored
from logra_kernels.triton import (
    covariance_update_,
    pack_rows,
    projected_gradients,
    scores,
    self_influence,
    topk_scores,
)
from logra_kernels.triton.catalogue import Calls, Entry, make, recorded
from tools.assembly import resources

LATENCY_S = 800e-9
ARITHMETIC = 0.7


@dataclass(frozen=True)
class Gpu:
    """Bandwidths in bytes/s, rates in FLOP/s; registers and shared bytes of one multiprocessor."""

    name: str
    architecture: str
    processors: int
    memory: float
    l2: float
    half: float  # matrix units, float16 and bfloat16
    full: float  # float32, exact products
    shared: int
    registers: int = 65536
    threads: int = 2048
    warp: int = 32


GPUS = (
    Gpu("A100", "sm_80", 108, 2.04e12, 4.4e12, 312e12, 19.5e12, 164 << 10),
    Gpu("H100", "sm_90", 132, 3.35e12, 5.7e12, 989e12, 67e12, 227 << 10),
    Gpu("H200", "sm_90", 132, 4.8e12, 5.7e12, 989e12, 67e12, 227 << 10),
    Gpu("B200", "sm_100", 148, 8.0e12, 13e12, 2250e12, 75e12, 227 << 10),
    # Four SIMD units of 512 registers for each of a wave's 64 threads.
    Gpu("MI300X", "gfx942", 304, 5.3e12, 11.9e12, 1307e12, 81.7e12, 64 << 10, 131072, 2048, 64),
)


@dataclass(frozen=True)
class Work:
    """What a launch moves and computes."""

    memory: float  # bytes, each once
    l2: float  # bytes that programs ask of L2
    half: float = 0  # FLOP on matrix units
    full: float = 0  # FLOP in float32
    in_flight: float = 0  # bytes that one program keeps under way


@dataclass(frozen=True)
class Prediction:
    """What a kernel needs on a GPU, and the times that follow from it."""

    gpu: str
    case: str
    kernel: str
    registers: int
    shared: int
    programs: int
    resident: int  # programs on a multiprocessor
    memory_us: float
    arithmetic_us: float
    predicted_us: float
    bound: str

    @property
    def of_memory(self) -> float:
        """The share of the predicted time that the memory's bandwidth explains."""
        return self.memory_us / self.predicted_us


def element_bytes(tensor: Tensor) -> int:
    """Bytes of an element."""
    return tensor.element_size()


def scan_work(entry: Entry, a: dict[str, Any]) -> Work:
    """scores and the candidates of topk_scores: a program reads ROWS rows and QUERIES queries."""
    rows, pieces = a["rows"], a["queries"]
    size, dim = element_bytes(rows), a["dim"]
    count, num_rows = a["num_queries"], a["num_rows"]
    query_tiles = math.ceil(count / a["QUERIES"])
    row_tiles = math.ceil(num_rows / a["ROWS"])
    queries = pieces.shape[0] * a["QUERIES"] * dim * size
    out = count * num_rows * 4 if "out" in a else 2 * count * row_tiles * a["keep"] * 8
    product = 2.0 * pieces.shape[0] * row_tiles * a["ROWS"] * query_tiles * a["QUERIES"] * dim
    stages = max(1, entry.num_stages - 1)
    return Work(
        memory=num_rows * dim * size + pieces.numel() * size + out,
        l2=query_tiles * num_rows * dim * size + row_tiles * query_tiles * queries + out,
        **{"half" if size == 2 else "full": product},
        in_flight=stages * a["ROWS"] * a["DIM"] * size,
    )


def self_influence_work(entry: Entry, a: dict[str, Any]) -> Work:
    """A program reads its rows anew for each tile of the factor, from L2."""
    rows, pieces = a["rows"], a["factor"]
    size, dim, num_rows, factors = element_bytes(rows), a["dim"], a["num_rows"], a["num_factors"]
    row_tiles = math.ceil(num_rows / a["ROWS"])
    factor_tiles = math.ceil(factors / a["QUERIES"])
    factor = pieces.shape[0] * factor_tiles * a["QUERIES"] * dim * size
    product = 2.0 * pieces.shape[0] * row_tiles * a["ROWS"] * factor_tiles * a["QUERIES"] * dim
    return Work(
        memory=num_rows * dim * size + pieces.numel() * size + 4 * num_rows,
        l2=factor_tiles * num_rows * dim * size + row_tiles * factor,
        **{"half" if size == 2 else "full": product},
        in_flight=max(1, entry.num_stages - 1) * a["ROWS"] * a["DIM"] * size,
    )


def gradients_work(entry: Entry, a: dict[str, Any]) -> Work:
    """A program reads CHUNK tokens of both sides, and P anew for every BLOCK of them."""
    tokens = a["segments"] * a["tokens"]
    blocks = a["modules"] * a["slots"] * (a["CHUNK"] // a["BLOCK"])
    tiles_in = math.ceil(a["rank_in"] / a["RANK_IN"])
    tiles_out = math.ceil(a["rank_out"] / a["RANK_OUT"])
    memory = l2 = half = full = flight = 0.0
    for side, proj, rank, tiles, other in (
        ("x", "proj_in", a["RANK_IN"], tiles_in, tiles_out),
        ("dy", "proj_out", a["RANK_OUT"], tiles_out, tiles_in),
    ):
        size, width = element_bytes(a[side]), a[side].shape[-1]
        side_bytes = a["modules"] * tokens * width * size
        memory += side_bytes
        l2 += side_bytes * tiles * other
        flight = max(flight, a["BLOCK"] * a["WIDTH"] * size)
        if a[proj] is not None:
            proj_bytes = rank * width * element_bytes(a[proj])
            memory += a["modules"] * a[proj].numel() * element_bytes(a[proj])
            l2 += blocks * tiles * other * proj_bytes
            product = 2.0 * a["modules"] * tokens * width * rank * tiles * other
            if size == 4 and a["PRECISION"] == "ieee":
                full += product
            else:
                half += product
    outer = 2.0 * a["modules"] * tokens * a["RANK_IN"] * tiles_in * a["RANK_OUT"] * tiles_out
    if a["OUTER_PRECISION"] == "ieee":
        full += outer
    else:
        half += 6 * outer  # products of bfloat16 pieces
    gradient = a["rank_in"] * a["rank_out"] * 4.0
    written = a["modules"] * a["slots"] * gradient
    return Work(
        memory=memory + written,
        l2=l2 + written,
        half=half,
        full=full,
        in_flight=max(1, entry.num_stages - 1) * flight,
    )


def reduce_work(entry: Entry, a: dict[str, Any]) -> Work:
    """The work of the kernel that adds up the slots of a segment."""
    size = (a["slots"] + a["segments"]) * a["modules"] * a["size"] * 4.0
    return Work(memory=size, l2=size, in_flight=4.0 * a["REDUCE"])


def covariance_work(entry: Entry, a: dict[str, Any]) -> Work:
    """A program reads TILE columns of its rows, twice, for the tile's rows and columns."""
    rows = a["rows"]
    size, tiles = element_bytes(rows), a["tiles"]
    columns = 2.0 * tiles * a["TILE"] * a["count"] * size
    spans = a["spans"] if a["SPLIT"] else 1
    cov = 4.0 * tiles * a["TILE"] ** 2 * (spans if a["SPLIT"] else 2)
    product = 2.0 * tiles * a["TILE"] ** 2 * a["count"]
    return Work(
        memory=a["count"] * a["size"] * size + cov,
        l2=columns + cov,
        **{"half" if size == 2 else "full": product},
        in_flight=max(1, entry.num_stages - 1) * 2.0 * a["TILE"] * a["BLOCK"] * size,
    )


def pack_work(entry: Entry, a: dict[str, Any]) -> Work:
    """The work of packing rows: they are read twice, the second time from the L2 cache."""
    read = a["count"] * a["dim"] * element_bytes(a["rows"])
    written = 2.0 * a["count"] * a["dim"]
    return Work(memory=read + written, l2=2 * read + written, in_flight=4.0 * a["BLOCK"])


WORK: dict[str, Callable[[Entry, dict[str, Any]], Work]] = {
    "_scores_kernel": scan_work,
    "_candidates_kernel": scan_work,
    "_self_influence_kernel": self_influence_work,
    "_gradients_kernel": gradients_work,
    "_reduce_kernel": reduce_work,
    "_covariance_kernel": covariance_work,
    "_pack_kernel": pack_work,
}


def problems() -> Calls:
    """The sizes of an LLM's store and of one of its layers; tensors have no memory."""
    brain, full = torch.bfloat16, torch.float32
    rows, scale = make(65536, 16384), make(65536, dtype=full)
    for count in (1, 4, 16, 64, 256):
        queries, name = make(count, 16384, dtype=full), f"65536 x 16384 fp16, Q={count}"
        yield f"scores, {name}", partial(scores, queries, rows, scale)
        if count in (16, 64):
            yield f"topk_scores, {name}, k=20", partial(topk_scores, queries, rows, 20, scale)
    mask = make(64, 1024, dtype=torch.bool)
    for width in (2048, 4096):
        for dtype, name in ((brain, "bf16"), (full, "fp32")):
            x, proj = make(64, 1024, width, dtype=dtype), make(64, width, dtype=dtype)
            call = partial(projected_gradients, x, x, proj, proj, mask)
            yield f"projected_gradients, 64 x 1024 tokens of {width} {name}, k=64", call
    x, proj = make(16, 512, 2048), make(64, 2048)
    call = partial(projected_gradients, x, x, proj, proj, mask[:16, :512])
    yield "projected_gradients, 16 x 512 tokens of 2048 fp16, k=64", call
    seen = make(64, 1024, 64, dtype=full), make(64, 1024, 4096, dtype=brain)
    call = partial(projected_gradients, *seen, None, make(64, 4096, dtype=brain), mask)
    name = "x projected in forward, 64 x 1024 tokens of 4096 bf16, k=64"
    yield f"projected_gradients, {name}", call
    rows, square = make(65536, 4096), make(4096, 4096, dtype=full)
    yield "self_influence, 65536 x 4096 fp16", partial(self_influence, rows, square)
    call_cov = partial(covariance_update_, square, make(4096, 4096))
    yield "covariance_update_, 4096 rows of 4096 fp16", call_cov
    packed = partial(pack_rows, make(4096, 16384, dtype=full), [16384], [0])
    yield "pack_rows, 4096 x 16384 fp32", packed


def resident_programs(gpu: Gpu, registers: int, shared: int, threads: int) -> int:
    """How many programs fit on one multiprocessor, at most 32."""
    by_registers = gpu.registers // max(1, registers * threads)
    by_shared = gpu.shared // (shared + 1024) if shared else 32  # the system takes 1 KiB of each
    return max(1, min(32, by_registers, by_shared, gpu.threads // threads))


def predict(gpu: Gpu, case: str, entry: Entry) -> Prediction:
    """The prediction for one compiled kernel."""
    compiled = entry.compile()
    registers, _, shared = resources(compiled)
    threads = entry.num_warps * gpu.warp
    programs = entry.launch.programs
    resident = resident_programs(gpu, registers, shared, threads)
    work = WORK[entry.kernel_name](entry, entry.arguments)
    at_once = min(programs, resident * gpu.processors)
    busy = min(programs, gpu.processors) / gpu.processors  # those that have work
    memory_s = work.memory / gpu.memory
    arithmetic_s = (work.half / gpu.half + work.full / gpu.full) / ARITHMETIC
    times = {
        "memory": memory_s,
        "L2": work.l2 / gpu.l2,
        "arithmetic": arithmetic_s / busy,
        "latency": LATENCY_S * work.memory / (at_once * work.in_flight),
    }
    bound = max(times, key=lambda name: times[name])
    predicted_s = times[bound] + last_wave_s(gpu, work, programs, resident, times[bound], bound)
    if predicted_s > 1.15 * times[bound]:
        bound += ", last wave"
    return Prediction(
        *(gpu.name, case, entry.kernel_name, registers, shared, programs, resident),
        *(memory_s * 1e6, arithmetic_s * 1e6, predicted_s * 1e6, bound),
    )


def last_wave_s(
    gpu: Gpu, work: Work, programs: int, resident: int, all_s: float, bound: str
) -> float:
    """Time lost because the last wave has too few programs to fill the GPU."""
    last = programs % (resident * gpu.processors)
    if last == 0 or last == programs:
        return 0.0
    if bound == "arithmetic":
        rate = min(last, gpu.processors) / gpu.processors
    else:  # few programs reach the whole bandwidth if they keep enough bytes in flight
        rate = min(1.0, last * work.in_flight / (gpu.memory * LATENCY_S))
    return all_s * last / programs * (1 / rate - 1)


def predictions(gpus: tuple[Gpu, ...] = GPUS) -> Iterator[Prediction]:
    """Every kernel of every problem, GPU by GPU."""
    for gpu in gpus:
        for case, call in problems():
            for entry in recorded(case, gpu.architecture, call):
                if entry.kernel_name in WORK:
                    yield predict(gpu, case, entry)


def table(rows: list[Prediction]) -> Iterator[str]:
    """The predictions as a Markdown table."""
    yield (
        "| case | kernel | registers | shared, KiB | programs | on a processor | memory, µs "
        "| arithmetic, µs | predicted, µs | of memory | bound by |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for one in rows:
        yield (
            f"| {one.case} | `{one.kernel.strip('_').removesuffix('_kernel')}` | {one.registers} "
            f"| {one.shared / 1024:.0f} | {one.programs} | {one.resident} | {one.memory_us:.0f} "
            f"| {one.arithmetic_us:.0f} | {one.predicted_us:.0f} | {one.of_memory:.2f} "
            f"| {one.bound} |"
        )


def main(argv: list[str] | None = None) -> None:
    """Print or write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], help="one GPU only")
    parser.add_argument("--out", type=Path, help="write the report here (Markdown)")
    parser.add_argument("--json", action="store_true", help="append to bench/results")
    args = parser.parse_args(argv)
    lines = [
        "# What the GPU kernels should reach",
        "",
        "**Predicted, not measured**: written by `make gpu-report` without a GPU, from compiled "
        "registers and shared memory, sizes and data sheets (`bench/gpu/report.py` has the model). "
        "`of memory` is the time that the memory traffic takes at full bandwidth over the "
        "predicted time.",
    ]
    for gpu in GPUS:
        if args.gpu in (None, gpu.name):
            rows = list(predictions((gpu,)))
            lines += ["", f"## {gpu.name} ({gpu.architecture})", "", *table(rows)]
            print("\n".join(lines[-len(rows) - 4 :]), flush=True)
            if args.json:
                for one in rows:
                    stored.append("gpu_report", {"predicted": True, **vars(one)})
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
