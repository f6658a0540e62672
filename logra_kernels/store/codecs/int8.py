"""Rows as int8: one float32 scale for each row, an exponent for each module."""

from collections.abc import Sequence

import numpy as np

from logra_kernels.store.codecs.base import SCALE_DTYPE, Encoded, RowCodec
from logra_kernels.store.layout import RowLayout

# A row's largest element has this code. -128 is the code of what is not finite, and in no store.
LARGEST_CODE, NOT_FINITE = 127, -128
# A subnormal float32 of this size still has 9 bits, so that the largest code is not exceeded.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-140, np.finfo(np.float32).max


class Int8(RowCodec):
    """One byte an element: whole numbers from -127 to 127 times the row's scale.

    A stored element is within half a scale, 1/254 of the row's largest element (each divided by its
    module's 2**exponent), as far as scales of 2**-140 and more go. So a module that is 254
    times smaller than that is stored as zero: rows have no exponents of their own.
    """

    name = "int8"
    dtype = np.dtype("i1")
    scaled = True
    version = 2
    scan_as_stored = True
    rotated = True
    scales = "positive numbers"

    def encode(self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()) -> Encoded:
        """As in RowCodec. A row that is all zero, or not finite, has scale 1."""
        factors = np.repeat(np.ldexp(1.0, np.negative(exponents)), layout.sizes)  # [D]
        wide = rows * factors  # [n, D] float64, exact
        largest = np.abs(wide).max(axis=1)
        good = np.isfinite(largest) & (largest > 0)
        scale = np.where(good, largest / LARGEST_CODE, 1.0).clip(SMALLEST_SCALE, LARGEST_SCALE)
        scale = scale.astype(SCALE_DTYPE)
        known = np.isfinite(wide)
        wide = np.where(known, wide, 0.0) / scale[:, None]
        codes = np.rint(wide).clip(-LARGEST_CODE, LARGEST_CODE).astype(self.dtype)
        codes[~known] = NOT_FINITE
        return codes, scale, None

    def elements(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        """As in RowCodec, float32; NaN for the code of what is not finite."""
        values = stored.astype(np.float32)
        values[stored == NOT_FINITE] = np.nan
        return values

    def finite(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        """As in RowCodec."""
        good: np.ndarray = stored != NOT_FINITE
        return good

    def good_scales(self, values: np.ndarray) -> np.ndarray:
        """As in RowCodec: what `encode` makes."""
        good: np.ndarray = (values >= SMALLEST_SCALE) & (values <= LARGEST_SCALE)
        return good
