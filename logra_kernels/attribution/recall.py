"""How many of the best rows a list of candidates misses, judged by rows that were scored twice.

A row's exact score f is taken to be offset + slope · c + spread · z, with c its coarse score and z
normal. The three numbers are fitted for each query to the rows that lead the coarse ranking at its
two ends, for there errors decide: under "dot" they grow with the row. f is predicted from c, and
those rows were chosen by c, so the choice does not bias the fit. A row that is no candidate is
missed if its f exceeds the last of the k exact scores that are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL_QUANTILE = 1.96  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class ErrorModel:
    """f = offset + slope · c + spread · z for each query, [Q, 1] float64 each."""

    offset: Tensor
    slope: Tensor
    spread: Tensor
    freedom: int  # degrees of freedom that `spread` has

    @classmethod
    def fit(cls, coarse: Tensor, exact: Tensor) -> ErrorModel:
        """Least squares over scores [Q, n] of the same rows."""
        c, f = coarse.double(), exact.double()
        middle, level = c.mean(dim=1, keepdim=True), f.mean(dim=1, keepdim=True)
        size = (c - middle).square().sum(dim=1, keepdim=True)
        slope = ((c - middle) * (f - level)).sum(dim=1, keepdim=True) / size
        rest = f - level - slope * (c - middle)
        freedom = max(1, c.shape[1] - 2)
        spread = (rest.square().sum(dim=1, keepdim=True) / freedom).sqrt()
        # Below what float32 tells apart, scores are equal.
        spread = spread.clamp(min=0) + 2.0**-24 * f.abs().amax(dim=1, keepdim=True)
        return cls(level - slope * middle, slope, spread, freedom)

    def reversed(self) -> ErrorModel:
        """The model of the negated scores."""
        return ErrorModel(-self.offset, self.slope, self.spread, self.freedom)

    def chances(self, coarse: Tensor, last: Tensor, stretch: float = 1.0) -> Tensor:
        """[Q, n] float64: how likely f exceeds last [Q, 1] for coarse scores [Q, n].

        1 for a query whose coarse scores say nothing of the exact ones.
        """
        expected = self.offset + self.slope * coarse.double()
        z = (last - expected) / (stretch * self.spread)
        chance = 0.5 * torch.special.erfc(z / math.sqrt(2))
        return torch.where((self.slope > 0) & z.isfinite(), chance, 1.0)

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
    """One end of the coarse rankings, best first; at the bottom all scores are negated."""

    listed: Tensor  # coarse scores [Q, L], falling
    sample: Tensor  # coarse scores [Q, S] of random rows
    num_rows: int

    def missed(self, model: ErrorModel, last: Tensor, stretch: float = 1.0) -> Tensor:
        """[Q, L + 1] float64: the rows expected to be missed with the first 0 … L as candidates."""
        chances = model.chances(self.listed, last, stretch)
        tails = chances.flip(1).cumsum(1).flip(1)  # [Q, L]
        rest = self.num_rows - self.listed.shape[1]
        beyond = chances.new_zeros(len(chances), 1)
        if rest:
            ends = self.listed[:, -1:]
            of_sample = model.chances(self.sample, last, stretch)
            below = self.sample < ends
            mean = (of_sample * below).sum(dim=1) / below.sum(dim=1)
            # Without a sampled row behind the list, every row there counts as its last.
            mean = torch.where(below.any(dim=1), mean, chances[:, -1])
            beyond = rest * mean[:, None]
        return torch.cat([tails + beyond, beyond], dim=1)


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
