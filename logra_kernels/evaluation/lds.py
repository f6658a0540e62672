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
    predicted = values @ subsets.T.astype(np.float64)  # [Q, S]
    actual = -losses.mean(axis=1).T  # [Q, S]
    per_query = spearman(predicted, actual)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for n in range(resamples):
        queries = generator.integers(len(values), size=len(values))
        models = generator.integers(len(subsets), size=len(subsets))
        some = np.ix_(queries, models)
        means[n] = _mean(spearman(predicted[some], actual[some]))
    low, high = np.quantile(means[np.isfinite(means)], [0.025, 0.975]) if resamples else (0.0, 0.0)
    return Lds(_mean(per_query), float(low), float(high), _ceiling(losses), per_query)


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
