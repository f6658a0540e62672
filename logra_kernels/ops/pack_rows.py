"""Rows as fp16 with power-of-two scales, and back."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from logra_kernels._checks import FLOATS, expect_same_device, expect_sizes, operand
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view

# 2**exponent is a normal float32, so that it can be folded into a query
MIN_EXPONENT, MAX_EXPONENT = -126, 127


def pack_rows(
    rows: Tensor, module_sizes: Sequence[int], module_exponents: Sequence[int]
) -> tuple[Tensor, Tensor]:
    r"""Store rows as fp16 with a power-of-two scale each, so that tiny and huge gradients survive.

    .. math:: g_{rd} = \mathrm{packed}_{rd} \cdot a_r \cdot 2^{e(d)}

    with e(d) the fixed exponent of the module that holds column d. a_r puts the row's largest
    element in [2^14, 2^15): 39 powers of two above fp16's smallest subnormal. A row that is all
    zero, or holds a value that is not finite, has scale 1; such a value stays as it is.

    Args:
        rows: ``[R, D]`` float16, bfloat16, float32 or float64.
        module_sizes: the modules' columns, in order; they sum to D.
        module_exponents: an exponent of two per module, -126 to 127.

    Returns:
        packed ``[R, D]`` float16, rounded to nearest even, and row_scale ``[R]`` float32.

    Raises:
        TypeError: another dtype.
        ValueError: sizes that do not sum to D, an exponent out of range or too few.
    """
    return _pack(rows, list(module_sizes), list(module_exponents))


def unpack_rows(
    packed: Tensor, row_scale: Tensor, module_sizes: Sequence[int], module_exponents: Sequence[int]
) -> Tensor:
    r"""Turn packed rows back into float32.

    .. math:: g_{rd} = \mathrm{packed}_{rd} \cdot a_r \cdot 2^{e(d)}

    Args:
        packed: ``[R, D]`` float16.
        row_scale: ``[R]`` float32, a.
        module_sizes: the modules' columns, in order; they sum to D.
        module_exponents: an exponent of two per module, -126 to 127.

    Returns:
        ``[R, D]`` float32, rounded once.

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that disagree, sizes that do not sum to D, an exponent out
            of range or too few.
    """
    return _unpack(packed, row_scale, list(module_sizes), list(module_exponents))


def _check_pack(
    rows: Tensor, sizes: list[int], exponents: list[int]
) -> tuple[Tensor, list[int], list[int]]:
    rows = operand("rows", rows, FLOATS, R=None, D=None)
    _check_modules(rows, sizes, exponents)
    return rows, sizes, exponents


def _check_unpack(
    packed: Tensor, row_scale: Tensor, sizes: list[int], exponents: list[int]
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    packed = operand("packed", packed, [torch.float16], R=None, D=None)
    row_scale = operand("row_scale", row_scale, [torch.float32], R=packed.shape[0])
    expect_same_device(packed=packed, row_scale=row_scale)
    _check_modules(packed, sizes, exponents)
    return packed, row_scale, sizes, exponents


def _check_modules(rows: Tensor, sizes: list[int], exponents: list[int]) -> None:
    expect_sizes("module_sizes", sizes, rows.shape[1])
    if len(exponents) != len(sizes):
        raise ValueError(f"module_exponents: expected {len(sizes)}, got {len(exponents)}")
    for exponent in exponents:
        if not MIN_EXPONENT <= exponent <= MAX_EXPONENT:
            raise ValueError(
                f"module_exponents: expected {MIN_EXPONENT} to {MAX_EXPONENT}, got {exponent}"
            )


def _fake_pack(rows: Tensor, sizes: list[int], exponents: list[int]) -> tuple[Tensor, Tensor]:
    packed = rows.new_empty(rows.shape, dtype=torch.float16)
    return packed, rows.new_empty(rows.shape[0], dtype=torch.float32)


def _native_pack(
    c: ModuleType, rows: Tensor, sizes: list[int], exponents: list[int]
) -> tuple[Tensor, Tensor]:
    packed, row_scale = _fake_pack(rows, sizes, exponents)
    c.pack_rows(view(rows), sizes, exponents, pointer(packed), pointer(row_scale))
    return packed, row_scale


def _fake_unpack(
    packed: Tensor, row_scale: Tensor, sizes: list[int], exponents: list[int]
) -> Tensor:
    return packed.new_empty(packed.shape, dtype=torch.float32)


def _native_unpack(
    c: ModuleType, packed: Tensor, row_scale: Tensor, sizes: list[int], exponents: list[int]
) -> Tensor:
    rows = _fake_unpack(packed, row_scale, sizes, exponents)
    c.unpack_rows(view(packed), pointer(row_scale), sizes, exponents, pointer(rows))
    return rows


_pack = register(
    "pack_rows(Tensor rows, int[] module_sizes, int[] module_exponents) -> (Tensor, Tensor)",
    check=_check_pack,
    fake=_fake_pack,
    native=_native_pack,
)
_unpack = register(
    "unpack_rows(Tensor packed, Tensor row_scale, int[] module_sizes, int[] module_exponents) "
    "-> Tensor",
    check=_check_unpack,
    fake=_fake_unpack,
    native=_native_unpack,
)
