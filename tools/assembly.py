"""What a compiled kernel holds (spills, matrix instructions, the width of its copies), and what
speaks against it: the gate of tests/test_triton_ahead_of_time.py, and of what bench.tune tries."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from logra_kernels.triton.catalogue import Entry

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# NVIDIA: the tensor cores of sm_80, of sm_90 and of sm_100. AMD: the matrix cores
MATRIX = r"HMMA|HGMMA|DMMA|UTC\w*MMA|v_mfma"

# kernels that hold a matrix product: they stream their operands through shared memory
PRODUCTS = {
    "_candidates_kernel",
    "_covariance_kernel",
    "_gradients_kernel",
    "_project_kernel",
    "_scores_kernel",
    "_self_influence_kernel",
}
# kernels that only move and add: they load 16 bytes at a time into registers
STREAMS = {
    "_add_kernel",
    "_pack_kernel",
    "_reduce_kernel",
    "_split_queries_kernel",
    "_unpack_kernel",
}
# the most that a program gets: 227 KiB on sm_90 and sm_100, 64 KiB on gfx942; for sm_80, whose code
# runs on sm_86 and sm_89 too, their 99 KiB
SHARED_BYTES = {"sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
LEAST_SHARED_BYTES = 99 << 10


def about(entry: Entry, kernel: Any) -> dict[str, Any]:
    """What `problems` looks at, of a launch and its compiled kernel."""
    precisions = {entry.arguments.get(p, "ieee") for p in ("PRECISION", "OUTER_PRECISION")}
    return {
        "case": entry.name,
        "kernel": entry.kernel_name,
        "exact": entry.types == {"fp32"} and precisions == {"ieee"},
        "pipelined": entry.num_stages > 1,
    } | report(kernel)


def problems(line: dict[str, Any], architecture: str) -> list[str]:
    """What speaks against a kernel; an empty list if nothing does."""
    found = []
    if line["spills"] or line["stack"]:
        found.append(f"spills: {line['spills']}, {line['stack']} bytes of stack")
    if line["shared"] > SHARED_BYTES.get(architecture, LEAST_SHARED_BYTES):
        found.append(f"{line['shared']} bytes of shared memory")
    if line["kernel"] in PRODUCTS:
        # exact products of float32 use no tensor cores on NVIDIA: those would round to tf32
        if line["exact"] and architecture.startswith("sm_"):
            if line["matrix"]:
                found.append(f"tensor cores round float32: {line['matrix']}")
        elif not line["matrix"]:
            found.append("no matrix instruction")
        if not line["async_wide" if line["pipelined"] else "wide"]:
            found.append("no asynchronous copy of 16 bytes")
        if line["async_narrow"]:
            found.append(f"{line['async_narrow']} asynchronous copies of less than 16 bytes")
    if line["kernel"] in STREAMS and not line["wide"]:
        found.append("no load of 16 bytes")
    return found


def report(kernel: Any) -> dict[str, Any]:
    """Of one of Triton's compiled kernels.

    matrix: {instruction: how many}. async_wide, async_narrow: copies from memory to shared memory
    of 16 bytes a thread or more, and of fewer; on gfx942, which copies asynchronously 4 bytes at
    most, the loads ahead of time into registers take their place. wide, narrow: loads into
    registers.
    """
    if "cubin" in kernel.asm:
        found = nvidia_report(kernel.asm["cubin"])
    else:
        found = amd_report(kernel.asm["amdgcn"])
    return found | {"shared": kernel.metadata.shared}


def amd_report(text: str) -> dict[str, Any]:
    def number(pattern: str) -> int:
        return int(re.search(pattern, text)[1])  # type: ignore[index]

    names = collections.Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE))
    wide = count(names, r"(?:global|buffer)_load_dwordx4")
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spills": number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"\.sgpr_spill_count:\s+(\d+)"),
        "stack": number(r"\.private_segment_fixed_size:\s+(\d+)"),
        "matrix": matrix(names),
        "async_wide": wide,
        "async_narrow": 0,
        "wide": wide,
        "narrow": count(names, r"(?:global|buffer)_load_") - wide,
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
    asynchronous, loads = count(names, "LDGSTS"), count(names, r"LDG\b")
    async_wide, wide = count(names, r"LDGSTS\.\S*128"), count(names, r"LDG\.\S*(?:128|256)")
    return {
        "registers": int(found[1]),
        "spills": count(names, "STL|LDL") + int(found[3]),
        "stack": int(found[2]),
        "matrix": matrix(names),
        "async_wide": async_wide + count(names, "UTMALDG"),
        "async_narrow": asynchronous - async_wide,
        "wide": wide,
        "narrow": loads - wide,
    }


def matrix(names: collections.Counter[str]) -> dict[str, int]:
    found: collections.Counter[str] = collections.Counter()
    for name, number in names.items():
        if match := re.match(MATRIX, name):
            found[match[0]] += number
    return dict(found)


def count(names: collections.Counter[str], pattern: str) -> int:
    return sum(number for name, number in names.items() if re.match(pattern, name))


def output(*command: Any) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout
