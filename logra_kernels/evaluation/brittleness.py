"""Brittleness: what a model loses with the examples that a method calls the most valuable.

Source: Ilyas et al. 2022, "Datamodels", §4.1; Choe et al. 2024, §4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from logra_kernels.evaluation.lds import RESAMPLES


@dataclass(frozen=True)
class Brittleness:
    """How much the queries' losses rose without their most valuable examples."""

    value: float  # the mean over queries
    low: float  # 95 % interval: bootstrap over queries
    high: float
    per_query: np.ndarray  # [Q]

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def brittleness(
    before: np.ndarray, after: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Brittleness:
    """The mean change of each query's loss, with its own first examples left out.

        kept = without_top(ranking, num_examples, k)
        everything = np.ones((1, num_examples), bool)
        before = retrain(train, everything, seeds, folder)[0]
        brittleness(before, retrain(train, kept, seeds, folder))

    Any other measure of a query may stand for its loss, such as 1 where its answer is right.

    Args:
        before: [R, Q], each query's loss under R models that were trained on all examples.
        after: [Q, R, Q]; after[q] is of models that were trained without query q's first examples.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: shapes that do not fit, or no query.
    """
    if before.ndim != 2 or not before.size:
        raise ValueError(f"before: expected [R, Q], got {list(before.shape)}")
    count = before.shape[1]
    if after.ndim != 3 or not after.size or (after.shape[0], after.shape[2]) != (count, count):
        raise ValueError(f"after: expected [{count}, R, {count}], got {list(after.shape)}")
    per_query = after.mean(axis=1).diagonal() - before.mean(axis=0)
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    means = per_query[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975]) if resamples else (0.0, 0.0)
    return Brittleness(float(per_query.mean()), float(low), float(high), per_query)


def without_top(ranking: np.ndarray, num_examples: int, k: int) -> np.ndarray:
    """[Q, num_examples] bool: all examples but the first k of each query's ranking (brittleness).

    Args:
        ranking: [Q, K] indices of examples, the most valuable first; K >= k.
        num_examples: N.
        k: how many are left out; 0 keeps all.

    Raises: ValueError for k beyond the ranking, or an index that is no example's.
    """
    if not 0 <= k <= ranking.shape[1]:
        raise ValueError(f"k: expected 0 to {ranking.shape[1]}, the ranking's length, got {k}")
    if ranking.size and not 0 <= ranking.min() <= ranking.max() < num_examples:
        raise ValueError(f"ranking: expected indices from 0 to {num_examples - 1}")
    kept = np.ones((len(ranking), num_examples), bool)
    np.put_along_axis(kept, ranking[:, :k], False, axis=1)
    return kept
