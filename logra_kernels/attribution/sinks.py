"""Where a group's scores go during a scan: the whole matrix, a running top k, or sigma alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.influence_result import InfluenceResult
from logra_kernels.attribution.norms import ShardNorms
from logra_kernels.attribution.plan import Plan
from logra_kernels.attribution.reading import Block
from logra_kernels.rows import PlaneRows, powers_of_two, scores, share, topk_scores

Terms = tuple[Tensor | None, Tensor | None]  # row_scale and row_bias of the ops, [R] float32 each
Upload = Callable[[np.ndarray], Tensor]  # brings a small array from the host to the device


class GroupScores(ABC):
    """One group's scores; `row_weights` [N] float32, if given, multiply them."""

    def __init__(self, plan: Plan, upload: Upload, row_weights: np.ndarray | None = None) -> None:
        self.plan = plan
        self._row_weights = row_weights
        self._bands = plan.bands()
        self._upload = upload
        self._zero_rows: int | None = None
        self._unit = 0  # row scales are 2**unit too large
        self._factors: list[Tensor] | None = None

    def add(self, block: Block, norms: ShardNorms | None) -> None:
        """Score a block's rows; `norms` are its shard's, None for a mode without."""
        scale, bias = self._terms(block, norms)
        rows = block.rows
        # Rows in bit planes are rotated, and so are scored in all columns.
        if isinstance(rows, Tensor) and self.plan.columns != slice(0, rows.shape[1]):
            rows = rows[:, self.plan.columns]
        for band, (_, exponent) in enumerate(self._bands):
            scaled = bias * 2.0**-exponent if bias is not None and exponent else bias
            self._take(band, rows, (scale, scaled), block.first_row)

    def result(
        self, query_ids: list[str], row_ids: Sequence[str], dampings: dict[str, float]
    ) -> InfluenceResult:
        """The scores of all rows that were added."""
        result = InfluenceResult(self.plan.mode, query_ids, row_ids, dampings, self._zero_rows)
        self._put(result)
        return result

    @abstractmethod
    def _take(self, band: int, rows: Tensor | PlaneRows, terms: Terms, first_row: int) -> None:
        """Score rows for the queries of a band."""

    @abstractmethod
    def _put(self, result: InfluenceResult) -> None: ...

    def _terms(self, block: Block, norms: ShardNorms | None) -> Terms:
        packed = block.shard.row_scale
        plain = None if packed is None else packed[block.here]
        if norms is None:
            return self._weighted(block, plain), None
        members, bias = self.plan.members, self.plan.mode == "l2"
        values, zero = norms.terms(members, block.here, bias=bias)
        self._zero_rows = (self._zero_rows or 0) + int(np.count_nonzero(zero))
        if bias:
            return self._weighted(block, plain), self._weighted(block, values)
        # The packed row's scale is in its score and in its norm, and cancels.
        self._unit = norms.unit(members)
        return self._weighted(block, values), None

    def _weighted(self, block: Block, values: np.ndarray | None) -> Tensor | None:
        """Values of a block's rows, [R], times the rows' weights; None stands for ones."""
        if self._row_weights is not None:
            first = block.first_row
            weights = self._row_weights[first : first + block.rows.shape[0]]
            values = weights if values is None else values * weights
        return None if values is None else self._upload(values)

    def _true_scale(self) -> list[Tensor]:
        """Factors [Q, 1] that bring scores to their true scale, each of which float32 can hold."""
        if self._factors is None:
            exponent = self.plan.exponents[:, None] - self._unit
            self._factors = powers_of_two(exponent) if bool(exponent.any()) else []
        return self._factors


class FullMatrix(GroupScores):
    """The scores of all rows, [Q, N] float32 on the CPU; without `num_rows` N grows."""

    def __init__(
        self,
        plan: Plan,
        upload: Upload,
        num_rows: int = 0,
        row_weights: np.ndarray | None = None,
    ) -> None:
        super().__init__(plan, upload, row_weights)
        self._scores = torch.empty(plan.queries.shape[0], num_rows)
        self._end = num_rows

    def _take(self, band: int, rows: Tensor | PlaneRows, terms: Terms, first_row: int) -> None:
        members, _ = self._bands[band]
        values = scores(self.plan.queries[members], rows, *terms)  # [members, R]
        for factor in self._true_scale():
            values *= factor[members]
        self._end = max(self._end, first_row + rows.shape[0])
        held = self._scores.shape[1]
        if self._end > held:
            # Memory that nothing was written to yet is not taken from the system.
            grown = self._scores.new_empty(len(self._scores), max(self._end, 2 * held))
            grown[:, :held] = self._scores
            self._scores = grown
        self._scores[members, first_row : first_row + rows.shape[0]] = values.cpu()

    def _put(self, result: InfluenceResult) -> None:
        result.scores = self._scores[:, : self._end].contiguous()


class TokenShares(GroupScores):
    """What each token of a row adds to the row's score, [Q, T] float32 on the CPU for each row.

    A score is the sum over tokens of products with the plan's queries, times the row's factor.
    """

    def __init__(self, plan: Plan, upload: Upload) -> None:
        super().__init__(plan, upload)
        self.products = torch.empty(0)  # of the plan's queries and the next rows' tokens, [Q, R, T]
        self.shares: list[Tensor] = []

    def _take(self, band: int, rows: Tensor | PlaneRows, terms: Terms, first_row: int) -> None:
        here, self.products = self.products.split(
            [len(rows), self.products.shape[1] - len(rows)], dim=1
        )
        scale, _ = terms
        values = here.float() if scale is None else here.float() * scale[:, None]
        for factor in self._true_scale():
            values = values * factor[..., None]
        self.shares += values.cpu().unbind(1)

    def _put(self, result: InfluenceResult) -> None:
        result.token_scores = self.shares


class TopK(GroupScores):
    """The k largest and the k smallest scores; memory does not grow with the number of rows."""

    def __init__(
        self, plan: Plan, upload: Upload, k: int, row_weights: np.ndarray | None = None
    ) -> None:
        super().__init__(plan, upload, row_weights)
        self._k = k
        self._states: list[Any] = [None] * len(self._bands)

    def _take(self, band: int, rows: Tensor | PlaneRows, terms: Terms, first_row: int) -> None:
        queries, state = self.plan.queries[self._bands[band][0]], self._states[band]
        self._states[band] = topk_scores(queries, rows, self._k, *terms, state, first_row)

    def _put(self, result: InfluenceResult) -> None:
        top, top_rows, bottom, bottom_rows = (
            self._of_all(parts) for parts in zip(*self._states, strict=True)
        )
        for factor in self._true_scale():
            top, bottom = top * factor, bottom * factor
        # With fewer rows than k, the last places are no row's.
        found = [part[:, : len(result.row_ids)].cpu() for part in (top, top_rows)]
        result.top_scores, result.top_rows = found
        found = [part[:, : len(result.row_ids)].cpu() for part in (bottom, bottom_rows)]
        result.bottom_scores, result.bottom_rows = found

    def _of_all(self, parts: tuple[Tensor, ...]) -> Tensor:
        """[Q, k] from the bands' [members, k]."""
        whole = parts[0].new_empty(self.plan.queries.shape[0], self._k)
        for (members, _), part in zip(self._bands, parts, strict=True):
            whole[members] = part
        return whole


class SelfInfluence:
    """Sigma of all rows, per group [N] float64."""

    def __init__(self, members: Mapping[str, list[int]], num_rows: int) -> None:
        self._members = members
        self.values = {name: torch.empty(num_rows, dtype=torch.float64) for name in members}

    def add(self, block: Block, norms: ShardNorms | None) -> None:
        """Square a block's norms."""
        assert norms is not None
        self.put(block.first_row, norms, block.here)

    def put(self, first_row: int, norms: ShardNorms, here: slice) -> None:
        """Square a shard's norms of the rows `here`, which the store counts from `first_row`."""
        for name, members in self._members.items():
            sigma = norms.true_norms(members, here) ** 2
            self.values[name][first_row : first_row + len(sigma)] = share(sigma)


class Sink(Protocol):
    """What a scan gives the blocks of rows."""

    def add(self, block: Block, norms: ShardNorms | None) -> None:
        """Use a block's rows; `norms` are its shard's, None for a scan without."""
