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

    def chances(self, rows: Scored, last: Tensor, stretch: float = 1.0) -> Tensor:
        """[Q, n] float64: how likely f exceeds last [Q, 1] for rows of these coarse scores.

        1 for a query whose coarse scores say nothing of the exact ones.
        """
        z = (last - self.slope * rows.scores.double()) / (stretch * self.spread * rows.sizes)
        chance = 0.5 * torch.special.erfc(z / math.sqrt(2))
        return torch.where((self.slope > 0) & ~z.isnan(), chance, 1.0)

    def stretches(self) -> tuple[float, float]:
        """The 95 % interval of the true spread, in units of the fitted one."""
        n = self.freedom
        low, high = (
            n * max(1e-3, 1 - 2 / (9 * n) + sign * NORMAL_QUANTILE * math.sqrt(2 / (9 * n))) ** 3
            for sign in (-1, 1)
        )  # of chi-square, by Wilson and Hilferty
        return math.sqrt(n / high), math.sqrt(n / low)


@dataclass(frozen=True)
class Scored:
    """Rows of coarse scores [Q, n], and their sizes [Q, n] or [n] float64."""

    scores: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class CoarseEnd:
    """One end of the coarse rankings, best first; at the bottom all scores are negated.

    A row whose coarse score is -inf has no chance.
    """

    listed: Scored  # L rows, falling
    sample: Scored  # random rows
    ends: Tensor  # the score with which the list ends, [Q, 1]
    num_rows: int

    def missed(self, model: ErrorModel, last: Tensor, stretch: float = 1.0) -> Tensor:
        """[Q, L + 1] float64: how many rows behind the first 0 … L likely exceed `last`."""
        chances = model.chances(self.listed, last, stretch)
        tails = chances.flip(1).cumsum(1).flip(1)  # [Q, L]
        rest = self.num_rows - self.listed.scores.shape[1]
        beyond = chances.new_zeros(len(chances), 1)
        if rest:
            of_sample = model.chances(self.sample, last, stretch)
            below = self.sample.scores < self.ends
            mean = (of_sample * below).sum(dim=1) / below.sum(dim=1)
            # Without a sampled row behind the list, every row there counts as its last.
            mean = torch.where(below.any(dim=1), mean, chances[:, -1])
            beyond = rest * mean[:, None]
        return torch.cat([tails + beyond, beyond], dim=1)

    def lost(self, model: ErrorModel, kept: Tensor, stretch: float = 1.0) -> float:
        """How many of the exact scores kept [Q, k], falling, are expected not to be the k best.

        Rows whose exact scores are known have no chance here.
        """
        k, total = kept.shape[1], 0.0
        for place in range(k):
            at = kept[:, place : place + 1].double()
            above = self.missed(model, at, stretch)[:, :1]
            room = torch.full_like(above, k - place)  # one more than may exceed it
            total += float((1 - torch.special.gammaincc(room, above)).sum())
        return total


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
