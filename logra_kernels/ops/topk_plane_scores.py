"""Most and least influential rows of a stream of rows that are kept as bit planes."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view
from logra_kernels.ops.plane_scores import check_planes
from logra_kernels.ops.topk_scores import TopK, check_ends, fake_ends, new_ends
from logra_kernels.reference._dtype import accumulator


def topk_plane_scores(
    queries: Tensor,
    planes: Sequence[Tensor],
    levels: Tensor,
    k: int,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    state: TopK | tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    row_offset: int = 0,
) -> TopK:
    r"""Fold a block of rows of 1 to 4 bits an element into each query's k highest and k lowest.

    .. math:: \operatorname{top}_k \{ (s_{qr}, r) \}, \quad
        s_{qr} = \langle u_q, c_r \rangle \, a_r + b_r

    Ties go to the lower row id, as in `topk_scores`. A NaN score is never selected.

    Args:
        queries: ``[Q, D]`` float32 (or float64), already preconditioned.
        planes: P tensors ``[R, ceil(D / 8)]`` uint8, as `plane_scores` takes them.
        levels: ``[2**P]`` int8, on the CPU or with the queries: what each code stands for.
        k: rows to keep at each end, 1 to 2**31 - 1; it may exceed R.
        row_scale: ``[R]`` float32, a; None for 1.
        row_bias: ``[R]`` float32, b; None for 0.
        state: the result of the blocks before, with the same Q and k; None to begin.
        row_offset: the id of the first row, at least 0; the last row's is at most 2**63 - 2.

    Returns:
        `TopK`; scores are those of `plane_scores`, ids int64.

    Raises:
        TypeError: another dtype.
        ValueError: not 1 to 4 planes; k or row_offset out of range; shapes or devices that
            disagree.

    Source: LoGra (Choe et al. 2024), Eq. 3.
    """
    parts = None if state is None else list(state)
    return TopK(*_call(queries, list(planes), levels, k, row_scale, row_bias, parts, row_offset))


def _check(
    queries: Tensor,
    planes: list[Tensor],
    levels: Tensor,
    k: int,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    state: list[Tensor] | None = None,
    row_offset: int = 0,
) -> tuple[Any, ...]:
    queries, planes, levels, row_scale, row_bias = check_planes(
        queries, planes, levels, row_scale, row_bias
    )
    check_ends(queries, planes[0].shape[0], k, state, row_offset, accumulator(queries))
    return queries, planes, levels, k, row_scale, row_bias, state, row_offset


def _fake(
    queries: Tensor, planes: list[Tensor], levels: Tensor, k: int, *rest: object
) -> tuple[Tensor, ...]:
    return fake_ends(queries, k, accumulator(queries))


def _native(
    c: ModuleType,
    queries: Tensor,
    planes: list[Tensor],
    levels: Tensor,
    k: int,
    row_scale: Tensor | None,
    row_bias: Tensor | None,
    state: list[Tensor] | None,
    row_offset: int,
) -> tuple[Tensor, ...]:
    merged = new_ends(queries, k, state)
    c.topk_plane_scores(
        view(queries),
        [view(plane) for plane in planes],
        levels.data_ptr(),
        k,
        pointer(row_scale),
        pointer(row_bias),
        row_offset,
        *(pointer(part) for part in merged),
    )
    return tuple(merged)


_call = register(
    "topk_plane_scores(Tensor queries, Tensor[] planes, Tensor levels, int k, "
    "Tensor? row_scale=None, Tensor? row_bias=None, Tensor[]? state=None, int row_offset=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    native=_native,
)
