"""What this machine can do, measured beside what is timed: reading memory, multiplying, tiles."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from bench._machine import machine
from logra_kernels import ops

READ, FMA = "(read)", "(fma)"  # the probes' names
Work = tuple[float, Callable[[], object]]  # bytes or FLOP, and what does them
READ_BYTES = 1 << 28  # 256 MiB: several times any cache we know of but a server's last level


@dataclass
class Limits:
    """GB/s and GFLOP/s (10**9) on torch's threads; None where the CPU has no such unit."""

    read_gb_per_s: float  # the best of torch.sum and the extension's own loop
    # float32, operands in registers, under our active instruction set; or sgemm's if that is more
    fma_gflop_per_s: float
    sgemm_gflop_per_s: float  # torch, 1536 x 1536
    bf16_gflop_per_s: float | None  # torch's bfloat16 product of the same size
    amx_gflop_per_s: float | None  # bfloat16 tiles, loaded from the cache

    def line(self) -> str:
        parts = [
            f"read {self.read_gb_per_s:.1f} GB/s",
            f"fp32 FMA {self.fma_gflop_per_s:.0f}",
            f"sgemm {self.sgemm_gflop_per_s:.0f}",
        ]
        if self.bf16_gflop_per_s is not None:
            parts.append(f"bf16 mm {self.bf16_gflop_per_s:.0f}")
        if self.amx_gflop_per_s is not None:
            parts.append(f"AMX tiles {self.amx_gflop_per_s:.0f}")
        return ", ".join(parts) + " GFLOP/s"

    def floor(self, num_bytes: float, flops: float) -> tuple[float, str]:
        """Least seconds for so many bytes and FLOP, and which of the two takes them."""
        read = num_bytes / self.read_gb_per_s / 1e9
        fma = flops / self.fma_gflop_per_s / 1e9
        return (read, "read") if read >= fma else (fma, "FMA")


def measure(rounds: int = 7) -> Limits:
    """Interleaved rounds of everything; each limit is the best that any round reached."""
    a = torch.randn(1536, 1536)
    narrow = a.bfloat16()
    product = 2.0 * 1536**3
    calls: dict[str, Work] = {
        "sum": (READ_BYTES, _data().sum),
        "sgemm": (product, lambda: a @ a),
        **probes(),
    }
    if _has_bf16_products():
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
        amx_gflop_per_s=best.get("tiles", best.get("bf16") if _has_amx() else None),
    )


def probes() -> dict[str, Work]:
    """What reads memory and what multiplies, to be timed in turns with what they are limits of.

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


def refined(limits: Limits, read_s: float, fma_s: float) -> Limits:
    """The limits with what two of the probes' calls took."""
    work = probes()
    return replace(
        limits,
        read_gb_per_s=work[READ][0] / read_s / 1e9,
        fma_gflop_per_s=work[FMA][0] / fma_s / 1e9,
    )


@cache
def _data() -> torch.Tensor:
    return torch.ones(READ_BYTES // 4)


def _has_amx() -> bool:
    return _flag("amx_bf16")


def _has_bf16_products() -> bool:
    return _flag("avx512_bf16") or _flag("amx_bf16") or _flag("bf16")


def _flag(name: str) -> bool:
    return name in machine()["flags"]
