"""What this machine can do: read memory, multiply. Measured in turns with what is timed.

The speed of a machine that others use too may halve between two tables.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from logra_kernels import ops

READ, FMA, TILES, BYTES = "(read)", "(fma)", "(tiles)", "(bytes)"  # the probes' names
READ_BYTES = 1 << 28  # 256 MiB: several times any cache we know of but a server's last level


@dataclass
class Limits:
    """GB/s and GFLOP/s (10**9) on torch's threads; None where the CPU has no such unit."""

    read_gb_per_s: float
    fma_gflop_per_s: float  # float32, operands in registers, under our active instruction set
    amx_gflop_per_s: float | None = None  # bfloat16 tiles, loaded from the cache

    @classmethod
    def of(cls, times: dict[str, list[float]]) -> "Limits":
        """The rates of the probes whose seconds are among these."""
        work = {name: done for name, (done, _) in probes().items()}
        found = {name: done / statistics.median(times[name]) / 1e9 for name, done in work.items()}
        return cls(found[READ], found[FMA], found.get(TILES))

    def floor(self, num_bytes: float, flops: float) -> tuple[float, str]:
        """The least seconds for so many bytes and FLOP, and which of the two takes them."""
        read = num_bytes / self.read_gb_per_s / 1e9
        fma = flops / self.fma_gflop_per_s / 1e9
        return (read, "read") if read >= fma else (fma, "FMA")


@cache
def probes() -> dict[str, tuple[float, Callable[[], object]]]:
    """One call for each limit, with the bytes or FLOP that it does."""
    data = torch.ones(READ_BYTES // 4)
    if ops.isa() is None:
        a = torch.randn(512, 512)
        return {READ: (READ_BYTES, data.sum), FMA: (2.0 * 512**3, lambda: a @ a)}
    found: dict[str, tuple[float, Callable[[], object]]] = {
        READ: (READ_BYTES, partial(ops.limits.read_all, data)),
        FMA: (ops.limits.multiply(1e9), partial(ops.limits.multiply, 1e9)),
    }
    if tiles := ops.limits.multiply_tiles(1e9):
        found[TILES] = (tiles, partial(ops.limits.multiply_tiles, 1e9))
    return found
