"""Most and least influential rows of a stream, in memory that does not grow with it."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logra_kernels._checks import expect_dtype, expect_same_device, expect_shape
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view
from logra_kernels.ops.scores import check_scan
from logra_kernels.reference._dtype import accumulator

LARGEST_ID = 2**63 - 1  # ids are int64
LARGEST_K = 2**31 - 1


class TopK(NamedTuple):
    """Each query's best and worst rows, each `[Q, k]`, the most extreme first.

    Places that no row has filled yet hold id -1, and -inf at the top, +inf at the bottom.
    """

    top_scores: Tensor
    top_ids: Tensor
    bottom_scores: Tensor
    bottom_ids: Tensor


def topk_scores(
    queries: Tensor,
    rows: Tensor,
    k: int,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    state: TopK | tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    row_offset: int = 0,
) -> TopK:
    r"""Fold a block of rows into each query's k highest and k lowest scores.

    .. math:: \operatorname{top}_k \{ (s_{qr}, r) \}, \quad
        s_{qr} = \langle u_q, g_r \rangle \, a_r + b_r

    Ties go to the lower row id, so that the result does not depend on how the rows are cut into
    blocks. A NaN score is never selected.

    Args:
        queries: ``[Q, D]`` float32 (or float64), already preconditioned.
        rows: ``[R, D]`` float16, bfloat16, float32, float64 or int8.
        k: rows to keep at each end, 1 to 2**31 - 1; it may exceed R.
        row_scale: ``[R]`` float32, a; None for 1.
        row_bias: ``[R]`` float32, b; None for 0.
        state: the result of the blocks before, with the same Q and k; None to begin.
        row_offset: the id of the first row, at least 0; the last row's is at most 2**63 - 2.

    Returns:
        `TopK`; scores are float32 (float64 if queries or rows are), ids int64. Large queries and
        rows do not overflow on the way, as `scores` says, and int8 rows are multiplied as there.

    Raises:
        TypeError: another dtype.
        ValueError: k or row_offset out of range; shapes or devices that disagree.

    Source: LoGra (Choe et al. 2024), Eq. 3.
    """
    parts = None if state is None else list(state)
    return TopK(*_call(queries, rows, k, row_scale, row_bias, parts, row_offset))


def _check(
    queries: Tensor,
    rows: Tensor,
    k: int,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    state: list[Tensor] | None = None,
    row_offset: int = 0,
) -> tuple[Any, ...]:
    queries, rows, row_scale, row_bias = check_scan(queries, rows, row_scale, row_bias)
    check_ends(queries, rows.shape[0], k, state, row_offset, accumulator(queries, rows))
    return queries, rows, k, row_scale, row_bias, state, row_offset


def check_ends(
    queries: Tensor,
    num_rows: int,
    k: int,
    state: list[Tensor] | None,
    row_offset: int,
    score_dtype: torch.dtype,
) -> None:
    """Refuses what `num_rows` rows from row_offset on cannot be folded into."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if k > LARGEST_K:
        raise ValueError(f"k: expected at most {LARGEST_K}, got {k}")
    if row_offset < 0:
        raise ValueError(f"row_offset: expected at least 0, got {row_offset}")
    if row_offset > LARGEST_ID - num_rows:
        raise ValueError(f"row_offset: expected ids below 2**63, got {row_offset} + R")
    if state is not None:
        if len(state) != 4:
            raise ValueError(f"state: expected the four tensors of a TopK, got {len(state)}")
        for name, part in zip(TopK._fields, state, strict=True):
            wanted = torch.int64 if name.endswith("ids") else score_dtype
            expect_dtype(f"state.{name}", part, wanted)
            expect_shape(f"state.{name}", part, Q=queries.shape[0], k=k)
            expect_same_device(queries=queries, **{f"state.{name}": part})


def fake_ends(queries: Tensor, k: int, score_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The shapes and dtypes of a TopK."""
    dtypes = (score_dtype, torch.int64) * 2
    return tuple(queries.new_empty(queries.shape[0], k, dtype=dtype) for dtype in dtypes)


def new_ends(queries: Tensor, k: int, state: list[Tensor] | None) -> list[Tensor]:
    """The four tensors that a kernel on the CPU folds rows into: empty, or a copy of `state`."""
    if state is not None:
        return [part.clone(memory_format=torch.contiguous_format) for part in state]
    shape = (queries.shape[0], k)
    best, worst = queries.new_full(shape, -torch.inf), queries.new_full(shape, torch.inf)
    ids = queries.new_full(shape, -1, dtype=torch.int64)
    return [best, ids, worst, ids.clone()]


def _fake(queries: Tensor, rows: Tensor, k: int, *rest: object) -> tuple[Tensor, ...]:
    return fake_ends(queries, k, accumulator(queries, rows))


def _native(
    c: ModuleType,
    queries: Tensor,
    rows: Tensor,
    k: int,
    row_scale: Tensor | None,
    row_bias: Tensor | None,
    state: list[Tensor] | None,
    row_offset: int,
) -> tuple[Tensor, ...]:
    merged = new_ends(queries, k, state)
    c.topk_scores(
        view(queries),
        view(rows),
        k,
        pointer(row_scale),
        pointer(row_bias),
        row_offset,
        *(pointer(part) for part in merged),
    )
    return tuple(merged)


_call = register(
    "topk_scores(Tensor queries, Tensor rows, int k, Tensor? row_scale=None, "
    "Tensor? row_bias=None, Tensor[]? state=None, int row_offset=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    native=_native,
)
