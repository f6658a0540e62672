# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""Running top k and bottom k of the scores on a GPU, in memory that does not grow with the rows.

Each program scores a tile of rows and keeps its best k of both ends. A merge kernel reduces the
tiles' lists, in several passes, to one list per query. The last kernel merges that list with the
running state. A candidate is one int64 key: its high half is the score's bits in an
order-preserving form, its low half the complement of the row's number in its block. The larger key
is the better candidate and no two keys are equal, so neither the tiles nor the order of the merges
matter.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.triton.launch import (
    check,
    choose,
    last_axis_contiguous,
    launch,
)
from logra_kernels.triton.products import precision
from logra_kernels.triton.scores import COUNTS, TILES, Scan, score_tile

State = tuple[Tensor, Tensor, Tensor, Tensor]

_LARGEST_K = 128  # above it the scores of a block of rows are sorted by torch
_WORKSPACE_BYTES = 64 << 20
_STATE_COUNTS = ["num_queries", "old_count", "old_scores_stride", "old_ids_stride"]
_STATE_COUNTS += ["row_offset", "k"]
_SMALLEST_BLOCK = 4096  # rows

_NO_KEY = tl.constexpr(-(2**63))  # padding and NaN: below the key of -inf
# Order and id of an entry without a row, and position of padding: behind those of every row.
_NO_ORDER = tl.constexpr(-(2**31))
_NO_ID = tl.constexpr(2**63 - 1)
_NO_PLACE = tl.constexpr(2**31 - 1)


@triton.jit
def _ordered(score):
    """float32 -> int32 in the same order, with 0.0 and -0.0 equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["keep", *COUNTS])
def _candidates_kernel(
    queries,
    rows,
    query_scale,
    row_scale,
    row_bias,
    keys,  # [2, Q, row tiles, keep] int64
    keep,
    num_queries,
    num_rows,
    dim,
    piece_stride: tl.int64,
    query_stride: tl.int64,
    row_stride: tl.int64,
    row_scale_stride: tl.int64,
    row_bias_stride: tl.int64,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    SELECT: tl.constexpr,  # keep < ROWS
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PLANES: tl.constexpr = 0,
    plane_1=None,
    plane_2=None,
    plane_3=None,
    word_0=None,
    word_1=None,
    word_2=None,
    word_3=None,
):
    query_tiles = tl.cdiv(num_queries, QUERIES)
    row_tiles = tl.cdiv(num_rows, ROWS)
    row_tile = tl.program_id(0) // query_tiles
    q = (tl.program_id(0) % query_tiles) * QUERIES + tl.arange(0, QUERIES)
    r = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = score_tile(
        queries,
        rows,
        query_scale,
        q,
        r,
        num_queries,
        num_rows,
        dim,
        piece_stride,
        query_stride,
        row_stride,
        PIECES,
        PRECISION,
        ROWS,
        QUERIES,
        DIM,
        row_scale,
        row_bias,
        row_scale_stride,
        row_bias_stride,
        PLANES,
        plane_1,
        plane_2,
        plane_3,
        word_0,
        word_1,
        word_2,
        word_3,
    )
    score = tl.trans(acc)  # [QUERIES, ROWS]
    valid = (score == score) & (r < num_rows)[None, :]
    lists = keys + (q.to(tl.int64) * row_tiles + row_tile) * keep  # [QUERIES]
    for side in tl.static_range(2):
        order = _ordered(score if side == 0 else -score)
        key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - r)[None, :]
        key = tl.where(valid, key, _NO_KEY)
        side_lists = lists + side * tl.cast(num_queries, tl.int64) * row_tiles * keep
        if SELECT:
            for i in range(keep):
                best = tl.max(key, axis=1)
                tl.store(side_lists + i, best, mask=q < num_queries)
                key = tl.where(key == best[:, None], _NO_KEY, key)
        else:
            column = tl.arange(0, ROWS)
            tl.store(side_lists[:, None] + column[None, :], key, mask=(q < num_queries)[:, None])


@triton.jit(do_not_specialize=["lists", "count", "groups", "keep"])
def _merge_kernel(
    keys,  # [lists, count] int64
    merged,  # [lists, groups, keep]
    lists,
    count,
    groups,
    keep,
    MERGE: tl.constexpr,
):
    """The best `keep` of each MERGE keys, in order."""
    index = (tl.program_id(0) % groups) * MERGE + tl.arange(0, MERGE)
    source = keys + (tl.program_id(0) // groups).to(tl.int64) * count + index
    key = tl.load(source, mask=index < count, other=_NO_KEY)
    for i in range(keep):
        best = tl.max(key, axis=0)
        tl.store(merged + tl.program_id(0).to(tl.int64) * keep + i, best)
        key = tl.where(key == best, _NO_KEY, key)


@triton.jit
def _beaten_by(order, row_id, position, others_order, others_id, others_position):
    """How many of the others [OTHERS] beat each entry [ENTRIES]."""
    tied = others_order[None, :] == order[:, None]
    earlier = (others_id[None, :] < row_id[:, None]) | (
        (others_id[None, :] == row_id[:, None]) & (others_position[None, :] < position[:, None])
    )
    beats = (others_order[None, :] > order[:, None]) | (tied & earlier)
    return tl.sum(beats.to(tl.int32), axis=1)


@triton.jit
def _new_entry(key, row_offset):
    """Order and id of a key."""
    valid = key != _NO_KEY
    order = tl.where(valid, (key >> 32).to(tl.int32), _NO_ORDER)
    # The low half is subtracted first, because row_offset + 0x7FFFFFFF could overflow.
    return order, tl.where(valid, (0x7FFFFFFF - (key & 0x7FFFFFFF)) + row_offset, _NO_ID)


@triton.jit
def _old_entry(score, row_id, SIGN: tl.constexpr):
    valid = (row_id >= 0) & (score == score)
    return tl.where(valid, _ordered(score * SIGN), _NO_ORDER), tl.where(valid, row_id, _NO_ID)


@triton.jit
def _put(scores, ids, base, rank, score, row_id, k, SIGN: tl.constexpr):
    valid = row_id != _NO_ID
    tl.store(scores + base + rank, tl.where(valid, score, -SIGN * float("inf")), mask=rank < k)
    tl.store(ids + base + rank, tl.where(valid, row_id, -1), mask=rank < k)


@triton.jit(do_not_specialize=_STATE_COUNTS)
def _state_kernel(
    keys,  # [Q, k] int64
    old_scores,  # [Q, old_count]
    old_ids,
    scores,  # [Q, k]
    ids,
    num_queries,
    old_count,
    old_scores_stride: tl.int64,
    old_ids_stride: tl.int64,
    row_offset: tl.int64,
    k,
    SIGN: tl.constexpr,  # 1.0 for the top, -1.0 for the bottom
    NEW: tl.constexpr,
    OLD: tl.constexpr,  # 0: no state
    OTHERS: tl.constexpr,
):
    """One query: an entry's place is the number of entries that beat it.

    Entries without a row come last and are ordered by position, so they fill the places that are
    left. Padding in a block of OTHERS gets a position behind all entries.
    """
    q = tl.program_id(0).to(tl.int64)
    new = tl.arange(0, NEW)
    keys += q * k
    key = tl.load(keys + new, mask=new < k, other=_NO_KEY)
    new_order, new_id = _new_entry(key, row_offset)
    bits = new_order ^ ((new_order >> 31) & 0x7FFFFFFF)
    new_score = bits.to(tl.float32, bitcast=True) * SIGN
    new_rank = tl.zeros((NEW,), dtype=tl.int32)
    # Entries of the old state come first where all else is equal.
    new_position = new + OLD

    if OLD > 0:
        old = tl.arange(0, OLD)
        old_scores += q * old_scores_stride
        old_ids += q * old_ids_stride
        old_score = tl.load(old_scores + old, mask=old < old_count, other=0.0)
        old_order, old_id = _old_entry(
            old_score, tl.load(old_ids + old, mask=old < old_count, other=-1), SIGN
        )
        old_rank = tl.zeros((OLD,), dtype=tl.int32)
        for start in range(0, old_count, OTHERS):
            j = start + tl.arange(0, OTHERS)
            order, row_id = _old_entry(
                tl.load(old_scores + j, mask=j < old_count, other=0.0),
                tl.load(old_ids + j, mask=j < old_count, other=-1),
                SIGN,
            )
            position = tl.where(j < old_count, j, _NO_PLACE)
            old_rank += _beaten_by(old_order, old_id, old, order, row_id, position)
            new_rank += _beaten_by(new_order, new_id, new_position, order, row_id, position)

    for start in range(0, k, OTHERS):
        j = start + tl.arange(0, OTHERS)
        other_key = tl.load(keys + j, mask=j < k, other=_NO_KEY)
        order, row_id = _new_entry(other_key, row_offset)
        position = tl.where(j < k, j + OLD, _NO_PLACE)
        new_rank += _beaten_by(new_order, new_id, new_position, order, row_id, position)
        if OLD > 0:
            old_rank += _beaten_by(old_order, old_id, old, order, row_id, position)

    new_rank = tl.where(new < k, new_rank, k)
    _put(scores, ids, q * k, new_rank, new_score, new_id, k, SIGN)
    if OLD > 0:
        old_rank = tl.where(old < old_count, old_rank, k)
        _put(scores, ids, q * k, old_rank, old_score, old_id, k, SIGN)


class _End(NamedTuple):
    """One end of the running state: the best scores of each query, or the worst, and their rows."""

    scores: Tensor  # [Q, count]
    ids: Tensor
    sign: float  # 1.0 for the top, -1.0 for the bottom

    def empty(self, *shape: int) -> "_End":
        return _End(self.scores.new_empty(shape), self.ids.new_empty(shape), self.sign)

    def merged(self, keys: Tensor, k: int, row_offset: int) -> "_End":
        """This end and the rows of keys [Q, k], by the kernel: k entries."""
        num_queries, old_count = self.scores.shape
        scores = torch.empty(num_queries, k, device=keys.device, dtype=torch.float32)
        ids = torch.empty(num_queries, k, device=keys.device, dtype=torch.int64)
        old_scores, old_ids = last_axis_contiguous(self.scores), last_axis_contiguous(self.ids)
        launch(
            _state_kernel,
            ("num_queries",),
            keys,
            choose("state_topk", "half", keys),
            keys=keys,
            old_scores=old_scores,
            old_ids=old_ids,
            scores=scores,
            ids=ids,
            num_queries=num_queries,
            old_count=old_count,
            old_scores_stride=old_scores.stride(0),
            old_ids_stride=old_ids.stride(0),
            row_offset=row_offset,
            k=k,
            SIGN=self.sign,
            NEW=triton.next_power_of_2(k),
            OLD=triton.next_power_of_2(old_count) if old_count else 0,
        )
        return _End(scores, ids, self.sign)

    def sorted(self, scores: Tensor, k: int, row_offset: int) -> "_End":
        """This end and the rows of scores [Q, R], by torch, for a k too large for the kernel."""
        ids = torch.arange(row_offset, row_offset + scores.shape[1], device=scores.device)
        ids = torch.cat((self.ids, ids.expand(scores.shape)), dim=1)
        scores = torch.cat((self.scores, scores), dim=1)
        missing = max(0, k - scores.shape[1])
        scores = torch.nn.functional.pad(scores, (0, missing), value=-self.sign * torch.inf)
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        none = scores.isnan() | (ids < 0)
        # Two stable sorts: by id with empty places last, then by score.
        order = torch.where(none, torch.iinfo(torch.int64).max, ids).argsort(dim=1, stable=True)
        better = torch.where(none, -torch.inf, self.sign * scores).gather(1, order)
        order = order.gather(1, better.argsort(dim=1, descending=True, stable=True)[:, :k])
        none = none.gather(1, order)
        scores = torch.where(none, -self.sign * torch.inf, scores.gather(1, order))
        return _End(scores, torch.where(none, -1, ids.gather(1, order)), self.sign)


def topk_scores(
    queries: Tensor,
    rows: Tensor,
    k: int,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    state: Sequence[Tensor] | None = None,
    row_offset: int = 0,
    *,
    input_precision: str | None = None,
) -> State:
    """(top_scores, top_ids, bottom_scores, bottom_ids), each [Q, k]; state is what a call returned.

    Row r has the id row_offset + r. The total order is score, then lower id. NaN is never selected.
    Places without a row hold -inf (+inf at the bottom) and id -1.
    """
    scan = Scan.of(queries, rows, row_scale, row_bias, precision(input_precision))
    return topk_of(scan, k, state, row_offset)


def topk_of(scan: Scan, k: int, state: Sequence[Tensor] | None, row_offset: int) -> State:
    """`topk_scores` of a scan."""
    num_queries, (num_rows, _), device = scan.num_queries, scan.rows.shape, scan.rows.device
    if state is None:
        no_scores = torch.empty(num_queries, 0, device=device, dtype=torch.float32)
        state = (no_scores, no_scores.long()) * 2
    check(rows=scan.rows, **{f"state[{i}]": tensor for i, tensor in enumerate(state)})
    ends = [_End(state[0], state[1], 1.0), _End(state[2], state[3], -1.0)]
    if num_queries == 0 or k == 0:
        return _state(end.empty(num_queries, k) for end in ends)
    by_sort = max(k, *(tensor.shape[1] for tensor in state)) > _LARGEST_K
    # A row of the block takes its keys at both ends, or its scores and the memory that sorts them.
    row_bytes = (64 if by_sort else 16) * num_queries
    block = max(_SMALLEST_BLOCK, _WORKSPACE_BYTES // row_bytes)
    for first in range(0, max(num_rows, 1), block):
        some, offset = scan.of_rows(first, first + block), row_offset + first
        if by_sort:
            scores = some.scores()
            ends = [end.sorted(scores, k, offset) for end in ends]
        else:
            best = _merged(_candidates(some, k), k)
            ends = [end.merged(keys, k, offset) for end, keys in zip(ends, best, strict=True)]
    return _state(ends)


def _state(ends: Iterable[_End]) -> State:
    top, bottom = ends
    return top.scores, top.ids, bottom.scores, bottom.ids


def _candidates(scan: Scan, k: int) -> Tensor:
    """Keys of the best k rows of each tile of rows at both ends: [2, Q, tiles, min(k, tile)]."""
    num_rows, device = scan.rows.shape[0], scan.rows.device
    config = scan.config("topk_scores")
    tiles = triton.cdiv(num_rows, config["ROWS"])
    keep = min(k, config["ROWS"])
    keys = torch.empty(2, scan.num_queries, tiles, keep, device=device, dtype=torch.int64)
    if num_rows > 0:
        arguments = scan.product() | scan.epilogue()
        arguments |= {"keys": keys, "keep": keep, "SELECT": keep < config["ROWS"]}
        launch(_candidates_kernel, TILES, scan.rows, config, **arguments)
    return keys


def _merged(keys: Tensor, k: int) -> Tensor:
    """Keys [2, Q, lists, keys in a list] -> the best k of all lists, in order: [2, Q, k]."""
    num_queries = keys.shape[1]
    config = choose("merge_topk", "half", keys)
    groups = None
    while groups != 1:  # once at least: the result must be k wide and in order
        count = keys.shape[2] * keys.shape[3]
        groups = max(1, triton.cdiv(count, config["MERGE"]))
        merged = torch.empty(2, num_queries, groups, k, device=keys.device, dtype=torch.int64)
        launch(
            _merge_kernel,
            ("lists", "groups"),
            keys,
            config,
            keys=keys,
            merged=merged,
            lists=2 * num_queries,
            count=count,
            groups=groups,
            keep=k,
        )
        keys = merged
    return keys[:, :, 0]
