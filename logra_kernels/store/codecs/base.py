"""The contract of a codec, and the table that finds one by its name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logra_kernels.store.errors import StoreError
from logra_kernels.store.files import finite
from logra_kernels.store.layout import RowLayout

SCALE_DTYPE = np.dtype("<f4")

_codecs: dict[str, RowCodec] = {}


class RowCodec:
    """Turns rows [n, D] float32 into stored rows [n, W], and back:

    row[d] = elements(stored, layout)[d] · row_scale · 2**(exponent of the module of column d)

    The last two factors are there only if the codec is `scaled`: then every row has a power of two
    beside it, and every module an exponent that is fixed before the first row is written.
    """

    name: str
    """What stands as "dtype" in the manifest."""
    dtype: np.dtype
    """The little-endian dtype of the stored values."""
    scaled: bool

    def encode(
        self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """rows [n, D] float32 -> stored [n, W], and row_scale [n] float32 if the codec is scaled.

        A value that is not finite stays so, for `finite` to find. A codec without a scale has the
        rows in its own dtype, the same array where that is theirs.
        """
        return rows.astype(self.dtype, copy=False), None

    def elements(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        """stored [n, W] -> [n, D] floating point, before scale and exponents."""
        return stored

    def finite(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        """[n, D] bool: which elements are finite. No other value may be in a store."""
        return finite(self.elements(stored, layout))

    def columns(self, layout: RowLayout) -> int:
        """W, the number of stored values of a row."""
        return layout.dim

    def row_bytes(self, layout: RowLayout) -> int:
        """The size of a stored row, without its scale."""
        return self.columns(layout) * self.dtype.itemsize

    def arrays(self, num_rows: int, layout: RowLayout) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The .npy files of a shard: its key in the manifest -> dtype and shape of the array."""
        arrays: dict[str, tuple[str, tuple[int, ...]]] = {
            "data": (self.dtype.str, (num_rows, self.columns(layout)))
        }
        if self.scaled:
            arrays["scale"] = (SCALE_DTYPE.str, (num_rows,))
        return arrays

    def decode(
        self,
        stored: np.ndarray,
        row_scale: np.ndarray | None,
        layout: RowLayout,
        exponents: Sequence[int] = (),
    ) -> np.ndarray:
        """stored [n, W], row_scale [n] -> [n, D] float32, rounded once."""
        elements = self.elements(stored, layout)
        if not self.scaled:
            return elements.astype(np.float32, copy=False)
        assert row_scale is not None
        factors = np.repeat(np.ldexp(1.0, exponents), layout.sizes)  # [D] float64
        wide: np.ndarray = elements * factors * row_scale[:, None].astype(np.float64)
        return wide.astype(np.float32)


def register_codec(codec: RowCodec) -> None:
    """Let stores be written and read with the codec, by its name.

    Raises:
        StoreError: there is one of that name.
    """
    if codec.name in _codecs:
        raise StoreError(f"codec: expected a new name, got {codec.name!r}, which is registered")
    _codecs[codec.name] = codec


def codec_names() -> tuple[str, ...]:
    """The names of the registered codecs."""
    return tuple(_codecs)


def row_codec(name: str) -> RowCodec:
    """The codec of that name.

    Raises:
        StoreError: there is none.
    """
    if name not in codec_names():
        raise StoreError(f"dtype: expected one of {', '.join(_codecs)}, got {name!r}")
    return _codecs[name]
