"""Running top k and bottom k of the scores; ties go to the lower row id."""

import torch
from torch import Tensor

from logra_kernels.reference.scores import scores

State = tuple[Tensor, Tensor, Tensor, Tensor]


def topk_scores(
    queries: Tensor,
    rows: Tensor,
    k: int,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    state: State | None = None,
    row_offset: int = 0,
) -> State:
    """(top_scores [Q, k], top_ids [Q, k], bottom_scores [Q, k], bottom_ids [Q, k]).

    Row r has the id row_offset + r. Best first: by score, then by lower id. Where there are fewer
    than k rows the rest is -inf (+inf at the bottom) with id -1. A NaN score is never selected.
    """
    return fold(scores(queries, rows, row_scale, row_bias), k, state, row_offset)


def fold(values: Tensor, k: int, state: State | None, row_offset: int) -> State:
    """The scores [Q, R] of rows with ids from row_offset on, folded into `state`."""
    ids = torch.arange(row_offset, row_offset + values.shape[1], device=values.device)
    ids = ids.expand(values.shape)  # [Q, R]
    kept: tuple[Tensor | None, ...] = state or (None, None, None, None)
    top = _select(values, ids, k, kept[0], kept[1], sign=1.0)
    bottom = _select(values, ids, k, kept[2], kept[3], sign=-1.0)
    return (*top, *bottom)


def _select(
    values: Tensor,
    ids: Tensor,
    k: int,
    old_values: Tensor | None,
    old_ids: Tensor | None,
    sign: float,
) -> tuple[Tensor, Tensor]:
    padding = values.new_full((values.shape[0], k), -sign * torch.inf)
    last = ids.new_full((values.shape[0], k), -1)
    values = torch.cat([v for v in (old_values, values, padding) if v is not None], dim=1)
    ids = torch.cat([i for i in (old_ids, ids, last) if i is not None], dim=1)
    ids = torch.where(values.isnan(), -1, ids)
    key = torch.where(ids < 0, -torch.inf, sign * values)
    # two stable sorts: by id, padding last, then by score
    order = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).argsort(dim=1, stable=True)
    best = key.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, :k]
    order = order.gather(1, best)
    ids = ids.gather(1, order)
    return torch.where(ids < 0, -sign * torch.inf, values.gather(1, order)), ids
