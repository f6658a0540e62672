"""Scores of rows that are kept as bit planes against preconditioned queries."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from logra_kernels._checks import WIDE, expect_same_device, operand
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view
from logra_kernels.reference._dtype import accumulator

MOST_PLANES = 4

Planes = tuple[Tensor, list[Tensor], Tensor, Tensor | None, Tensor | None]


def plane_scores(
    queries: Tensor,
    planes: Sequence[Tensor],
    levels: Tensor,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
) -> Tensor:
    r"""Score rows of 1 to 4 bits an element against every query.

    .. math:: s_{qr} = \langle u_q, c_r \rangle \, a_r + b_r, \quad
        c_{rd} = \text{levels}\Big[\sum_p 2^{P-1-p} \, \text{bit}_{p,r,d}\Big]

    Element d of a row's plane is bit d % 8, the least significant first, of byte d // 8. Bits
    beyond D are not looked at. The first planes of a store are rows of fewer bits.

    Args:
        queries: ``[Q, D]`` float32 (or float64), already preconditioned.
        planes: P tensors ``[R, ceil(D / 8)]`` uint8, the highest bit of the codes first; each is
            read in place, whatever lies between its rows.
        levels: ``[2**P]`` int8, on the CPU or with the queries: what each code stands for.
        row_scale: ``[R]`` float32, a; None for 1.
        row_bias: ``[R]`` float32, b; None for 0.

    Returns:
        ``[Q, R]`` float32 (float64 if queries are).

        A float32 query is rounded once, to multiples of its largest ``|element|`` / 127: one byte
        an element. Sums of products of bytes are exact, and then rounded to float32 once, so the
        scores have the same bits on every instruction set, device, number of threads and split. A
        query that is not finite scores NaN. Large queries do not overflow, as in `scores`.

    Raises:
        TypeError: another dtype.
        ValueError: not 1 to 4 planes; shapes or devices that disagree.

    Source: LoGra (Choe et al. 2024), Eq. 3; RelatIF (Barshan et al. 2020).
    """
    return _call(queries, list(planes), levels, row_scale, row_bias)


def check_planes(
    queries: Tensor,
    planes: list[Tensor],
    levels: Tensor,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
) -> Planes:
    """The arguments of `plane_scores`, checked, each with a contiguous last axis."""
    queries = operand("queries", queries, WIDE, Q=None, D=None)
    if not 1 <= len(planes) <= MOST_PLANES:
        raise ValueError(f"planes: expected 1 to {MOST_PLANES} tensors, got {len(planes)}")
    width, num_rows = (queries.shape[1] + 7) // 8, None
    checked: list[Tensor] = []
    for number, given in enumerate(planes):
        plane = operand(f"planes[{number}]", given, (torch.uint8,), R=num_rows, B=width)
        num_rows = plane.shape[0]
        checked.append(plane)
        expect_same_device(queries=queries, **{f"planes[{number}]": plane})
    levels = operand("levels", levels, (torch.int8,), levels=2 ** len(planes))
    if levels.device.type != "cpu":
        expect_same_device(queries=queries, levels=levels)
    wide = WIDE if queries.dtype == torch.float64 else WIDE[:1]
    if row_scale is not None:
        row_scale = operand("row_scale", row_scale, wide, R=num_rows)
    if row_bias is not None:
        row_bias = operand("row_bias", row_bias, wide, R=num_rows)
    expect_same_device(queries=queries, row_scale=row_scale, row_bias=row_bias)
    return queries, checked, levels, row_scale, row_bias


def _fake(queries: Tensor, planes: list[Tensor], *rest: object) -> Tensor:
    shape = (queries.shape[0], planes[0].shape[0])
    return queries.new_empty(shape, dtype=accumulator(queries))


def _native(
    c: ModuleType,
    queries: Tensor,
    planes: list[Tensor],
    levels: Tensor,
    row_scale: Tensor | None,
    row_bias: Tensor | None,
) -> Tensor:
    out = queries.new_empty((queries.shape[0], planes[0].shape[0]))
    views = [view(plane) for plane in planes]
    scales = pointer(row_scale), pointer(row_bias)
    c.plane_scores(view(queries), views, levels.data_ptr(), *scales, out.data_ptr())
    return out


_call = register(
    "plane_scores(Tensor queries, Tensor[] planes, Tensor levels, Tensor? row_scale=None, "
    "Tensor? row_bias=None) -> Tensor",
    check=check_planes,
    fake=_fake,
    native=_native,
)
