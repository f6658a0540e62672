"""The contract of a codec, and the table that finds one by its name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logra_kernels.store.errors import StoreError
from logra_kernels.store.files import finite, powers_of_two
from logra_kernels.store.layout import RowLayout

SCALE_DTYPE = np.dtype("<f4")
EXPONENT_DTYPE = np.dtype("<i2")
# Of a row's exponents: what values of 2**-149 to 2**128 can need, whatever the scale of their row
# (2**-126 to 2**127) and the exponent of their module (-126 to 127).
SMALLEST_ROW_EXPONENT, LARGEST_ROW_EXPONENT = -417, 112

# Stored rows [n, W], row_scale [n] float32, row_exponents [n, M] int16; None where there are none.
Encoded = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]

_codecs: dict[str, RowCodec] = {}


class RowCodec:
    """Turns rows [n, D] float32 into stored rows [n, W], and back:

    row[d] = elements(stored, layout)[d] · row_scale · 2**(exponents[m] + row_exponents[m])

    with m the module of column d. The last two factors are there only if the codec is `scaled`:
    then every row has a scale beside it, and every module an exponent that is fixed before the
    first row is written. A row has exponents of its own, one per module, only where the codec
    would lose a module of it otherwise: all others are zero, and None says that all are.
    """

    name: str
    """What stands as "dtype" in the manifest."""
    dtype: np.dtype
    """The little-endian dtype of the stored values."""
    scaled: bool
    version: int = 1
    """The lowest format version whose readers know the codec."""
    scan_as_stored: bool = False
    """Whether `ops.scores` takes the stored values in the place of their elements."""
    rotated: bool = False
    """Whether rows may be whitened and rotated before they are stored, and are if nothing is said:
    then the columns of what is stored are no module's, and no row has exponents of its own."""
    faithful: bool = True
    """Whether norms of stored rows, and sums over them, may stand for those of the rows."""
    data: tuple[str, ...] = ("data",)
    """The keys in the manifest of the files that hold a stored row, an equal share of its columns
    each."""
    scales: str = "powers of two"
    """What `good_scales` asks for, for messages."""

    def encode(self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()) -> Encoded:
        """rows [n, D] float32 -> stored [n, W], row_scale [n], row_exponents [n, M].

        The last two are None if the codec is not scaled, the last one also where no row needs it.
        What is stored of a row depends on it and on `exponents` alone. A value that is not finite
        stays so, for `finite` to find. A codec without a scale has the rows in its own dtype, the
        same array where that is theirs.
        """
        return rows.astype(self.dtype, copy=False), None, None

    def elements(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        """stored [n, W] -> [n, D] floating point, before scale and exponents."""
        return stored

    def finite(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        """[n, D] bool: which elements are finite. No other value may be in a store."""
        return finite(self.elements(stored, layout))

    def good_scales(self, values: np.ndarray) -> np.ndarray:
        """[n] bool: which float32 values may be scales of rows in a store."""
        return powers_of_two(values)

    def columns(self, layout: RowLayout) -> int:
        """W, the number of stored values of a row."""
        return layout.dim

    def first(self, planes: int) -> RowCodec:
        """The codec that reads the first of a row's files alone, with coarser elements.

        Raises:
            StoreError: there are no so many, or a row is in one file.
        """
        raise StoreError(f"planes: expected a codec of bit planes, got {self.name}")

    def row_bytes(self, layout: RowLayout) -> int:
        """The size of a stored row, without its scale."""
        return self.columns(layout) * self.dtype.itemsize

    def arrays(
        self, num_rows: int, layout: RowLayout, row_exponents: bool = False
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The .npy files of a shard: its key in the manifest -> dtype and shape of the array.

        Args:
            num_rows: of the shard.
            layout: the modules of a row.
            row_exponents: whether the shard keeps them.
        """
        shape = num_rows, self.columns(layout) // len(self.data)
        arrays: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(
            self.data, (self.dtype.str, shape)
        )
        if self.scaled:
            arrays["scale"] = (SCALE_DTYPE.str, (num_rows,))
        if row_exponents:
            arrays["exponents"] = (EXPONENT_DTYPE.str, (num_rows, len(layout)))
        return arrays

    def decode(
        self,
        stored: np.ndarray,
        row_scale: np.ndarray | None,
        row_exponents: np.ndarray | None,
        layout: RowLayout,
        exponents: Sequence[int] = (),
    ) -> np.ndarray:
        """stored [n, W], row_scale [n], row_exponents [n, M] -> [n, D] float32, rounded once."""
        elements = self.elements(stored, layout)
        if not self.scaled:
            return elements.astype(np.float32, copy=False)
        assert row_scale is not None
        powers = np.asarray(exponents, np.int64)  # [M]
        if row_exponents is not None:
            powers = powers + row_exponents  # [n, M]
        factors = np.repeat(np.ldexp(1.0, powers), layout.sizes, axis=-1)  # [D] or [n, D] float64
        wide: np.ndarray = elements * factors * row_scale[:, None].astype(np.float64)
        return wide.astype(np.float32)


def row_exponents_in_range(values: np.ndarray) -> np.ndarray:
    """[n] bool: which rows [n, M] have exponents that a codec may give them."""
    good = (values >= SMALLEST_ROW_EXPONENT) & (values <= LARGEST_ROW_EXPONENT)
    return np.asarray(good.all(axis=1))


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
