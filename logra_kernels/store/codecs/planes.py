"""Rows of 1, 2 or 4 bits an element: bit planes, the sign's first, and a scale for each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logra_kernels.store.codecs.base import SCALE_DTYPE, Encoded, RowCodec
from logra_kernels.store.errors import StoreError
from logra_kernels.store.layout import RowLayout

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-149, np.finfo(np.float32).max


class Planes(RowCodec):
    """A code of P bits an element, bit p of all codes of a row in file "plane" p.

    element[d] = levels[code[d]], which rise and are antisymmetric. A code is that of the nearest
    level, with levels in units of the row's root mean square: they are the best for rotated rows,
    whose elements are nearly Gaussian (Lloyd and Max). The row's scale is |t|² / <elements, t>, so
    that <decoded row, t> = |t|²: scores have no bias towards zero. Zero rows have the scale 0.

    Args:
        name: the codec's.
        positive: the upper half of the levels, rising; with the lower one at most int8.
        unit: levels that a row's root mean square stands for.
        coarser: the upper half of the levels of the first 1, 2, … P - 1 planes alone, in the same
            units: the mean element of a Gaussian row whose codes begin so, times the factor that
            again makes <decoded row, t> = |t|².
    """

    dtype = np.dtype("u1")
    scaled = True
    version = 2
    rotated = True
    faithful = False
    scales = "positive numbers or 0"

    def __init__(
        self,
        name: str,
        positive: Sequence[int],
        unit: float,
        coarser: Sequence[Sequence[int]] = (),
    ) -> None:
        self.name = name
        self.levels = np.array([*(-level for level in reversed(positive)), *positive], np.int8)
        self.data = tuple(f"plane{p}" for p in range(len(coarser) + 1))
        self._unit = unit
        self._coarser = coarser

    def encode(self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()) -> Encoded:
        """As in RowCodec. A row that is not finite has the scale NaN."""
        factors = np.repeat(np.ldexp(1.0, np.negative(exponents)), layout.sizes)  # [D]
        wide = rows * factors  # [n, D] float64
        largest = np.abs(wide).max(axis=1)
        good = np.isfinite(largest)
        usable = good & (largest > 0)
        shift = np.where(usable, np.frexp(np.where(usable, largest, 1))[1], 0)
        # Squares of what is near 1 stay within float64.
        wide = np.where(usable[:, None], np.ldexp(wide, -shift[:, None]), 0.0)
        square = (wide * wide).sum(axis=1)  # |t|², [n]
        step = np.sqrt(square / layout.dim) / self._unit  # [n]: t / step is in units of levels
        codes = np.zeros(wide.shape, np.uint8)
        between = (self.levels[1:].astype(np.float64) + self.levels[:-1]) / 2
        for threshold in between:
            codes += wide >= threshold * step[:, None]
        along = (self.levels.astype(np.float64)[codes] * wide).sum(axis=1)  # <elements, t>
        scale = np.divide(square, along, out=np.zeros_like(square), where=usable)
        with np.errstate(over="ignore"):
            scale = np.ldexp(scale, shift).clip(0, LARGEST_SCALE).astype(SCALE_DTYPE)
        scale[~good] = np.nan
        bits = len(self.data)
        planes = [
            np.packbits(codes >> (bits - 1 - p) & 1, axis=1, bitorder="little") for p in range(bits)
        ]
        return np.concatenate(planes, axis=1), scale, None

    def elements(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        """As in RowCodec, float32 whole numbers."""
        planes = stored.reshape(len(stored), len(self.data), -1)
        bits = np.unpackbits(planes, axis=2, count=layout.dim, bitorder="little")  # [n, P, D]
        codes = np.zeros((len(stored), layout.dim), np.uint8)
        for p in range(len(self.data)):
            codes += bits[:, p] << (len(self.data) - 1 - p)
        return self.levels.astype(np.float32)[codes]

    def finite(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        """As in RowCodec: every code has a level; the scale tells rows that are not finite."""
        return np.ones((len(stored), layout.dim), bool)

    def good_scales(self, values: np.ndarray) -> np.ndarray:
        """As in RowCodec."""
        good: np.ndarray = (values >= 0) & (values <= LARGEST_SCALE)
        return good

    def columns(self, layout: RowLayout) -> int:
        """As in RowCodec: the bytes of all planes."""
        return len(self.data) * -(-layout.dim // 8)

    def first(self, planes: int) -> Planes:
        """As in RowCodec."""
        if not 1 <= planes <= len(self.data):
            raise StoreError(f"planes: expected 1 to {len(self.data)} of {self.name}, got {planes}")
        if planes == len(self.data):
            return self
        return Planes(
            f"{self.name}[:{planes}]",
            self._coarser[planes - 1],
            self._unit,
            self._coarser[: planes - 1],
        )


def sign() -> Planes:
    """One bit an element: its sign."""
    return Planes("sign", [1], 1.0)


def int2() -> Planes:
    """Two bits an element."""
    return Planes("int2", [38, 127], 84.0827, [[93]])


def int4() -> Planes:
    """Four bits an element."""
    return Planes(
        "int4",
        [6, 18, 31, 44, 58, 75, 96, 127],
        46.4761,
        [[58], [26, 84], [12, 38, 67, 106]],
    )
