"""Scores of stored rows against preconditioned queries."""

from types import ModuleType

import torch
from torch import Tensor

from logra_kernels._checks import STORED, WIDE, expect_same_device, operand
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view
from logra_kernels.reference._dtype import accumulator


def scores(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None = None, row_bias: Tensor | None = None
) -> Tensor:
    r"""Score every stored row against every query.

    .. math:: s_{qr} = \langle u_q, g_r \rangle \, a_r + b_r

    With :math:`u_q = (H + \lambda I)^{-1} g_q` this is influence; with
    :math:`a_r = 1/\sqrt{\sigma_r}` it is l-RelatIF.

    Args:
        queries: ``[Q, D]`` float32 (or float64), already preconditioned.
        rows: ``[R, D]`` float16, bfloat16, float32, float64 or int8; a module's columns of a shard
            are read in place.
        row_scale: ``[R]`` float32, a; None for 1.
        row_bias: ``[R]`` float32, b; None for 0.

    Returns:
        ``[Q, R]`` float32, accumulated in float32 (float64 if queries or rows are float64).

        On the CPU a query may be as large as float32 goes: one with elements of 2**64 or more is
        divided by a power of two for the sums, which changes no bit. No sum is then infinite, or
        infinity less infinity, on the way to a score that float32 holds, while D times the largest
        ``|rows|`` is below 2**63: so for all float16 rows. Scaled queries of an `Attributor` keep
        to the same on every device.

        Int8 rows are multiplied in integers: a float32 query is rounded once to multiples of its
        largest ``|element|`` / 32639, and the sum, which is exact, to float32. So the scores have
        the same bits on every instruction set. A query that is not finite scores NaN.

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that disagree.

    Source: LoGra (Choe et al. 2024), Eq. 3; RelatIF (Barshan et al. 2020).
    """
    return _call(queries, rows, row_scale, row_bias)


def check_scan(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None = None, row_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments of `scores`, checked, each with a contiguous last axis."""
    queries = operand("queries", queries, WIDE, Q=None, D=None)
    rows = operand("rows", rows, STORED, R=None, D=queries.shape[1])
    wide = WIDE if torch.float64 in (queries.dtype, rows.dtype) else WIDE[:1]
    if row_scale is not None:
        row_scale = operand("row_scale", row_scale, wide, R=rows.shape[0])
    if row_bias is not None:
        row_bias = operand("row_bias", row_bias, wide, R=rows.shape[0])
    expect_same_device(queries=queries, rows=rows, row_scale=row_scale, row_bias=row_bias)
    return queries, rows, row_scale, row_bias


def _fake(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None, row_bias: Tensor | None
) -> Tensor:
    return queries.new_empty((queries.shape[0], rows.shape[0]), dtype=accumulator(queries, rows))


def _native(
    c: ModuleType, queries: Tensor, rows: Tensor, row_scale: Tensor | None, row_bias: Tensor | None
) -> Tensor:
    out = queries.new_empty((queries.shape[0], rows.shape[0]))
    c.scores(view(queries), view(rows), pointer(row_scale), pointer(row_bias), out.data_ptr())
    return out


_call = register(
    "scores(Tensor queries, Tensor rows, Tensor? row_scale=None, Tensor? row_bias=None) -> Tensor",
    check=check_scan,
    fake=_fake,
    native=_native,
)
