"""The statistics of a run beside its curvature: fed module by module, and kept in the store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from logra_kernels.curvature import Statistic
from logra_kernels.projection import ModuleProjection
from logra_kernels.rows import stored_rows
from logra_kernels.run.logged_rows import LoggedRows
from logra_kernels.run.row_norms import norms_of_first
from logra_kernels.run.statistic import Setup, stored_name
from logra_kernels.store import RowLayout, Store

BLOCK_ROWS = 256  # of a store, that a statistic sees at a time


class Accumulated:
    """One kind of statistic of one tensor, an object for each module.

    Args:
        tensor: "grad", "forward" or "backward".
        statistic: the class.
        layout: the columns of a row.
        projections: of the modules.
        parts: {module name: what it has seen so far}; None: nothing.
    """

    def __init__(
        self,
        tensor: str,
        statistic: type[Statistic],
        layout: RowLayout,
        projections: Mapping[str, ModuleProjection],
        parts: Mapping[str, Statistic] | None = None,
    ) -> None:
        self.tensor, self.name = tensor, stored_name(tensor, statistic)
        self._layout, self._sizes = layout, _sizes(tensor, layout, projections)
        self.parts = dict(parts or {n: statistic(size) for n, size in self._sizes.items()})

    def add_rows(self, rows: Tensor) -> None:
        """Add rows [R, D] float32 as stored, for "grad"."""
        for part, columns in zip(self.parts.values(), self._layout.split(rows), strict=True):
            if len(columns):
                part.update(columns)

    def add_tokens(self, logged: LoggedRows) -> None:
        """Add the tokens that count, for the other tensors."""
        if logged.tokens is None:
            raise RuntimeError(f"statistic: '{self.name}' was asked for inside the pass")
        for name, part in self.parts.items():
            vectors = logged.tokens.of(name, "expand", logged.places)[self.tensor == "backward"]
            if vectors.dtype == torch.int64:
                raise ValueError(
                    f"statistic: '{self.name}': module {name} has one-hot inputs; project them, or "
                    "leave the module out"
                )
            if len(vectors):
                part.update(vectors.detach().cpu())

    def add_store(self, store: Store) -> None:
        """Add every row of a store, for "grad"."""
        for _, rows, row_scale, row_exponents in store.blocks(BLOCK_ROWS):
            self.add_rows(stored_rows(store, rows, row_scale, row_exponents))

    def save(self, store: Store) -> None:
        """Write what was seen into the store."""
        tensors: dict[str, np.ndarray] = {}
        for name, part in self.parts.items():
            for key, value in part.save().items():
                tensors[f"{name}/{key}"] = value.detach().cpu().numpy()
        store.save_curvature(self.name, tensors, {"statistic": self.name})


def load_statistic(
    store: Store,
    tensor: str,
    statistic: type[Statistic],
    projections: Mapping[str, ModuleProjection],
) -> dict[str, Statistic]:
    """{module name: the statistic that a store keeps}.

    Raises: ValueError if it keeps none of the name, or the class cannot read it.
    """
    name = stored_name(tensor, statistic)
    if name not in store.curvatures:
        raise ValueError(f"{store.path}: keeps no statistic '{name}'")
    own: dict[str, dict[str, Tensor]] = {module.name: {} for module in store.layout}
    for place, value in store.load_curvature(name)[0].items():
        module, _, key = place.rpartition("/")
        own.setdefault(module, {})[key] = torch.from_numpy(np.array(value))
    found: dict[str, Statistic] = {}
    for module, size in _sizes(tensor, store.layout, projections).items():
        try:
            found[module] = statistic.load(size, own[module])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{store.path}: statistic '{name}' of module '{module}' cannot be read: {error!r}"
            ) from error
    return found


def _sizes(
    tensor: str, layout: RowLayout, projections: Mapping[str, ModuleProjection]
) -> dict[str, int]:
    if tensor == "grad":
        return {module.name: module.size for module in layout}
    side = "ki" if tensor == "forward" else "ko"
    return {module.name: getattr(projections[module.name], side) for module in layout}


def rows_seen(store: Store, setup: Setup) -> int:
    """How many of a store's first rows all sums have seen that its rows do not make anew."""
    names = setup.made_once(store.codec)
    kept = store.curvatures
    found = {kept[name]["rows"] if name in kept else 0 for name in names} or {store.num_rows}
    seen = int(found.pop()) if len(found) == 1 else 0
    return seen if store.codec.faithful or norms_of_first(store, seen) else 0
