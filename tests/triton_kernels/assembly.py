"""What a compiled kernel holds: spills, matrix instructions, the width of its copies."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# NVIDIA: the tensor cores of sm_80, of sm_90 and of sm_100. AMD: the matrix cores
MATRIX = r"HMMA|HGMMA|DMMA|UTC\w*MMA|v_mfma"


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
