"""Rows as float16, with a power of two for each row and an exponent for each module."""

from collections.abc import Sequence

import numpy as np

from logra_kernels.store.codecs.base import RowCodec
from logra_kernels.store.layout import RowLayout

# A row's scale puts its largest element in [2**14, 2**15): below float16's overflow, and 39 powers
# of two above its smallest subnormal.
LARGEST_ELEMENT_EXPONENT = 14


class Float16(RowCodec):
    """What `ops.pack_rows` makes: two bytes an element."""

    name = "float16"
    dtype = np.dtype("<f2")
    scaled = True

    def encode(
        self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """As in RowCodec. A row that is all zero, or not finite, has scale 1."""
        factors = np.repeat(np.ldexp(1.0, np.negative(exponents)), layout.sizes)  # [D]
        wide = rows * factors  # [n, D] float64, exact
        largest = np.abs(wide).max(axis=1, initial=0)
        shift = np.frexp(largest)[1] - 1 - LARGEST_ELEMENT_EXPONENT
        shift = np.where(np.isfinite(largest) & (largest > 0), shift, 0).clip(-126, 127)
        with np.errstate(over="ignore"):
            packed = (wide * np.ldexp(1.0, -shift)[:, None]).astype(self.dtype)
        return packed, np.ldexp(np.float32(1), shift)
