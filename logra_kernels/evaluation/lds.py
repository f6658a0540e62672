"""The linear datamodeling score: do sums of scores rank retrained models as their losses do?

Source: Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", §2.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Lds:
    """A linear datamodeling score. value: the mean over queries, in −1 … 1."""

    value: float
    low: float  # 95 % interval: bootstrap over subsets and queries
    high: float
    ceiling: float | None  # what a perfect method would reach, for the seeds' noise; None: one seed
    per_query: np.ndarray  # [Q]; NaN for a query whose loss is the same in every model

    def __str__(self) -> str:
        ceiling = "" if self.ceiling is None else f", ceiling {self.ceiling:.2f}"
        return f"LDS {self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{ceiling}"


@dataclass(frozen=True)
class LdsDifference:
    """How much higher one method's LDS is than another's. value: the mean over queries."""

    value: float
    low: float  # 95 % interval: bootstrap over subsets and queries, the same for both methods
    high: float
    per_query: np.ndarray  # [Q]

    def __str__(self) -> str:
        return f"LDS {self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def lds(
    scores: Any,
    subsets: np.ndarray,
    losses: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Lds:
    """Spearman's correlation of Σ_{i in S} score[q, i] with −loss of q under models trained on S.

    Scores are influences (mode "dot"), whose sums mean something: positive lowers the loss.

    Args:
        scores: [Q, N], a tensor or an array.
        subsets: [S, N] bool, the examples that each model was trained on.
        losses: [S, R, Q], as `retrain` gives them; their mean over the R seeds is ranked.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises: ValueError for shapes that do not fit, or fewer than three subsets.
    """
    pairs = _ranked(scores, subsets, losses)
    per_query = spearman(*pairs)
    low, high = _interval(_resampled(*pairs, resamples, seed))
    return Lds(_mean(per_query), low, high, _ceiling(losses), per_query)


def lds_difference(
    scores: Any,
    others: Any,
    subsets: np.ndarray,
    losses: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LdsDifference:
    """How much more `lds` is of scores than of others, and the interval of that.

    Both are judged on the same queries and retrained models, also in each resample of the
    bootstrap, so that what makes a query or a model hard for both cancels. The intervals of two
    methods may overlap where that of their difference is far from 0.

    Args:
        scores, others: [Q, N] of the same queries and examples.
        subsets, losses, resamples, seed: as `lds` takes them.

    Raises: ValueError as `lds`.
    """
    first, second = (_ranked(one, subsets, losses) for one in (scores, others))
    per_query = spearman(*first) - spearman(*second)
    means = _resampled(*first, resamples, seed) - _resampled(*second, resamples, seed)
    return LdsDifference(_mean(per_query), *_interval(means), per_query)


def _ranked(scores: Any, subsets: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[Q, S] each: what the scores predict for each model, and minus the loss that it has."""
    values = np.asarray(scores, np.float64)
    if values.ndim != 2 or subsets.shape != (len(subsets), values.shape[1]):
        raise ValueError(
            f"subsets: expected [S, {values.shape[-1]}] for scores {list(values.shape)}, "
            f"got {list(subsets.shape)}"
        )
    if losses.ndim != 3 or (losses.shape[0], losses.shape[2]) != (len(subsets), len(values)):
        raise ValueError(
            f"losses: expected [{len(subsets)}, R, {len(values)}], got {list(losses.shape)}"
        )
    if len(subsets) < 3:
        raise ValueError(f"subsets: expected at least 3, got {len(subsets)}")
    return values @ subsets.T.astype(np.float64), -losses.mean(axis=1).T


def _resampled(predicted: np.ndarray, actual: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The mean correlation in each resample [resamples]; a seed draws the same of any method."""
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for n in range(resamples):
        queries = generator.integers(len(actual), size=len(actual))
        models = generator.integers(actual.shape[1], size=actual.shape[1])
        some = np.ix_(queries, models)
        means[n] = _mean(spearman(predicted[some], actual[some]))
    return means


def _interval(means: np.ndarray) -> tuple[float, float]:
    finite = means[np.isfinite(means)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(means) else (0.0, 0.0)
    return float(low), float(high)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of a [Q, S] with the same row of b; NaN for a constant row."""
    x, y = (ranks_of(values) for values in (a, b))
    x -= x.mean(axis=1, keepdims=True)
    y -= y.mean(axis=1, keepdims=True)
    size = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    found: np.ndarray = np.divide(
        (x * y).sum(axis=1), size, out=np.full(len(a), np.nan), where=size > 0
    )
    return found


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Ranks of each row, [Q, S] float64; equal values share the mean of their ranks."""
    order = values.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    count = values.shape[1]
    place = np.broadcast_to(np.arange(count, dtype=np.float64), values.shape)
    new = np.ones(values.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    ends = np.ones(values.shape, bool)
    ends[:, :-1] = new[:, 1:]
    backwards = np.where(ends, place, count)[:, ::-1]
    last = np.minimum.accumulate(backwards, axis=1)[:, ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=1)
    return ranks


def _ceiling(losses: np.ndarray) -> float | None:
    """√ of the reliability of the mean over seeds, from how far single seeds agree.

    Spearman-Brown: the mean of R seeds that agree at r has the reliability R r / (1 + (R − 1) r).
    """
    count = losses.shape[1]
    if count < 2:
        return None
    pairs = itertools.combinations(range(count), 2)
    agree = [_mean(spearman(losses[:, a].T, losses[:, b].T)) for a, b in pairs]
    r = max(float(np.mean(agree)), 0.0)
    return float(np.sqrt(count * r / (1 + (count - 1) * r)))


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
