"""What a result was measured on, without the names of hosts or folders."""

import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import numpy
import torch

from logra_kernels import ops

# Instructions that decide which kernels run, here or in torch.
FLAGS = (
    "avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimdhp", "sve", "bf16", "i8mm",
)  # fmt: skip


def machine() -> dict[str, object]:
    """The machine and the software, ready for JSON; the threads are torch's at this moment."""
    return {**_fixed(), "threads": torch.get_num_threads()}


def commit() -> str | None:
    """The commit of this copy, with a + for uncommitted changes; None outside a repository."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "bench", "logra_kernels")
    return head + ("+" if changed else "")


@cache
def _fixed() -> dict[str, object]:
    cpu = _proc("/proc/cpuinfo")
    flags = set((_field(cpu, "flags") or _field(cpu, "Features") or "").split())
    family, model = _field(cpu, "cpu family"), _field(cpu, "model")
    memory_kib = _field(_proc("/proc/meminfo"), "MemTotal")
    return {
        "cpu": _field(cpu, "model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{family}/{model}" if family else None,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory_kib.split()[0]) / 2**20, 1) if memory_kib else None,
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "compiler": ops.limits.compiler(),
        "commit": commit(),
        "isas": ops.available_isas(),
    }


def _proc(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # not Linux
        return ""


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None
