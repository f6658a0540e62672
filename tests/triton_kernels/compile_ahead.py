"""Compile every kernel for a GPU that is not there, as its launcher would launch it.

    python compile_ahead.py 90          # or 80, 100, gfx942

prints one JSON object a line: the case, the kernel, and what the gate looks at. The launchers run
on CPU tensors with the launch itself left out, so the compiled types, tiles and divisibility are
those that a user gets.

    python compile_ahead.py 80 ones

compiles the kernels for sizes of one, which the compiler makes constants: code that takes them for
tensors fails there and nowhere else.
"""

import collections
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from logra_kernels.triton import (
    _common,
    covariance_update_,
    pack_rows,
    per_sample_gradients,
    project,
    projected_gradients,
    scores,
    self_influence,
    topk_scores,
    unpack_rows,
)

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AbsentGpu(DriverBase):
    """What the compiler asks a driver for, answered without one."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @staticmethod
    def is_active() -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError


def target(name: str) -> GPUTarget:
    return (
        GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name), 32)
    )


def report(kernel: Any) -> dict[str, Any]:
    """Spills and matrix instructions of a compiled kernel."""
    if "cubin" in kernel.asm:
        return nvidia_report(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}
    text = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        return int(re.search(pattern, text)[1])  # type: ignore[index]

    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spills": number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"\.sgpr_spill_count:\s+(\d+)"),
        "stack": number(r"\.private_segment_fixed_size:\s+(\d+)"),
        "matrix": len(re.findall(r"\bv_mfma", text)),
        "wide_copies": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "shared": kernel.metadata.shared,
    }


def nvidia_report(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = output(NVIDIA_TOOLS / "cuobjdump", "-res-usage", path)
        assembly = output(NVIDIA_TOOLS / "nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    names: collections.Counter[str] = collections.Counter()
    for line in assembly.splitlines():
        line = re.sub(r"/\*[0-9a-f]+\*/", "", line)
        name = re.match(r"\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\b", line)
        if name:
            names[name[1]] += 1

    def count(pattern: str) -> int:
        return sum(n for name, n in names.items() if re.match(pattern, name))

    return {
        "registers": int(found[1]),
        "spills": count("STL|LDL") + int(found[3]),
        "stack": int(found[2]),
        "matrix": count(r"HMMA|HGMMA|DMMA|UTC\w*MMA"),
        "wide_copies": count(r"LDGSTS\.\S*128"),
    }


def output(*command: Any) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and launch of each default configuration. Every axis is a multiple of 16."""
    half, full = torch.float16, torch.float32

    def make(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    mask = torch.ones(2, 256, dtype=torch.bool)
    bounds = torch.tensor([0, 256, 512])
    queries, scale = make(64, 256, dtype=full), make(256, dtype=full)
    x, proj, rows = make(2, 256, 256), make(64, 256), make(256, 256)
    yield "projected_gradients", partial(projected_gradients, x, x, proj, proj, mask)
    packed = x.flatten(0, 1), x.flatten(0, 1), proj, proj, mask.flatten(), bounds
    yield "projected_gradients packed", partial(projected_gradients, *packed)
    yield "projected_gradients one side", partial(projected_gradients, x, x, proj, None)
    yield "projected_gradients narrow", partial(projected_gradients, x, x[..., :64], proj, None)
    yield "per_sample_gradients", partial(per_sample_gradients, x[..., :64], x[..., :64])
    yield "project", partial(project, x, proj)
    yield "scores", partial(scores, queries, rows, scale)
    yield "topk_scores", partial(topk_scores, queries, rows, 20, scale)
    yield "self_influence", partial(self_influence, rows, queries)
    yield "covariance_update_", partial(covariance_update_, make(256, 256, dtype=full), x[0])

    x, proj, rows = x.bfloat16(), proj.bfloat16(), rows.bfloat16()
    mixed = x.float(), x, proj.float(), proj, mask
    yield "projected_gradients bfloat16", partial(projected_gradients, x, x, proj, proj, mask)
    yield "projected_gradients mixed", partial(projected_gradients, *mixed)
    yield "scores bfloat16", partial(scores, queries, rows, scale)

    x, proj, rows = x.float(), proj.float(), rows.float()
    yield "projected_gradients float32", partial(projected_gradients, x, x, proj, proj, mask)
    yield "project float32", partial(project, x, proj)
    yield "topk_scores float32", partial(topk_scores, queries, rows, 20, scale)
    yield "self_influence float32", partial(self_influence, rows, queries)

    many = make(8192, 256)
    yield (
        "covariance_update_ float64",
        partial(covariance_update_, make(256, 256, dtype=torch.float64), many),
    )
    state = [make(64, 20, dtype=t) for t in (full, torch.int64, full, torch.int64)]
    yield "topk_scores state", partial(topk_scores, queries, many, 20, None, None, state, 7)
    yield "pack_rows", partial(pack_rows, queries, [256], [0])
    yield "unpack_rows", partial(unpack_rows, many, make(8192, dtype=full), [256], [0])
    # what the gate must refuse, and what it must notice
    x, proj = make(256, 256), make(64, 256)
    yield "control: oversized tile", partial(oversized_project, x, proj)
    yield "control: unaligned", partial(project, x[:, 1:], proj[:, 1:])


def sizes_of_one() -> Iterator[tuple[str, Callable[[], Any]]]:
    half, full = torch.float16, torch.float32

    def make(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    one, single, scale = make(1, 1), make(1, 1, dtype=full), make(1, dtype=full)
    mask, bounds = torch.ones(1, 1, dtype=torch.bool), torch.tensor([0, 1])
    long = make(300, 1)
    x = one[None]
    yield "project", partial(project, x, one)
    yield "projected_gradients", partial(projected_gradients, x, x, one, one, mask)
    yield (
        "projected_gradients, chunks",
        partial(projected_gradients, long[None], long[None], one, one),
    )
    yield (
        "projected_gradients, packed",
        partial(projected_gradients, one, one, one, None, None, bounds),
    )
    packed = long, long, one, one, None, bounds
    yield "projected_gradients, packed chunks", partial(projected_gradients, *packed)
    yield "per_sample_gradients", partial(per_sample_gradients, x, x)
    yield "covariance_update_", partial(covariance_update_, single, one)
    yield "covariance_update_, spans", partial(covariance_update_, single, make(5000, 1))
    yield "scores", partial(scores, single, one, scale, scale)
    yield "topk_scores", partial(topk_scores, single, one, 1, scale, scale)
    yield "topk_scores, no rows", partial(topk_scores, single, one[:0], 1)
    for k, offset in ((1, 1), (3, 2**33)):
        state = [make(1, k, dtype=t) for t in (full, torch.int64, full, torch.int64)]
        arguments = single, long, k, None, None, state, offset
        yield f"topk_scores, state of {k}", partial(topk_scores, *arguments)
    yield "self_influence", partial(self_influence, one, single)
    yield "pack_rows", partial(pack_rows, one, [1], [0])
    yield "unpack_rows", partial(unpack_rows, one, scale, [1], [0])


def oversized_project(x: torch.Tensor, proj: torch.Tensor) -> None:
    """The accumulator alone takes 256 registers of each thread, of 255; 512 of 512 on gfx942."""
    warps = 1 if triton.runtime.driver.active.get_current_target().backend == "hip" else 4
    kernel = importlib.import_module("logra_kernels.triton.project")._project_kernel
    kernel[(1,)](
        *(x, proj, torch.zeros(256, 64), 256, 256, 256, 64, 256, 256, 256),
        PRECISION="ieee",
        TOKENS=128,
        WIDTH=32,
        RANK=256,
        num_warps=warps,
    )


def main(name: str, which: str = "defaults") -> None:
    triton.runtime.driver.set_active(AbsentGpu(target(name)))
    _common.INTERPRETED = True  # lets CPU tensors pass
    compiled: dict[int, tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[id(kernel)] = (self.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    seen: set[int] = set()
    for case, launch in sizes_of_one() if which == "ones" else cases():
        launch()
        for key, (kernel_name, kernel) in compiled.items():
            if key not in seen:
                line = {"case": case, "kernel": kernel_name}
                if which == "defaults":
                    line |= report(kernel)
                print(json.dumps(line), flush=True)
        seen |= set(compiled)


if __name__ == "__main__":
    main(*sys.argv[1:])
