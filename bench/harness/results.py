"""bench/results/<name>.jsonl: one JSON object a line, each with its date and its machine.

A record of bench.harness.cases is one case:

    {"date", "machine", "load", "bench", "case", "params", "limits",
     "providers": [{"provider", "median_ms", …}, …], "left_out": {provider: why}}

Other benchmarks choose their own fields beside "date", "machine" and "load". A file grows with
every run; `latest` gives the newest record of each case.
"""

import json
import math
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

from logra_kernels import ops

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
# Instructions that decide which kernels run, here or in torch.
FLAGS = (
    "avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimdhp", "sve", "bf16", "i8mm",
)  # fmt: skip


def append(name: str, record: dict[str, Any]) -> None:
    """Add a line to <name>.jsonl; a NaN or an infinity is a ValueError, for JSON has neither."""
    full = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "load": round(os.getloadavg()[0], 2),
        **record,
    }
    line = json.dumps(_short(full), allow_nan=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(name: str) -> list[dict[str, Any]]:
    """Every record of <name>.jsonl, oldest first; [] where there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict) or not {"date", "machine"} <= set(record):
            raise ValueError(f"{path.name}:{number}: expected an object with date and machine")
        records.append(record)
    return records


def latest(name: str) -> list[dict[str, Any]]:
    """The newest record of each case, in the order in which the cases first came."""
    return list({str(record.get("case")): record for record in read(name)}.values())


def medians_ms(record: dict[str, Any]) -> dict[str, float]:
    """The median of each provider in a record of the harness."""
    return {row["provider"]: float(row["median_ms"]) for row in record["providers"]}


def rates(record: dict[str, Any]) -> dict[str, float]:
    """Pairs or tokens a second of each provider in a record of the peers' benchmark."""
    counts = record["params"]["count"]
    return {name: counts[name] / ms * 1e3 for name, ms in medians_ms(record).items()}


@cache
def machine() -> dict[str, Any]:
    """What a result was measured on, without the names of hosts or folders."""
    cpu = _proc("/proc/cpuinfo")
    flags = set((_field(cpu, "flags") or _field(cpu, "Features") or "").split())
    memory_kib = _field(_proc("/proc/meminfo"), "MemTotal")
    return {
        "cpu": _field(cpu, "model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{_field(cpu, 'cpu family')}/{_field(cpu, 'model')}",
        "flags": [flag for flag in FLAGS if flag in flags],
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory_kib.split()[0]) / 2**20, 1) if memory_kib else None,
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "compiler": ops.limits.compiler(),
        "commit": _commit(),
        "isas": ops.available_isas(),
    }


def _commit() -> str | None:
    """The commit of this copy, with a + for uncommitted changes; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _proc(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # not Linux
        return ""


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None


def _short(value: Any) -> Any:
    """Floats to five digits: the sixth is noise."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return value
