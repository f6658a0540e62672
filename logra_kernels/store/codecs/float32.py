"""Rows as they are."""

import numpy as np

from logra_kernels.store.codecs.base import RowCodec


class Float32(RowCodec):
    """Four bytes an element, without scale or exponents."""

    name = "float32"
    dtype = np.dtype("<f4")
    scaled = False
    scan_as_stored = True
