"""The gate: what a compiled kernel must not do (spill, copy narrowly, miss the matrix units).

tests/triton/test_triton_ahead_of_time.py asks it about every default configuration, tools.tune
about every candidate.
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

from logra_kernels.triton.catalogue import Entry

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# NVIDIA: the tensor cores of sm_80, of sm_90 and of sm_100. AMD: the matrix cores
MATRIX = r"HMMA|HGMMA|IMMA|IGMMA|DMMA|UTC\w*MMA|v_mfma"

# Kernels that hold a matrix product. They stream their operands through shared memory.
PRODUCTS = {
    "_candidates_kernel",
    "_covariance_kernel",
    "_gradients_kernel",
    "_project_kernel",
    "_scores_kernel",
    "_self_influence_kernel",
}
# Kernels that only move and add. They load 16 bytes at a time into registers.
STREAMS = {
    "_add_kernel",
    "_pack_kernel",
    "_reduce_kernel",
    "_split_queries_kernel",
    "_unpack_kernel",
}
# The most that a program may use. Code for sm_80 also runs on sm_86 and sm_89, which have 99 KiB.
SHARED_BYTES = {"sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
LEAST_SHARED_BYTES = 99 << 10


def about(entry: Entry, kernel: Any) -> dict[str, Any]:
    """What `problems` looks at: facts about a launch and its compiled kernel."""
    precisions = {entry.arguments.get(p, "ieee") for p in ("PRECISION", "OUTER_PRECISION")}
    return {
        "case": entry.name,
        "kernel": entry.kernel_name,
        "exact": entry.types == {"fp32"} and precisions == {"ieee"},
        "pipelined": entry.num_stages > 1,
    } | report(kernel)


def problems(line: dict[str, Any], architecture: str) -> list[str]:
    """Why the gate refuses a kernel; an empty list if it does not."""
    found = []
    if line["spills"] or line["stack"]:
        found.append(f"spills: {line['spills']}, {line['stack']} bytes of stack")
    if line["shared"] > SHARED_BYTES.get(architecture, LEAST_SHARED_BYTES):
        found.append(f"{line['shared']} bytes of shared memory")
    if line["kernel"] in PRODUCTS:
        # Exact products of float32 use no tensor cores on NVIDIA, which would round to tf32.
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


class Resources(NamedTuple):
    """What a compiled kernel occupies."""

    registers: int  # of a thread
    stack: int  # bytes of a thread, which hold spilled registers
    shared: int  # bytes of a program


def resources(kernel: Any) -> Resources:
    """Registers, stack bytes and shared bytes of a compiled kernel."""
    shared = int(kernel.metadata.shared)
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers = number(text, r"\.vgpr_count:\s+(\d+)")
        return Resources(registers, number(text, r"\.private_segment_fixed_size:\s+(\d+)"), shared)
    usage = output(NVIDIA_TOOLS / "cuobjdump", "-res-usage", binary=kernel.asm["cubin"])
    stack = number(usage, r"STACK:(\d+)") + number(usage, r"LOCAL:(\d+)")
    return Resources(number(usage, r"REG:(\d+)"), stack, shared)


def report(kernel: Any) -> dict[str, Any]:
    """Resources and instructions of one of Triton's compiled kernels.

    matrix: {instruction: how many}. async_wide, async_narrow: copies from memory to shared memory
    of 16 bytes a thread or more, and of fewer. gfx942 copies at most 4 bytes asynchronously, so
    the loads ahead of time into registers are counted in their place. wide, narrow: loads into
    registers.
    """
    asm = kernel.asm
    instructions = nvidia_code(asm["cubin"]) if "cubin" in asm else amd_code(asm["amdgcn"])
    return resources(kernel)._asdict() | instructions


def amd_code(text: str) -> dict[str, Any]:
    """Spills, matrix instructions and widths of loads in AMD's assembly."""
    names = collections.Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE))
    wide = count(names, r"(?:global|buffer)_load_dwordx4")
    vector, scalar = (number(text, rf"\.{kind}gpr_spill_count:\s+(\d+)") for kind in "vs")
    return {
        "spills": vector + scalar,
        "matrix": matrix(names),
        "async_wide": wide,
        "async_narrow": 0,
        "wide": wide,
        "narrow": count(names, r"(?:global|buffer)_load_") - wide,
    }


def nvidia_code(cubin: bytes) -> dict[str, Any]:
    """Spills, matrix instructions and widths of loads in a cubin, disassembled."""
    names: collections.Counter[str] = collections.Counter()
    for line in output(NVIDIA_TOOLS / "nvdisasm", "-c", binary=cubin).splitlines():
        line = re.sub(r"/\*[0-9a-f]+\*/", "", line)
        name = re.match(r"\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\b", line)
        if name:
            names[name[1]] += 1
    asynchronous, loads = count(names, "LDGSTS"), count(names, r"LDG\b")
    async_wide, wide = count(names, r"LDGSTS\.\S*128"), count(names, r"LDG\.\S*(?:128|256)")
    return {
        "spills": count(names, "STL|LDL"),
        "matrix": matrix(names),
        "async_wide": async_wide + count(names, "UTMALDG"),
        "async_narrow": asynchronous - async_wide,
        "wide": wide,
        "narrow": loads - wide,
    }


def matrix(names: collections.Counter[str]) -> dict[str, int]:
    """{matrix instruction: how often it stands in the code}."""
    found: collections.Counter[str] = collections.Counter()
    for name, number in names.items():
        if match := re.match(MATRIX, name):
            found[match[0]] += number
    return dict(found)


def count(names: collections.Counter[str], pattern: str) -> int:
    """The number of instructions whose name begins with the pattern."""
    return sum(number for name, number in names.items() if re.match(pattern, name))


def number(text: str, pattern: str) -> int:
    """The integer that the pattern's group matches; ValueError if there is none."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"compiled code: expected {pattern}, got: {text[:200]}")
    return int(found[1])


def output(*command: Any, binary: bytes) -> str:
    """What a tool says of a binary, whose file is its last argument."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        words = [*map(str, command), file.name]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
