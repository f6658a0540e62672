"""The basis in which a store holds its rows: modules' exponents, whitening, rotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from logra_kernels.store.codecs import Encoded, RowCodec
from logra_kernels.store.errors import StoreError
from logra_kernels.store.layout import RowLayout
from logra_kernels.store.rotation import Rotation


class Basis:
    """Turns rows g into what the codec holds of them, t, and back.

    Without whitening and rotation t is g, and the codec knows the modules' exponents itself.
    Otherwise g = 2**exponents[m] · L_m (Rᵀ t)_m in module m, with R the rotation and L_m [K, K]
    lower triangular; where one of them is not there, it is the identity.

    Args:
        layout: the modules of g.
        exponents: one per module; none stand for zeros.
        seed: of the rotation; None for no rotation.
        whitening: {module name: L_m float32}; modules that are not in it have the identity.

    Raises:
        StoreError: a factor of another shape, not finite, or singular.
    """

    def __init__(
        self,
        layout: RowLayout,
        exponents: Sequence[int] = (),
        seed: int | None = None,
        whitening: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.layout = layout
        self.exponents = list(exponents) or [0] * len(layout)
        self.rotation = None if seed is None else Rotation(layout.dim, seed)
        self._factors: dict[int, np.ndarray] = {}  # L_m, float64
        self._inverses: dict[int, np.ndarray] = {}
        for i, module in enumerate(layout):
            if module.name in (whitening or {}):
                assert whitening is not None
                self._factors[i] = _factor(module.name, whitening[module.name], module.size)

    @property
    def plain(self) -> bool:
        """Whether t is g."""
        return self.rotation is None and not self._factors

    def encode(self, codec: RowCodec, rows: np.ndarray) -> Encoded:
        """Rows g [n, D] float32 as the codec stores them; see `RowCodec.encode`."""
        if self.plain:
            return codec.encode(rows, self.layout, self.exponents)
        with np.errstate(invalid="ignore"):  # of rows that are not finite
            return codec.encode(self._forward(rows), self.layout, [0] * len(self.layout))

    def decode(
        self,
        codec: RowCodec,
        stored: np.ndarray,
        row_scale: np.ndarray | None,
        row_exponents: np.ndarray | None,
    ) -> np.ndarray:
        """g [n, D] float32 of what `encode` gave."""
        if self.plain:
            return codec.decode(stored, row_scale, row_exponents, self.layout, self.exponents)
        assert row_scale is not None
        wide = self.original(codec.elements(stored, self.layout))  # [n, D]
        wide *= row_scale[:, None].astype(np.float64)
        wide *= self._powers
        with np.errstate(over="ignore"):
            return wide.astype(np.float32)

    def original(self, elements: np.ndarray) -> np.ndarray:
        """L Rᵀ t [n, D] float64 for stored elements t [n, D]: g without its exponents."""
        wide = elements.astype(np.float32, copy=False)
        if self.rotation is not None:
            wide = self.rotation.inverse(wide)
        wide = wide.astype(np.float64)
        for i, factor in self._factors.items():
            columns = self.layout.columns[i]
            wide[:, columns] = wide[:, columns] @ factor.T
        return wide

    def fold(self, queries: np.ndarray) -> np.ndarray:
        """R Lᵀ 2**exponents q for queries q [Q, D] float64: what gives with t what q does with g.

        Without whitening and rotation it is 2**exponents q.
        """
        folded = queries * self._powers
        for i, factor in self._factors.items():
            columns = self.layout.columns[i]
            folded[:, columns] = folded[:, columns] @ factor
        return folded if self.rotation is None else self.rotation.forward(folded)

    @property
    def _powers(self) -> np.ndarray:
        """2**exponent of each column, [D] float64."""
        return np.repeat(np.ldexp(np.ones(len(self.layout)), self.exponents), self.layout.sizes)

    def coordinates(self, rows: np.ndarray) -> np.ndarray:
        """t [n, D] float64 of rows g, to float64's rounding; the codec gets it from float32."""
        wide: np.ndarray = rows.astype(np.float64) / self._powers
        self._whiten(wide)
        return wide if self.rotation is None else self.rotation.forward(wide)

    def _whiten(self, rows: np.ndarray) -> None:
        """L⁻¹ of each module's columns [n, D] float64, in place."""
        for i, factor in self._factors.items():
            columns = self.layout.columns[i]
            if i not in self._inverses:
                self._inverses[i] = np.linalg.inv(factor)
            rows[:, columns] = rows[:, columns] @ self._inverses[i].T

    def _forward(self, rows: np.ndarray) -> np.ndarray:
        """t [n, D] float64 of rows g. A row is rotated in float32, its largest element near 1."""
        wide: np.ndarray = rows / self._powers  # exact
        self._whiten(wide)
        if self.rotation is None:
            return wide
        unit = np.frexp(np.abs(wide).max(axis=1, keepdims=True))[1]  # [n, 1]
        rotated = self.rotation.forward(np.ldexp(wide, -unit).astype(np.float32))
        turned: np.ndarray = np.ldexp(rotated.astype(np.float64), unit)
        return turned


def _factor(name: str, factor: np.ndarray, size: int) -> np.ndarray:
    """L of a module as float64."""
    if factor.dtype != np.float32 or factor.shape != (size, size):
        raise StoreError(
            f"whitening: module {name!r}: expected float32 [{size}, {size}], got {factor.dtype} "
            f"{list(factor.shape)}"
        )
    wide = np.tril(factor.astype(np.float64))
    if not (np.isfinite(factor).all() and (np.diag(wide) > 0).all()):
        raise StoreError(
            f"whitening: module {name!r}: expected a finite factor with a positive diagonal"
        )
    return wide
