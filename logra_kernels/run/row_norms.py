"""Norms of rows that are logged in few bits: the rows as stored do not tell them afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from logra_kernels.store import RowLayout, SelfInfluenceCache, Store

KEY, PILOT = "sigma-pilot", "the pilot"


class RowNorms:
    """√sigma of each row and module under the pilot's curvature and damping, float32.

    A row of an eigenbasis is whitened by both, so this is the norm of its columns.

    Args:
        layout: the columns of a row.
        store: whose norms to go on with.
        seen: its first rows, whose norms it keeps.
    """

    def __init__(self, layout: RowLayout, store: Store, seen: int) -> None:
        self._layout = layout
        self._values = np.zeros((seen, len(layout)), np.float32)
        cache = norms_cache(store)
        for index, shard in enumerate(store.shards):
            if shard.first_row < seen:
                found = cache.read(index) * shard.row_scale[:, None]
                self._values[shard.first_row : shard.first_row + shard.num_rows] = found

    def add(self, places: Sequence[int], rows: Tensor) -> None:
        """Keep the norms of rows [n, D] float32, which have these places in the store."""
        if not len(places):
            return
        parts = self._layout.split(rows.cpu().double())
        norms = np.stack([part.norm(dim=1).numpy() for part in parts], axis=1)  # [n, M]
        more = max(places) + 1 - len(self._values)
        if more > 0:  # twice the memory, so that it seldom moves
            self._values = np.pad(self._values, ((0, more + len(self._values)), (0, 0)))
        self._values[list(places)] = norms

    def save(self, store: Store) -> None:
        """Write the norms of all rows beside them."""
        cache = norms_cache(store)
        for index, shard in enumerate(store.shards):
            here = slice(shard.first_row, shard.first_row + shard.num_rows)
            scale = shard.row_scale[:, None]
            norms = self._values[here]
            cache.write(index, np.divide(norms, scale, out=np.zeros_like(norms), where=scale > 0))


def norms_cache(store: Store) -> SelfInfluenceCache:
    """Where a store keeps them."""
    meta = {
        "quantity": "sqrt(sigma)",
        "unit_exponents": [0] * len(store.layout),
        "curvature": PILOT,
        "dampings": {},
    }
    return store.self_influence_cache(KEY, meta)


def norms_of_first(store: Store, rows: int) -> bool:
    """Whether a store keeps the norms of so many of its first rows."""
    missing = norms_cache(store).missing()
    return not missing or store.shards[missing[0]].first_row >= rows
