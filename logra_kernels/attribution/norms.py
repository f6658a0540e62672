"""Norms of the rows, found beside the store or computed, and what they make of a row's score.

The norm of a row g in one module is |W g| = sqrt(sigma) ("sigma") or |(H + λI)⁻¹ g| ("theta").
Norms are kept of the row as it lies in the file, for the row's own scale is in its score too and
cancels; and in units of 2**units[m] for module m. So they fit float32 whatever the size of the
gradients; a norm fits where its square would not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.reading import Block, ShardRows
from logra_kernels.capture.short_examples import ShortRows
from logra_kernels.curvature import Preconditioner
from logra_kernels.curvature.whitening import Whitening
from logra_kernels.rows import powers_of_two
from logra_kernels.store import SelfInfluenceCache, Store, StoreError

# What a mode divides a row's score by.
NORM_OF_MODE = {
    "dot": None,
    "l-relatif": "sigma",
    "l2": "sigma",
    "theta-relatif": "theta",
    "whitened-cosine": "sigma",
}

RowTerms = tuple[np.ndarray, np.ndarray]

# A sum of squares outside these has lost bits to float32's range, or is about to.
SMALLEST_SQUARE, LARGEST_SQUARE = 2.0**-90, 2.0**100
LARGEST_UNIT = 1000  # of a cache that was written for another curvature: 2**unit is a float64


class Norms:
    """One kind of norm for all rows of a store, or for rows in memory.

    Args:
        preconditioner: gives W.
        norm: "sigma" or "theta".
        module_exponents: of the rows' file; a true gradient is 2**exponent times the stored one.
        device: where rows and W meet.
        store: keeps the norms beside its rows; None for rows in memory, whose norms are not kept.
        remember: keep in memory what scans make of known norms, 5 bytes a row and group.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        norm: str,
        module_exponents: Sequence[int],
        device: torch.device,
        store: Store | None = None,
        remember: bool = False,
    ) -> None:
        self._preconditioner = preconditioner
        self._norm = norm
        self._device = device
        self._store = store
        self._remember = remember
        self._whitenings: list[Whitening] | None = None
        # W is divided by 2**unit; the module's exponent in the file is multiplied in afterwards.
        factor_units = preconditioner.units(norm)
        self._units = [e + u for e, u in zip(module_exponents, factor_units, strict=True)]
        self._memory: dict[int, np.ndarray] = {}  # shard -> norms that could not be written
        self._remembered: dict[int, ShardNorms] = {}
        # What the norms are of, if they are others than were asked for.
        self.said: str | None = None
        self._cache: SelfInfluenceCache | None = None
        self._missing: set[int] = set()  # shards without norms beside the store
        if store is not None:
            meta = {
                "quantity": {"sigma": "sqrt(sigma)", "theta": "|(H + lambda I)^-1 g|"}[norm],
                "unit_exponents": self._units,
                "curvature": preconditioner.kind,
                "dampings": preconditioner.dampings,
            }
            self._cache = store.self_influence_cache(f"{norm}-{preconditioner.key}", meta)
            self.look_again()

    @property
    def whitenings(self) -> list[Whitening]:
        """W of each module, on the device."""
        if self._whitenings is None:
            whitenings = self._preconditioner.whitenings(self._norm)
            self._whitenings = [whitening.to(self._device) for whitening in whitenings]
        return self._whitenings

    def look_again(self) -> None:
        """Find out which norms lie beside the store, if files came or went since the last time."""
        if self._cache is not None and self._cache.changed():
            self._missing = set(self._cache.missing())
            self._remembered.clear()

    def settle(self) -> None:
        """Take the norms that came with rows of few bits, where they are of another damping.

        Those of the decoded rows are not those of the rows: few bits add their error to them. A
        warning, and `said`, say which ones are used.
        """
        store = self._store
        if store is None or store.codec.faithful or not self._missing:
            return
        self.said = f"{self._norm} of the decoded rows"
        for key, meta in store.self_influence_keys():
            units = _unit_exponents(meta, len(store.layout))
            if units is None or not key.startswith(f"{self._norm}-"):
                continue
            cache = store.self_influence_cache(key, meta)
            if not cache.missing():
                self._cache, self._missing, self._units = cache, set(), units
                of = meta.get("curvature")
                self.said = f"{self._norm} of the rows under {of!r} and the damping it came with"
                break
        warnings.warn(
            f"{store.path}: rows in {store.dtype} do not tell their {self._norm} under this "
            f"curvature and damping; the scores are divided by the {self.said}",
            stacklevel=4,
        )

    def known(self, index: int) -> bool:
        """Whether an earlier scan left the norms of the store's shard `index`."""
        in_file = self._cache is not None and index not in self._missing
        return in_file or index in self._memory

    def of_shard(self, rows: ShardRows) -> ShardNorms:
        """A shard's norms: known ones, or room for those that `compute` will find."""
        if not self.known(rows.index):
            fresh = np.empty((rows.num_rows, len(self._units)), np.float32)
            return ShardNorms(lambda: fresh, rows.row_scale, self._units, fresh=True)
        if not self._remember:
            known = self._load(rows.index)
            return ShardNorms(lambda: known, rows.row_scale, self._units)
        if rows.index not in self._remembered:
            self._remembered[rows.index] = ShardNorms(
                lambda: self._load(rows.index), rows.row_scale, self._units, made={}
            )
        return self._remembered[rows.index]

    def of_rows(
        self, shards: Sequence[tuple[ShardRows, np.ndarray]], members: Sequence[int], *, bias: bool
    ) -> ShardNorms | None:
        """The norms of rows of several shards, each with the places of its rows in it.

        They have the terms of these members alone, in the order of the rows; None where the norms
        of a shard are not known.
        """
        if not all(self.known(rows.index) for rows, _ in shards):
            return None
        whole = [
            (self.of_shard(rows).terms(members, slice(0, rows.num_rows), bias=bias), places)
            for rows, places in shards
        ]
        values, zero = (
            np.concatenate([terms[i][places] for terms, places in whole]) for i in range(2)
        )
        none = np.empty((0, len(self._units)), np.float32)
        made = {(bias, *members): (values, zero)}
        return ShardNorms(lambda: none, None, self._units, made=made)

    def compute(self, block: Block, norms: ShardNorms) -> None:
        """Find the norms of a block's rows, while they are in cache, unless they are known.

        Raises:
            ValueError: a norm of a store's row is not finite; names the row and the module.
        """
        if not norms.fresh:
            return
        layout, rows = self._preconditioner.layout, block.shard.elements(block.rows)
        found = torch.empty(rows.shape[0], len(layout), device=rows.device)
        for i, columns in enumerate(layout.split(rows)):
            found[:, i] = _norm(columns, self.whitenings[i], block.short(layout.names[i]))
        values = found.cpu().numpy()
        if norms.row_scale is not None:
            values[norms.row_scale[block.here] == 0] = 0  # whatever the codes of such a row say
        finite = np.isfinite(values)
        if self._store is not None and not finite.all():
            row, module = (int(v) for v in np.argwhere(~finite)[0])
            raise ValueError(
                f"row '{self._store.ids[block.first_row + row].as_py()}': its self-influence in "
                f"module '{layout.names[module]}' is not finite"
            )
        norms.values[block.here] = values

    def keep(self, index: int, norms: ShardNorms) -> None:
        """Keep a shard's computed norms beside the store, or in memory if they cannot be written.

        So an interrupted scan leaves the norms of the shards that it finished.
        """
        if self._cache is None or not norms.fresh:
            return
        faithful = self._store is not None and self._store.codec.faithful
        if not self._memory and faithful:  # after one refusal no other shard is tried
            try:
                self._cache.write(index, norms.values)
                self._missing.discard(index)
                return
            except (OSError, StoreError) as error:
                warnings.warn(f"self-influence is not kept beside the store: {error}", stacklevel=2)
        self._memory[index] = norms.values

    def adopt(self, rows: ShardRows, norms: np.ndarray) -> None:
        """Keep norms [r, M] float64 of a shard's true rows, found elsewhere, beside the store."""
        assert self._cache is not None
        scale = np.ones(rows.num_rows, np.float32) if rows.row_scale is None else rows.row_scale
        units = scale[:, None].astype(np.float64) * np.ldexp(1.0, self._units)  # [r, M]
        found = np.divide(norms, units, out=np.zeros_like(norms), where=units > 0)
        self._cache.write(rows.index, found.astype(np.float32))

    def _load(self, index: int) -> np.ndarray:
        if index in self._memory or self._cache is None:
            return self._memory[index]
        return self._cache.read(index)


@dataclass
class ShardNorms:
    """The norms of one shard's rows, and the terms that they add to scores."""

    load: Callable[[], np.ndarray]  # gives the norms
    row_scale: np.ndarray | None  # [r] float32 powers of two of the rows in the file; None: ones
    units: list[int]  # the norms are in units of 2**units[m]
    fresh: bool = False  # this scan computes them
    made: dict[tuple[int, ...], RowTerms] | None = None  # what `terms` gave, where it is kept

    @property
    def values(self) -> np.ndarray:
        """[r, M] float32; of a fresh shard, what the scan has reached."""
        return self.load()

    def unit(self, members: Sequence[int]) -> int:
        """The power of two in which `terms` gives a group's factors.

        In the middle, for a row may have its norm from any of the modules: float32 holds the factor
        of each as long as their units differ by less than some 250.
        """
        units = [self.units[i] for i in members]
        return (min(units) + max(units)) // 2

    def terms(self, members: Sequence[int], here: slice, *, bias: bool) -> RowTerms:
        """What the norms of some modules do to the scores of the shard's rows `here`.

        Returns: [R] float32 and [R] bool, where the norm is zero. The first is 2**unit / norm, the
        factor of a score, 0 for a zero norm; with `bias`, -sigma / 2 of the true row.
        """
        if self.made is None:
            return self._terms(members, here, bias)
        key = (bias, *members)
        if key not in self.made:
            self.made[key] = self._terms(members, slice(None), bias)
        values, zero = self.made[key]
        return values[here], zero[here]

    def true_norms(self, members: Sequence[int], here: slice) -> np.ndarray:
        """The norm over some modules of the true rows `here`, [R] float64."""
        norm = self._combined(members, here, 0)
        return norm if self.row_scale is None else norm * self.row_scale[here]

    def of_modules(self, here: slice) -> np.ndarray:
        """The norms of the true rows `here` in each module, [R, M] float64."""
        norms = self.values[here] * np.ldexp(1.0, self.units)
        return norms if self.row_scale is None else norms * self.row_scale[here][:, None]

    # NumPy on one thread: a vector of R numbers is not worth waking the others.
    def _terms(self, members: Sequence[int], here: slice, bias: bool) -> RowTerms:
        if bias:
            norm = self.true_norms(members, here)
            with np.errstate(over="ignore"):
                return (-0.5 * norm**2).astype(np.float32), norm == 0
        norm = self._combined(members, here, self.unit(members))
        zero = norm == 0
        inverse = np.divide(1, norm, out=np.zeros_like(norm), where=~zero)
        return inverse.astype(np.float32), zero

    def _combined(self, members: Sequence[int], here: slice, unit: int) -> np.ndarray:
        """The norm over some modules of the rows as in the file, divided by 2**unit."""
        norms = self.values[here]
        if len(members) < len(self.units):
            norms = norms[:, list(members)]
        wide = norms.astype(np.float64)
        wide *= wide
        wide *= np.ldexp(1.0, [2 * (self.units[i] - unit) for i in members])
        # NumPy adds along a contiguous row by its length alone: the bits do not depend on R.
        return np.asarray(np.sqrt(wide.sum(axis=1)))


def _unit_exponents(meta: Any, modules: int) -> list[int] | None:
    """The exponents of a cache's modules; None for a meta that this package does not write."""
    units = meta.get("unit_exponents") if isinstance(meta, dict) else None
    if not isinstance(units, list) or len(units) != modules:
        return None
    good = all(type(unit) is int and abs(unit) <= LARGEST_UNIT for unit in units)
    return units if good else None


def _norm(columns: Tensor, whitening: Whitening, short: ShortRows | None = None) -> Tensor:
    """|W g| of g = columns [R, K], [R] float32; exact to rounding whatever the size of g.

    Of `short` rows the tokens are used.
    """
    if whitening.silent:
        return torch.zeros(columns.shape[0], device=columns.device)
    if short is None:
        square = whitening.squares(columns)
    else:
        square = torch.empty(columns.shape[0], device=columns.device)
        square[short.rows] = whitening.squares_of_tokens(short.inputs, short.outputs, short.ends)
        others = sorted(set(range(len(square))).difference(short.rows))
        if others:
            square[others] = whitening.squares(columns[others])
    norm = square.sqrt()
    odd = (~((square > SMALLEST_SQUARE) & (square < LARGEST_SQUARE))).nonzero()[:, 0]
    if odd.numel():
        part = columns[odd].float()  # [odd, K]
        largest = part.abs().amax(dim=1)
        part, odd, largest = part[largest > 0], odd[largest > 0], largest[largest > 0]
        unit = torch.frexp(largest).exponent
        part = _scale_exponent(part, -unit[:, None])
        norm[odd] = _scale_exponent(whitening.squares(part).sqrt(), unit)
    return norm


def _scale_exponent(values: Tensor, exponent: Tensor) -> Tensor:
    """values * 2**exponent, also where float32 cannot hold 2**exponent."""
    for factor in powers_of_two(exponent):
        values = values * factor
    return values
