"""Rows as they are."""

from collections.abc import Sequence

import numpy as np

from logra_kernels.store.codecs.base import RowCodec
from logra_kernels.store.layout import RowLayout


class Float32(RowCodec):
    """Four bytes an element, without scale or exponents."""

    name = "float32"
    dtype = np.dtype("<f4")
    scaled = False

    def encode(
        self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()
    ) -> tuple[np.ndarray, None]:
        """As in RowCodec; a copy only if the rows are not float32 already."""
        return rows.astype(self.dtype, copy=False), None
