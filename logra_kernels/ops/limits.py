"""What the machine reaches, as work that a benchmark times beside the kernels.

The work runs on torch's threads, in the C++ extension and under its active instruction set. Each
function raises RuntimeError where the extension is not loaded (`ops.isa()` is None there).
"""

from types import ModuleType

import torch
from torch import Tensor

from logra_kernels import _native
from logra_kernels._checks import expect_dtype, expect_shape, plain


def read_all(values: Tensor) -> float:
    """Read `values`, ``[n]`` float32 on the CPU, once, and return the sum in an unspecified order.

    Time it for the read bandwidth: it reads ``4 n`` bytes.
    """
    expect_dtype("values", values, torch.float32)
    expect_shape("values", values, n=None)
    if values.device.type != "cpu":
        raise ValueError(f"values: expected a tensor on cpu, got {values.device}")
    values = plain(values)
    return float(_kernels().read_all(values.data_ptr(), len(values)))


def multiply(flops_per_thread: float) -> float:
    """Run float32 fused multiply-adds with operands in registers; return the FLOP done.

    Time it for the FMA rate. Each thread does about `flops_per_thread` of them.
    """
    return float(_kernels().multiply(flops_per_thread))


def multiply_bytes(operations_per_thread: float) -> float:
    """Run products of signed bytes, operands in registers; return the operations done.

    Two for each product: a multiplication and an addition in 32 bits.
    """
    return float(_kernels().multiply_bytes(operations_per_thread))


def multiply_tiles(flops_per_thread: float) -> float:
    """Run products of bfloat16 tiles, one tile loaded from L1 for each; return the FLOP done.

    0 where the active instruction set has no tiles.
    """
    return float(_kernels().multiply_tiles(flops_per_thread))


def compiler() -> str | None:
    """The compiler that built the extension; None where the extension is not loaded."""
    return None if _native.C is None else str(_native.C.compiler)


def _kernels() -> ModuleType:
    if _native.C is None:
        raise RuntimeError("logra_kernels.ops.limits: the C++ kernels are not loaded")
    return _native.C
