"""How far a row's exact score may lie from its coarse one, and which rows may lead for that.

Everything is taken in the basis of the coarse store, in which its queries are folded too. For a
query and a row, with v and w the queries as the finer and the coarse kernel multiply them (exactly
known), t the finer row, r the coarse one, and |·| over the columns of one module m each:

    |<v, t> - <w, r>|  <=  Σ_m |v| |t - r|  +  Σ_m |v - w| |r|                  (Cauchy-Schwarz)

|t - r| and |r| are kept beside the coarse store. The finer kernel adds γ Σ_m |v| |t| in the finer
store's own columns, the coarse one γ Σ_m |w| |r|. γ is n·2⁻²⁴ / (1 - n·2⁻²⁴) with n = D + 8 for
float32 sums in any order (Higham 2002, Accuracy and Stability of Numerical Algorithms, §3.1), and
2⁻²³ for int8 rows and bit planes, whose sums are exact. What a mode does
with the product, a factor and a term for each row, is the finer store's on both sides; its few
roundings in float32 are in SCORE_ROUNDING, and what float32 loses below 2⁻¹²⁶ in SMALLEST.
Everything here is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.norms import Norms, ShardNorms
from logra_kernels.attribution.plan import Plan
from logra_kernels.attribution.reading import Block, ShardRows
from logra_kernels.reference.plane_scores import LARGEST_BYTE
from logra_kernels.reference.scores import LARGEST_NUMBER, whole_numbers
from logra_kernels.rows import scores, share
from logra_kernels.store import RowLayout, SelfInfluenceCache, Store
from logra_kernels.store.codecs import Planes
from logra_kernels.store.residuals import row_units

SCORE_ROUNDING = 2.0**-20  # of a product's way to a score: at most eight roundings of 2**-24
SMALLEST = 2.0**-120  # more than float32 loses of an element of size 1 below its normal range
LARGEST = 2.0**120  # from here on float32 might overflow: such rows are looked at exactly
NORMS_ROUNDING = 1 + 2.0**-16  # of the float32 norms |r|, and of the float64 sums here
FOLD_ROUNDING = 2.0**-30  # of v, which is folded in float64
PAIRS = 1 << 18  # of query and row that are bounded at a time, 2 MiB for each float64
MOST_ENTRIES = 1 << 22  # pairs of query and row that are held; more become rows of all queries


@dataclass(frozen=True)
class Multiplied:
    """Queries as a store's kernel multiplies its rows by them."""

    vectors: Tensor  # [Q, D] float64, for rows as the store holds them, divided by 2**unit
    rounding: float  # of the kernel's sums, relative to Σ |v| |row| over modules
    smallest: Tensor  # what float32's range costs a product, [Q, 1], times the row's scale

    @classmethod
    def of(cls, plan: Plan, store: Store, unit: Tensor) -> Multiplied:
        """A plan's queries; `unit` [Q, 1] is a power of two for each."""
        queries = plan.queries.cpu()
        wide = queries.double()
        dim = queries.shape[1]
        if isinstance(store.codec, Planes) or store.codec.dtype == np.int8:
            most = LARGEST_BYTE if isinstance(store.codec, Planes) else LARGEST_NUMBER
            whole, scale = whole_numbers(queries, most)
            wide, rounding = whole * scale, 2.0**-23
        else:
            share_lost = (dim + 8) * 2.0**-24
            rounding = share_lost / (1 - share_lost) if share_lost < 0.5 else torch.inf
        wide = torch.ldexp(wide, plan.exponents.cpu()[:, None] - unit)
        largest = queries.abs().amax(dim=1, keepdim=True).double().clamp(min=1)
        smallest = torch.ldexp(dim * SMALLEST * largest, plan.exponents.cpu()[:, None] - unit)
        return cls(wide, rounding, smallest)


class FinerTerms:
    """What a mode makes of products with the finer store's rows, by the store's row numbers.

    score = product · gain · 2**-unit + bias, with products of true rows.
    """

    def __init__(
        self,
        shard_rows: Callable[[int], ShardRows],
        norms: Norms | None,
        lengths: Norms,
        plan: Plan,
        store: Store,
    ) -> None:
        self._shard_rows, self._norms, self._plan = shard_rows, norms, plan
        self._lengths = lengths
        self._ends = np.array([shard.first_row + shard.num_rows for shard in store.shards])
        self._bias = plan.mode == "l2"
        self._held: tuple[int, list[np.ndarray]] | None = None
        self.unit = 0

    def __call__(self, start: int, stop: int) -> list[np.ndarray]:
        """Scales, gains, biases, zeros and lengths of rows start … stop, n of them.

        [n] float64 three times, [n] bool for norms of zero, and |t| of each module [n, M] float64.
        """
        parts = []
        while start < stop:
            index = int(np.searchsorted(self._ends, start, side="right"))
            values = self._shard(index)
            first = int(self._ends[index]) - len(values[0])
            here = slice(start - first, min(stop, int(self._ends[index])) - first)
            parts.append([value[here] for value in values])
            start = first + here.stop
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _shard(self, index: int) -> list[np.ndarray]:
        if self._held is None or self._held[0] != index:
            rows = self._shard_rows(index)
            whole, ones = slice(0, rows.num_rows), np.ones(rows.num_rows)
            scale = ones if rows.row_scale is None else rows.row_scale.astype(np.float64)
            gain, bias, zero = ones, np.zeros(rows.num_rows), np.zeros(rows.num_rows, bool)
            if self._norms is not None:
                found = self._norms.of_shard(rows)
                values, zero = found.terms(self._plan.members, whole, bias=self._bias)
                if self._bias:
                    bias = values.astype(np.float64)
                else:
                    gain, self.unit = values / scale, found.unit(self._plan.members)
            lengths = self._lengths.of_shard(rows).of_modules(whole)
            self._held = index, [scale, gain, bias, zero, lengths]
        return self._held[1]


class Frontier:
    """The rows whose scores may be among the k highest of a query, by bounds of all scores."""

    def __init__(self, num_queries: int, k: int) -> None:
        self._k = k
        self._lows = torch.full((num_queries, k), -torch.inf, dtype=torch.float64)  # k highest
        self.least = self._lows[:, -1].clone()  # [Q]: the k-th highest score is at least this
        self.queries = torch.empty(0, dtype=torch.int64)  # of the entries
        self.rows = torch.empty(0, dtype=torch.int64)
        self._highs = torch.empty(0, dtype=torch.float64)
        self._middles = torch.empty(0, dtype=torch.float64)
        self._new: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._waiting = 0

    def __len__(self) -> int:
        """The entries, of which some may have to go."""
        return len(self.rows) + self._waiting

    def add(self, middle: Tensor, radius: Tensor, first_row: int) -> None:
        """Scores [Q, R] float64 of rows from `first_row` on, and how far they may be off."""
        low, high = middle - radius, middle + radius
        joined = torch.cat([self._lows, low], dim=1)
        self._lows = joined.topk(self._k, dim=1).values
        self.least = torch.maximum(self.least, self._lows[:, -1])
        queries, rows = (high >= self.least[:, None]).nonzero(as_tuple=True)
        picked = queries, rows
        self._new.append((queries, rows + first_row, high[picked], middle[picked]))
        self._waiting += len(rows)
        if self._waiting > max(1 << 18, len(self.rows)):
            self.prune()

    def prune(self, least: Tensor | None = None) -> None:
        """Leave out entries that cannot reach `least` [Q], or what is known of it."""
        if least is not None:
            self.least = torch.maximum(self.least, least)
        held = [(self.queries, self.rows, self._highs, self._middles), *self._new]
        queries, rows, highs, middles = (torch.cat(part) for part in zip(*held, strict=True))
        keep = highs >= self.least[queries]
        self.queries, self.rows = queries[keep], rows[keep]
        self._highs, self._middles = highs[keep], middles[keep]
        self._new, self._waiting = [], 0

    def drop(self) -> Tensor:
        """Take out all entries, none of which is waiting; their rows."""
        rows: Tensor = self.rows.unique()
        empty = self.queries[:0]
        self.queries, self.rows = empty, empty
        self._highs = self._middles = self._highs[:0]
        return rows

    def counts(self) -> Tensor:
        """[Q]: the entries of each query."""
        found: Tensor = torch.bincount(self.queries, minlength=len(self.least))
        return found

    def leading(self) -> list[Tensor]:
        """The rows of each query's k entries with the highest scores; none are waiting."""
        order = self.queries.argsort(stable=True)
        found = []
        for entries in order.split(self.counts().tolist()):
            best = self._middles[entries].topk(min(self._k, len(entries))).indices
            found.append(self.rows[entries[best]])
        return found


class BoundedScores:
    """A sink that keeps the rows which may be among the first or the last k of a query.

    Args:
        plan: of the coarse store's scan.
        coarse, finer: the queries as the two stores' kernels multiply them, in units of 2**unit.
        unit: [Q, 1] int32.
        terms: of the finer store.
        kept: |t - r| and |r| of the coarse store's rows.
        stores: the coarse one, and the finer one, whose rows are in their modules' columns.
        k: rows of each end.
    """

    def __init__(
        self,
        plan: Plan,
        coarse: Multiplied,
        finer: Multiplied,
        unit: Tensor,
        terms: FinerTerms,
        kept: tuple[SelfInfluenceCache, SelfInfluenceCache],
        stores: tuple[Store, Store],
        k: int,
    ) -> None:
        num_queries, (store, other) = len(plan.queries), stores
        self.top, self.bottom = Frontier(num_queries, k), Frontier(num_queries, k)
        self.every_query = np.zeros(store.num_rows, bool)  # rows that are looked at in any case
        self.zero_rows = 0
        self._plan, self._terms, self._kept, self._unit = plan, terms, kept, unit
        layout = store.layout
        powers = np.repeat(np.ldexp(1.0, np.negative(other.module_exponents)), layout.sizes)
        true = finer.vectors * share(powers)  # for gradients
        folded = share(store.basis.fold(true.numpy()))  # for coarse rows
        # What |t - r| and |r| of a module are multiplied by, and the |t| of true rows; [Q, M].
        size = _norms(folded, layout)
        self._of_residual = size
        self._of_row = (
            _norms(folded - coarse.vectors, layout)
            + coarse.rounding * _norms(coarse.vectors, layout)
            + FOLD_ROUNDING * size
        )
        self._of_true = finer.rounding * _norms(true, layout)
        self._smallest = coarse.smallest, finer.smallest
        self._shard: tuple[int, list[np.ndarray]] | None = None

    def add(self, block: Block, norms: ShardNorms | None) -> None:
        """Bound the scores of a block's rows."""
        step = max(1, PAIRS // max(1, len(self._plan.queries)))
        for start in range(0, block.rows.shape[0], step):
            self._add(block, start, min(start + step, block.rows.shape[0]))
        if len(self.top) + len(self.bottom) > MOST_ENTRIES:
            for end in (self.top, self.bottom):
                end.prune()
        if len(self.top) + len(self.bottom) > MOST_ENTRIES:
            for end in (self.top, self.bottom):
                self.every_query[end.drop().numpy()] = True

    def _add(self, block: Block, start: int, stop: int) -> None:
        """Bound the scores of rows start … stop of a block."""
        here = slice(block.start + start, block.start + stop)  # in the shard
        first = block.first_row + start
        packed = block.shard.row_scale
        scale = np.ones(stop - start, np.float32) if packed is None else packed[here]
        gaps, lengths = (share(values[here]) for values in self._of_shard(block))  # [R, M]
        own, gain, bias, zero, true = (
            share(part) for part in self._terms(first, first + stop - start)
        )
        self.zero_rows += int(zero.sum())

        scales = share(scale.astype(np.float64))
        products = scores(self._plan.queries, block.some(start, stop), None, None).cpu().double()
        products = products * scales  # [Q, R]
        products = torch.ldexp(products, self._plan.exponents.cpu()[:, None] - self._unit)
        radius = self._of_residual @ gaps.T + self._of_row @ lengths.T
        radius = (radius * share(row_units(scale)) + self._of_true @ true.T) * NORMS_ROUNDING
        radius += self._smallest[0] * scales + self._smallest[1] * own
        # A bound below this says of the kernels' sums that they stay below 2**24 times it.
        safe = radius < LARGEST * 2.0**-24

        exponent = self._unit - self._terms.unit
        factor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
        scored = products * gain
        middle = scored * factor + bias
        radius = radius * gain * factor
        sizes = (scored * factor).abs() + bias.abs() + radius
        radius = radius + SCORE_ROUNDING * sizes + SMALLEST * (1 + factor)
        safe &= (sizes < LARGEST) & (scored.abs() < LARGEST)
        middle = torch.where(safe, middle, 0.0)
        radius = torch.where(safe, radius, torch.inf)
        self.top.add(middle, radius, first)
        self.bottom.add(-middle, radius, first)

    def _of_shard(self, block: Block) -> list[np.ndarray]:
        """|t - r| and |r| of the block's shard, [r, M] float64, divided by the rows' units."""
        if self._shard is None or self._shard[0] != block.shard.index:
            values = [kept.read(block.shard.index).astype(np.float64) for kept in self._kept]
            self._shard = block.shard.index, values
        return self._shard[1]


def _norms(vectors: Tensor, layout: RowLayout) -> Tensor:
    """|v| over the columns of every module, [Q, M] of vectors [Q, D]."""
    parts: Sequence[Tensor] = layout.split(vectors)
    return torch.stack([part.norm(dim=1) for part in parts], dim=1)
