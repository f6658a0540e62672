"""How many of the best rows a list of candidates misses, judged by rows that were scored twice.

A row's exact score f is taken to be slope · c + spread · size · z, with c its coarse score, z
normal, and size what the row's error grows with: the norm of the coarse row, times the factor that
the mode gives its score. Slope and spread are fitted for each query to the rows that lead the
coarse ranking at its two ends. f is predicted from c, and those rows were chosen by c, so the
choice does not bias the fit. The j-th of the k rows that are kept is one of the k best if at most
k - j rows that were not scored exactly exceed it; their number is taken to be Poisson's, of the
mean that the model gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 1e-9  # of the rows that are expected to exceed an exact score
HALVINGS = 24
NORMAL_QUANTILE = 1.96  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class ErrorModel:
    """f = slope · c + spread · size · z for each query, [Q, 1] float64 each."""

    slope: Tensor
    spread: Tensor
    freedom: int  # degrees of freedom that `spread` has

    @classmethod
    def fit(cls, coarse: Tensor, exact: Tensor, sizes: Tensor) -> ErrorModel:
        """Least squares over scores [Q, n] of the same rows, of these sizes [Q, n]."""
        # A row of size 0 has no error, and tells nothing.
        c, f = (torch.where(sizes > 0, one.double() / sizes, 0.0) for one in (coarse, exact))
        slope = (c * f).sum(dim=1, keepdim=True) / c.square().sum(dim=1, keepdim=True)
        freedom = max(1, c.shape[1] - 1)
        spread = ((f - slope * c).square().sum(dim=1, keepdim=True) / freedom).sqrt()
        # Below what float32 tells apart, scores are equal.
        return cls(slope, spread + 2.0**-24 * f.abs().amax(dim=1, keepdim=True), freedom)

    def chances(self, scores: Tensor, sizes: Tensor, last: Tensor, stretch: float = 1.0) -> Tensor:
        """[Q, n] float64: how likely f exceeds last [Q, 1] for coarse scores and sizes [Q, n].

        1 for a query whose coarse scores say nothing of the exact ones.
        """
        z = (last - self.slope * scores.double()) / (stretch * self.spread * sizes)
        chance = 0.5 * torch.special.erfc(z / math.sqrt(2))
        return torch.where((self.slope > 0) & ~z.isnan(), chance, 1.0)

    def of(self, queries: Tensor) -> ErrorModel:
        """The model of some queries, as often as they are named, [P, 1] each."""
        return ErrorModel(self.slope[queries], self.spread[queries], self.freedom)

    def stretches(self) -> tuple[float, float]:
        """The 95 % interval of the true spread, in units of the fitted one."""
        n = self.freedom
        low, high = (
            n * max(1e-3, 1 - 2 / (9 * n) + sign * NORMAL_QUANTILE * math.sqrt(2 / (9 * n))) ** 3
            for sign in (-1, 1)
        )  # of chi-square, by Wilson and Hilferty
        return math.sqrt(n / high), math.sqrt(n / low)


@dataclass(frozen=True)
class CoarseEnd:
    """One end of the coarse rankings: listed rows, best first, then random ones for the rest.

    At the bottom all scores are negated. Row n of query q stands for weights[q, n] rows.
    """

    scores: Tensor  # coarse, [Q, L + S]
    sizes: Tensor  # [Q, L + S] float64
    weights: Tensor  # [Q, L + S] float64; 0 for a row whose exact score is known
    listed: int  # L

    @classmethod
    def of(
        cls,
        listed: tuple[Tensor, Tensor, Tensor],
        sample: tuple[Tensor, Tensor, Tensor],
        num_rows: int,
    ) -> CoarseEnd:
        """From coarse scores, sizes, and whether the exact score is known.

        Args:
            listed: [Q, L] each, by falling scores.
            sample: [Q, S] scores; [S] sizes and known.
            num_rows: of the store.
        """
        (scores, sizes, known), (others, other_sizes, other_known) = listed, sample
        rest = num_rows - scores.shape[1]
        below = (others < scores[:, -1:]).double()  # they stand for the rows that are not listed
        count = below.sum(dim=1, keepdim=True)
        weights = (~known).double()
        # Without a sampled row behind the list, every row there counts as its last.
        weights[:, -1:] += torch.where(count > 0, 0.0, float(rest))
        stands = torch.where(other_known, 0.0, below * rest / count.clamp(min=1))
        return cls(
            torch.cat([scores, others], dim=1),
            torch.cat([sizes, other_sizes.expand(others.shape)], dim=1),
            torch.cat([weights, stands], dim=1),
            scores.shape[1],
        )

    def last(self, model: ErrorModel, k: int, least: Tensor) -> Tensor:
        """[Q, 1] float64: the k-th best exact score as the model expects it, at least `least`.

        It is where k rows are expected to exceed it, found by halving.
        """
        high = (model.slope * self.scores.double() + 8 * model.spread * self.sizes).amax(
            dim=1, keepdim=True
        )
        low = least
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = (self.weights * model.chances(self.scores, self.sizes, middle)).sum(1, True)
            low, high = (
                torch.where(above >= k, middle, low),
                torch.where(above >= k, high, middle),
            )
        return torch.where(low.isfinite(), torch.maximum(low, least), least)

    def missed(self, model: ErrorModel, last: Tensor, stretch: float = 1.0) -> Tensor:
        """[Q, L + 1] float64: how many rows behind the first 0 … L likely exceed `last`."""
        expected = self.weights * model.chances(self.scores, self.sizes, last, stretch)
        behind = expected.flip(1).cumsum(1).flip(1)
        none = behind.new_zeros(len(behind), 1)
        return torch.cat([behind, none], dim=1)[:, : self.listed + 1]

    def lost(self, model: ErrorModel, kept: Tensor, stretch: float = 1.0) -> float:
        """How many of the exact scores kept [Q, k], falling, are expected not to be the k best."""
        k, exact = kept.shape[1], kept.double()
        expected = self.weights * model.chances(self.scores, self.sizes, exact[:, -1:], stretch)
        queries, rows = (expected > NEGLIGIBLE).nonzero(as_tuple=True)  # P of them
        one = (queries, rows)
        scores, sizes, weights = (
            part[one][:, None] for part in (self.scores, self.sizes, self.weights)
        )
        chances = model.of(queries).chances(scores, sizes, exact[queries], stretch)  # [P, k]
        above = torch.zeros_like(exact).index_add_(0, queries, weights * chances)  # [Q, k]
        room = torch.arange(k, 0, -1, dtype=torch.float64).expand(above.shape)  # may exceed, and 1
        return float((1 - torch.special.gammaincc(room, above)).sum())


def poisson_interval(low: float, high: float) -> tuple[float, float]:
    """Of a Poisson number whose mean lies in [low, high]: its 2.5 % and 97.5 % points."""
    return _poisson_quantile(low, 0.025), _poisson_quantile(high, 0.975)


def _poisson_quantile(mean: float, share: float) -> float:
    if mean > 500:
        return max(0.0, mean + math.copysign(NORMAL_QUANTILE, share - 0.5) * math.sqrt(mean))
    number, chance = 0, math.exp(-mean)
    below = chance
    while below < share and number < 1000:
        number += 1
        chance *= mean / number
        below += chance
    return float(number)
