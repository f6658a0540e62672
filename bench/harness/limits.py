"""What this machine can do, measured beside what is timed: reading memory, multiplying, tiles."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch

from bench.harness.machine import machine
from logra_kernels import ops

READ, FMA = "(read)", "(fma)"  # the probes' names
Work = tuple[float, Callable[[], object]]  # bytes or FLOP, and the call that does them
READ_BYTES = 1 << 28  # 256 MiB: several times any cache we know of but a server's last level


@dataclass
class Limits:
    """GB/s and GFLOP/s (10**9) on torch's threads; None where the CPU has no such unit."""

    read_gb_per_s: float  # the best of torch.sum and the extension's own loop
    # float32, operands in registers, under our active instruction set; sgemm's if that is higher
    fma_gflop_per_s: float
    sgemm_gflop_per_s: float  # torch, 1536 x 1536
    bf16_gflop_per_s: float | None  # torch's bfloat16 product of the same size
    amx_gflop_per_s: float | None  # bfloat16 tiles, loaded from the cache

    def floor(self, num_bytes: float, flops: float) -> tuple[float, str]:
        """The least seconds for so many bytes and FLOP, and which of the two takes them."""
        read = num_bytes / self.read_gb_per_s / 1e9
        fma = flops / self.fma_gflop_per_s / 1e9
        return (read, "read") if read >= fma else (fma, "FMA")


def header(limits: Limits) -> str:
    """The line above every table."""
    text = (
        f"{torch.get_num_threads()} threads, isa {ops.isa()}, read {limits.read_gb_per_s:.1f} GB/s,"
        f" fp32 FMA {limits.fma_gflop_per_s:.0f}, sgemm {limits.sgemm_gflop_per_s:.0f}"
    )
    if limits.bf16_gflop_per_s is not None:
        text += f", bf16 mm {limits.bf16_gflop_per_s:.0f}"
    if limits.amx_gflop_per_s is not None:
        text += f", AMX tiles {limits.amx_gflop_per_s:.0f}"
    return f"{text} GFLOP/s"


def measure(rounds: int = 7) -> Limits:
    """Every limit in each round, in turns; the best that any round reached counts."""
    a = torch.randn(1536, 1536)
    narrow = a.bfloat16()
    product = 2.0 * 1536**3
    calls: dict[str, Work] = {
        "sum": (READ_BYTES, _data().sum),
        "sgemm": (product, lambda: a @ a),
        **probes(),
    }
    if any(_has(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16")):
        calls["bf16"] = (product, lambda: narrow @ narrow)
    if ops.isa() is not None and (tiles := ops.limits.multiply_tiles(1e9)):
        calls["tiles"] = (tiles, lambda: ops.limits.multiply_tiles(1e9))
    best = dict.fromkeys(calls, 0.0)
    with torch.no_grad():
        for _ in range(rounds):
            for name, (work, call) in calls.items():
                start = time.perf_counter()
                call()
                best[name] = max(best[name], work / (time.perf_counter() - start) / 1e9)
    return Limits(
        read_gb_per_s=max(best["sum"], best[READ]),
        fma_gflop_per_s=max(best["sgemm"], best[FMA]),
        sgemm_gflop_per_s=best["sgemm"],
        bf16_gflop_per_s=best.get("bf16"),
        amx_gflop_per_s=best.get("tiles", best.get("bf16") if _has("amx_bf16") else None),
    )


def probes() -> dict[str, Work]:
    """One call that reads memory and one that multiplies, to be timed in turns with providers.

    The speed of a machine that others use too may halve between two tables.
    """
    data = _data()
    if ops.isa() is None:
        a = torch.randn(512, 512)
        return {READ: (READ_BYTES, data.sum), FMA: (2.0 * 512**3, lambda: a @ a)}
    return {
        READ: (READ_BYTES, lambda: ops.limits.read_all(data)),
        FMA: (ops.limits.multiply(1e9), lambda: ops.limits.multiply(1e9)),
    }


def refined(limits: Limits, times: dict[str, list[float]]) -> Limits:
    """The limits with the rates of the probes among these times."""
    rates = {
        name: work / statistics.median(times[name]) / 1e9 for name, (work, _) in probes().items()
    }
    return replace(limits, read_gb_per_s=rates[READ], fma_gflop_per_s=rates[FMA])


@cache
def _data() -> torch.Tensor:
    return torch.ones(READ_BYTES // 4)


def _has(flag: str) -> bool:
    return flag in cast("list[str]", machine()["flags"])
