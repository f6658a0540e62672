"""Rows as float16: a power of two for each row, an exponent for each module, more where needed."""

from collections.abc import Sequence

import numpy as np

from logra_kernels.store.codecs.base import EXPONENT_DTYPE, Encoded, RowCodec
from logra_kernels.store.layout import RowLayout

# A row's scale puts its largest element in [2**14, 2**15): below float16's overflow, and 39 powers
# of two above its smallest subnormal.
LARGEST_ELEMENT_EXPONENT = 14
# Below this float16 has fewer than 11 bits: a module whose largest element comes to lie there (or
# overflows) gets an exponent of its own in that row.
SMALLEST_NORMAL = 2.0**-14


class Float16(RowCodec):
    """What `ops.pack_rows` makes, two bytes an element; and nothing of a float32 row is lost.

    Whatever the exponents, a stored element is within 2**-11 of the largest element of its module
    in its row, and a module is stored as zero only if it is zero.
    """

    name = "float16"
    dtype = np.dtype("<f2")
    scaled = True
    scan_as_stored = True

    def encode(self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()) -> Encoded:
        """As in RowCodec. A row that is all zero, or not finite, has scale 1."""
        factors = np.repeat(np.ldexp(1.0, np.negative(exponents)), layout.sizes)  # [D]
        wide = rows * factors  # [n, D] float64, exact
        modules = np.maximum.reduceat(np.abs(wide), layout.offsets[:-1], axis=1)  # [n, M]
        largest = modules.max(axis=1)
        good = np.isfinite(largest) & (largest > 0)
        shift = np.where(good, _binary_exponent(largest) - LARGEST_ELEMENT_EXPONENT, 0)
        shift = shift.clip(-126, 127)
        wide *= np.ldexp(1.0, -shift)[:, None]
        modules *= np.ldexp(1.0, -shift)[:, None]
        with np.errstate(over="ignore"):
            stored = modules.astype(self.dtype)
            lost = (modules > 0) & ((stored < SMALLEST_NORMAL) | np.isinf(stored)) & good[:, None]
            own = None
            if lost.any():
                own = np.where(lost, _binary_exponent(modules) - LARGEST_ELEMENT_EXPONENT, 0)
                wide *= np.repeat(np.ldexp(1.0, -own), layout.sizes, axis=1)
            packed = wide.astype(self.dtype)
        row_exponents = None if own is None else own.astype(EXPONENT_DTYPE)
        return packed, np.ldexp(np.float32(1), shift), row_exponents


def _binary_exponent(values: np.ndarray) -> np.ndarray:
    """floor(log2) of positive values."""
    exponents: np.ndarray = np.frexp(values)[1] - 1
    return exponents
