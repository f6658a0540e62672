"""Uncentred second moment of rows, accumulated in place."""

from types import ModuleType

import torch
from torch import Tensor

from logra_kernels._checks import (
    FLOATS,
    WIDE,
    expect_dtype,
    expect_same_device,
    expect_shape,
    operand,
)
from logra_kernels.ops._direct import dense, direct, kernels
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import view


def covariance_update_(cov: Tensor, rows: Tensor) -> Tensor:
    r"""Add the rows' outer products to the lower triangle of a covariance, in place.

    .. math:: C_{ij} \mathrel{+}= \sum_r g_{ri} \, g_{rj} \quad (i \ge j)

    The strict upper triangle is left as it is: mirror it once, when the sum is complete
    (``cov.tril() + cov.tril(-1).T``).

    Args:
        cov: ``[K, K]`` float32 or float64, contiguous; also the accumulator's type. float64
            keeps its digits over millions of rows.
        rows: ``[R, K]`` float16, bfloat16, float32 or float64: projected gradients, or tokens
            for a KFAC factor.

    Returns:
        cov.

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that disagree, a cov that is not contiguous.

    Source: LoGra (Choe et al. 2024), Eq. 3: H = sum of g g^T, its count kept apart.
    """
    if direct(cov, rows) and _direct(cov, rows):
        torch.autograd.graph.increment_version(cov)
        return cov
    _call(cov, rows)
    return cov


def _check(cov: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    expect_dtype("cov", cov, *WIDE)
    rows = operand("rows", rows, FLOATS, R=None, K=None)
    expect_shape("cov", cov, K=rows.shape[1], K_=rows.shape[1])
    expect_same_device(cov=cov, rows=rows)
    if not cov.is_contiguous():
        raise ValueError(f"cov: expected a contiguous tensor, got strides {cov.stride()}")
    return cov, rows


def _check_values(cov: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return cov, rows.clone() if _share_memory(cov, rows) else rows


def _share_memory(cov: Tensor, rows: Tensor) -> bool:
    return cov.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def _direct(cov: Tensor, rows: Tensor) -> bool:
    """False for arguments that take the long way."""
    if (
        cov.dtype not in WIDE
        or not dense(rows, 2)
        or not cov.is_contiguous()
        or _share_memory(cov, rows)
    ):
        return False
    width = rows.shape[1]
    if cov.shape != (width, width):
        return False
    kernels().covariance_update(view(cov), view(rows))
    return True


def _kernel(c: ModuleType, cov: Tensor, rows: Tensor) -> None:
    c.covariance_update(view(cov), view(rows))


_call = register(
    "covariance_update_(Tensor(a!) cov, Tensor rows) -> ()",
    check=_check,
    check_values=_check_values,
    fake=lambda cov, rows: None,
    native=_kernel,
    first_input=1,  # the kernels accumulate into a float64 cov
)
