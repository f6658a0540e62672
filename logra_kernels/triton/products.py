# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""The matrix product that all kernels share, over operands of equal or different types."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton.launch import INTERPRETED

# The interpreter keeps bfloat16 as raw uint16; products of these are garbage, so operands are cast
# to float32 first.
_UPCAST = tl.constexpr(INTERPRETED)

PRECISIONS = ("ieee", "tf32", "bf16x6")


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
    # The smallest products are added first.
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
    # There is no early return, because the compiler would also read the code after it.
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

    Two operands of one half type go to the tensor cores as they are. Two float32 operands follow
    PRECISION. Every other pair of operands is split into bfloat16 pieces, whose products are exact:
    float16 into two pieces, float32 into three (24 bits). Products of weight 2**-24 and below are
    left out.
    """
    return _dot(a, b, acc, PRECISION, False)


@triton.jit
def dot_of_transposed(a, b, acc, PRECISION: tl.constexpr):
    """acc + a^T @ b of a [K, M].

    a is split before it is transposed, so that copies of it from memory stay 16 bytes wide.
    """
    return _dot(a, b, acc, PRECISION, True)


def precision(input_precision: str | None) -> str:
    """How two float32 operands are multiplied.

    None asks torch: "ieee" where torch.get_float32_matmul_precision() is "highest" (torch's
    default), else "tf32".
    """
    if input_precision is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if input_precision not in PRECISIONS:
        raise ValueError(
            f"input_precision: expected one of {', '.join(PRECISIONS)}, got {input_precision!r}"
        )
    return input_precision


def types_of(a: Tensor, b: Tensor, input_precision: str) -> str:
    """The name of a product's operand types in the table of heuristics."""
    if a.dtype != b.dtype:
        return "split"
    if a.dtype != torch.float32:
        return "half"
    return {"ieee": "full", "tf32": "tf32", "bf16x6": "split"}[input_precision]
