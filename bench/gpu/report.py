"""What the GPU kernels take at least, by arithmetic: python -m bench.gpu.report [--out FILE]

Arithmetic, not a measurement: nothing is run, and no GPU is needed. The least time of a problem
follows from its sizes and the GPU's data sheet:

    memory      bytes that must be read and written once, at the memory's bandwidth
    arithmetic  multiplications and additions, at 70 % of the peak (what dense products reach)

The larger of the two is a bound, not a prediction: programs that wait for memory, L2 and a last
wave of few programs come on top. Beside it stand the registers and the shared memory of the kernel
that the launcher would launch, compiled ahead of time (`python -m tools.compile_ahead` says more).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from logra_kernels.triton import (
    covariance_update_,
    pack_rows,
    projected_gradients,
    scores,
    self_influence,
    topk_scores,
)
from logra_kernels.triton.catalogue import make, recorded
from tools.assembly import resources

ARITHMETIC = 0.7


@dataclass(frozen=True)
class Gpu:
    """Bandwidth in bytes/s, rates in FLOP/s."""

    name: str
    architecture: str
    memory: float
    half: float  # matrix units, float16 and bfloat16
    full: float  # float32, exact products


GPUS = (
    Gpu("A100", "sm_80", 2.04e12, 312e12, 19.5e12),
    Gpu("H100", "sm_90", 3.35e12, 989e12, 67e12),
    Gpu("H200", "sm_90", 4.8e12, 989e12, 67e12),
    Gpu("B200", "sm_100", 8.0e12, 2250e12, 75e12),
    Gpu("MI300X", "gfx942", 5.3e12, 1307e12, 81.7e12),
)


@dataclass(frozen=True)
class Problem:
    """A launcher's call on tensors without memory, and the FLOP of its products."""

    name: str
    call: partial[Any]
    half: float = 0.0  # on matrix units
    full: float = 0.0  # in float32


def problems() -> Iterator[Problem]:
    """The sizes of an LLM's store and of one of its layers."""
    brain, full = torch.bfloat16, torch.float32
    call: partial[Any]
    rows, scale = make(65536, 16384), make(65536, dtype=full)
    for count in (1, 4, 16, 64, 256):
        queries, name = make(count, 16384, dtype=full), f"65536 x 16384 fp16, Q={count}"
        half = 2 * 2.0 * count * rows.numel()  # each query in two pieces of fp16
        yield Problem(f"scores, {name}", partial(scores, queries, rows, scale), half)
        if count in (16, 64):
            call = partial(topk_scores, queries, rows, 20, scale)
            yield Problem(f"topk_scores, {name}, k=20", call, half)
    for n, t, width, dtype in (
        (64, 1024, 2048, brain),
        (64, 1024, 2048, full),
        (64, 1024, 4096, brain),
        (64, 1024, 4096, full),
        (16, 512, 2048, torch.float16),
    ):
        x, proj = make(n, t, width, dtype=dtype), make(64, width, dtype=dtype)
        mask = make(n, t, dtype=torch.bool)
        products, outer = 4.0 * n * t * width * 64, 2.0 * n * t * 64 * 64
        name = f"projected_gradients, {n} x {t} tokens of {width} {str(dtype)[6:]}, k=64"
        call = partial(projected_gradients, x, x, proj, proj, mask)
        if dtype is full:
            yield Problem(name, call, full=products + outer)
        else:  # outer products of bfloat16 pieces
            yield Problem(name, call, half=products + 6 * outer)
    rows, square = make(65536, 4096), make(4096, 4096, dtype=full)
    call = partial(self_influence, rows, square)
    yield Problem("self_influence, 65536 x 4096 fp16", call, 2 * 2.0 * rows.numel() * 4096)
    call = partial(covariance_update_, square, make(4096, 4096))
    yield Problem("covariance_update_, 4096 rows of 4096 fp16", call, 1.0 * 4096**3)
    packed = partial(pack_rows, make(4096, 16384, dtype=full), [16384], [0])
    yield Problem("pack_rows, 4096 x 16384 fp32", packed)


def bound(gpu: Gpu, problem: Problem) -> dict[str, Any]:
    """A line of the report."""
    call, results = problem.call, list[Any]()
    entries = recorded(problem.name, gpu.architecture, lambda: results.append(call()))
    tensors = [t for t in tree_leaves((call.args, results)) if isinstance(t, Tensor)]
    num_bytes = sum({id(t): t.nbytes for t in tensors}.values())  # each once
    used = [resources(entry.compile()) for entry in entries]
    registers, _, shared = max(used, key=lambda one: (one[2], one[0]))
    memory_us = num_bytes / gpu.memory * 1e6
    arithmetic_us = (problem.half / gpu.half + problem.full / gpu.full) / ARITHMETIC * 1e6
    return {
        "case": problem.name,
        "registers": registers,
        "shared, KiB": f"{shared / 1024:.0f}",
        "memory, µs": f"{memory_us:.0f}",
        "arithmetic, µs": f"{arithmetic_us:.0f}",
        "at least, µs": f"{max(memory_us, arithmetic_us):.0f}",
        "bound by": "memory" if memory_us >= arithmetic_us else "arithmetic",
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The bounds as a Markdown table."""
    for cells in (list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)):
        yield f"| {' | '.join(map(str, cells))} |"


def main(argv: list[str] | None = None) -> None:
    """Print or write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the report here (Markdown)")
    args = parser.parse_args(argv)
    lines = [
        "# What the GPU kernels take at least",
        "",
        "**Arithmetic, not measured**: written by `make gpu-report` without a GPU, from sizes and "
        "data sheets (`bench/gpu/report.py` has the model): bounds, which leave out latency, L2 "
        "and incomplete waves. Registers and shared memory are those of the compiled kernel.",
    ]
    for gpu in GPUS:
        rows = [bound(gpu, problem) for problem in problems()]
        lines += ["", f"## {gpu.name} ({gpu.architecture})", "", *table(rows)]
    text = "\n".join(lines) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
