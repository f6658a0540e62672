# mypy: allow-untyped-defs
# a kernel's arguments are Triton's values, which have no Python types
"""What the kernels share: the matrix product over mixed types, tile sizes, launch checks."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton._launch import is_recording

# triton.knobs, which reads the same variable, is younger than the oldest triton in use (3.2)
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

# the interpreter keeps bfloat16 as raw uint16: its products are garbage unless cast to float32
_UPCAST = tl.constexpr(INTERPRETED)

PRECISIONS = ("ieee", "tf32", "bf16x6")

# A kernel's counts (of rows, tokens, queries) change from call to call: it is not compiled anew for
# those that happen to be one, or a multiple of 16. Strides are 64 bits wide.


@triton.jit
def _mma(a, b, acc, TRANSPOSED: tl.constexpr):
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if TRANSPOSED:
        a = tl.trans(a)
    return tl.dot(a, b, acc)


@triton.jit
def _split_dot(a, b, acc, TRANSPOSED: tl.constexpr):
    A_PIECES: tl.constexpr = 1 if a.dtype == tl.bfloat16 else (2 if a.dtype == tl.float16 else 3)
    B_PIECES: tl.constexpr = 1 if b.dtype == tl.bfloat16 else (2 if b.dtype == tl.float16 else 3)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    a0 = a.to(tl.bfloat16)
    b0 = b.to(tl.bfloat16)
    a_rest = a - a0.to(tl.float32)
    b_rest = b - b0.to(tl.float32)
    a1 = a_rest.to(tl.bfloat16)
    b1 = b_rest.to(tl.bfloat16)
    # smallest first
    if A_PIECES == 3:
        acc = _mma((a_rest - a1.to(tl.float32)).to(tl.bfloat16), b0, acc, TRANSPOSED)
    if B_PIECES == 3:
        acc = _mma(a0, (b_rest - b1.to(tl.float32)).to(tl.bfloat16), acc, TRANSPOSED)
    if A_PIECES > 1 and B_PIECES > 1:
        acc = _mma(a1, b1, acc, TRANSPOSED)
    if A_PIECES > 1:
        acc = _mma(a1, b0, acc, TRANSPOSED)
    if B_PIECES > 1:
        acc = _mma(a0, b1, acc, TRANSPOSED)
    return _mma(a0, b0, acc, TRANSPOSED)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr):
    # no early return: the compiler would read what follows it, too
    if a.dtype == b.dtype and a.dtype != tl.float32:
        acc = _mma(a, b, acc, TRANSPOSED)
    elif a.dtype == b.dtype and PRECISION != "bf16x6":
        acc = tl.dot(tl.trans(a) if TRANSPOSED else a, b, acc, input_precision=PRECISION)
    else:
        acc = _split_dot(a, b, acc, TRANSPOSED)
    return acc


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; a [M, K], b [K, N] float16, bfloat16 or float32, mixed or not.

    One half type on both sides goes to the tensor cores as it is. Two float32 operands follow
    PRECISION. Every other pair is split into bfloat16 pieces, whose products are exact: float16 is
    two pieces, float32 three (24 bits); products of weight 2**-24 and below are left out.
    """
    return _dot(a, b, acc, PRECISION, False)


@triton.jit
def dot_of_transposed(a, b, acc, PRECISION: tl.constexpr):
    """acc + a^T @ b of a [K, M], which is split as it lies and transposed then: its copies from
    memory stay 16 bytes wide."""
    return _dot(a, b, acc, PRECISION, True)


def check(**tensors: Tensor | None) -> None:
    """Every tensor on one GPU (or the CPU under the interpreter), in a type the kernels take."""
    device = next(t.device for t in tensors.values() if t is not None)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
        if tensor.device.type != "cuda" and not (INTERPRETED or is_recording()):
            raise RuntimeError(
                f"{name}: the Triton kernels need a tensor on a GPU, got one on {tensor.device}; "
                "set TRITON_INTERPRET=1 before Python starts to interpret them on the CPU"
            )


def check_floating(**tensors: Tensor | None) -> None:
    check(**tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (
            torch.float16,
            torch.bfloat16,
            torch.float32,
        ):
            raise TypeError(
                f"{name}: expected float16, bfloat16 or float32, got {str(tensor.dtype)[6:]}"
            )


def precision(input_precision: str | None) -> str:
    """How two float32 operands are multiplied.

    None asks torch: "ieee" where torch.get_float32_matmul_precision() is "highest", as it is unless
    the user changes it, else "tf32".
    """
    if input_precision is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if input_precision not in PRECISIONS:
        raise ValueError(
            f"input_precision: expected one of {', '.join(PRECISIONS)}, got {input_precision!r}"
        )
    return input_precision


def types_of(a: Tensor, b: Tensor, input_precision: str) -> str:
    """The class of a product's operands, as the table of heuristics names it."""
    if a.dtype != b.dtype:
        return "split"
    if a.dtype != torch.float32:
        return "half"
    return {"ieee": "full", "tf32": "tf32", "bf16x6": "split"}[input_precision]


def last_axis_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def as_bytes(mask: Tensor) -> Tensor:
    """mask, of any type -> uint8, 1 where it is not zero."""
    return (mask if mask.dtype == torch.bool else mask != 0).view(torch.uint8)


def tile(size: int, largest: int) -> int:
    """The power of two in [16, largest] that covers size; tl.dot takes no axis below 16."""
    return max(16, min(largest, triton.next_power_of_2(size)))
