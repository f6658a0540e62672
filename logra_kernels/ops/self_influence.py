"""Self-influence of stored rows."""

from types import ModuleType

from torch import Tensor

from logra_kernels._checks import FLOATS, WIDE, expect_same_device, operand
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import view
from logra_kernels.reference._dtype import accumulator


def self_influence(rows: Tensor, factor: Tensor) -> Tensor:
    r"""Self-influence of one module's rows.

    .. math:: \sigma_r = \lVert W g_r \rVert^2 = g_r^\top (H + \lambda I)^{-1} g_r

    A sum of squares, so that it is never negative.

    Args:
        rows: ``[R, K]`` float16, bfloat16, float32 or float64: one module's columns of a shard,
            read in place.
        factor: ``[M, K]`` float32 (or float64) W with W^T W = (H + lambda I)^-1, for instance the
            inverse of H + lambda I's Cholesky factor.

    Returns:
        ``[R]`` float32, accumulated in float32 (float64 if an argument is float64).

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that disagree.

    Source: RelatIF (Barshan et al. 2020), the denominator of l-RelatIF.
    """
    return _call(rows, factor)


def _check(rows: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    rows = operand("rows", rows, FLOATS, R=None, K=None)
    factor = operand("factor", factor, WIDE, M=None, K=rows.shape[1])
    expect_same_device(rows=rows, factor=factor)
    return rows, factor


def _fake(rows: Tensor, factor: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=accumulator(rows, factor))


def _native(c: ModuleType, rows: Tensor, factor: Tensor) -> Tensor:
    out = factor.new_empty(rows.shape[0])
    c.self_influence(view(rows), view(factor), out.data_ptr())
    return out


_call = register(
    "self_influence(Tensor rows, Tensor factor) -> Tensor",
    check=_check,
    fake=_fake,
    native=_native,
)
