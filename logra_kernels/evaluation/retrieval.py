"""How well scores find examples that are known: flipped labels, the documents behind a fact."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from logra_kernels.evaluation.lds import ranks_of


def mislabelled_auc(values: Any, flipped: Any) -> float:
    """The chance that a mislabelled example has a larger value than a right one.

    Args:
        values: [N], such as `Attributor.self_influence()`.
        flipped: [N] bool, the examples whose label is wrong.

    Raises: ValueError for shapes that differ, or if all or none are flipped.
    """
    found, wrong = np.asarray(values, np.float64), np.asarray(flipped, bool)
    if found.ndim != 1 or found.shape != wrong.shape:
        raise ValueError(
            f"flipped: expected [{len(found)}], one for each value, got {list(wrong.shape)}"
        )
    many = int(wrong.sum())
    if not 0 < many < len(wrong):
        raise ValueError(f"flipped: expected some and not all of {len(wrong)}, got {many}")
    ranks = ranks_of(found[None])[0]  # from 0
    return float((ranks[wrong].sum() - many * (many - 1) / 2) / many / (len(wrong) - many))


def recall_at(ranking: Any, relevant: Sequence[Collection[Any]], k: int) -> np.ndarray:
    """[Q]: the share of each query's relevant examples among the first k of its ranking.

    Args:
        ranking: Q sequences of ids or indices, the most valuable first.
        relevant: the ids or indices that are right for each query, at least one.
        k: how many are looked at; with fewer than the relevant ones, the best is k of them.

    Raises: ValueError for numbers that do not fit, or a query without relevant examples.
    """
    if len(ranking) != len(relevant):
        raise ValueError(
            f"relevant: expected {len(ranking)}, one for each query, got {len(relevant)}"
        )
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    shares = np.empty(len(relevant))
    for n, (order, right) in enumerate(zip(ranking, relevant, strict=True)):
        if not right:
            raise ValueError(f"relevant: query {n} has none")
        shares[n] = len(set(list(order)[:k]) & set(right)) / min(k, len(right))
    return shares
