"""Stored rows as tensors: a codec's work done by ops, and arrays shared without a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.store import RowCodec, RowLayout, Store
from logra_kernels.store.codecs import Planes
from logra_kernels.store.codecs.base import EXPONENT_DTYPE
from logra_kernels.store.codecs.float16 import LARGEST_ELEMENT_EXPONENT
from logra_kernels.store.layout import SAMPLES

# The bits of float16's smallest normal value, 2**-14, and of infinity, which has its exponent full.
SMALLEST_NORMAL_BITS, INFINITE_BITS = 0x0400, 0x7C00

# Stored rows [R, W], row_scale [R] float32, and on the host row_exponents [R, M] int16.
Encoded = tuple[Tensor, Tensor | None, np.ndarray | None]


class PlaneRows(NamedTuple):
    """Rows in bit planes, as `ops.plane_scores` takes them."""

    planes: tuple[Tensor, ...]  # [R, B] uint8 each, the sign's first
    levels: Tensor  # [2**P] int8 on the CPU
    dim: int  # D

    @property
    def shape(self) -> tuple[int, int]:
        """(R, D)."""
        return self.planes[0].shape[0], self.dim

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.planes[0].device


class _Kernels(NamedTuple):
    """A codec's methods for tensors of any device."""

    encode: Callable[[Tensor, RowLayout, Sequence[int]], Encoded]
    decode: Callable[[Tensor, Any, np.ndarray | None, RowLayout, Sequence[int]], Tensor]


def encode(
    codec: RowCodec, rows: Tensor, layout: RowLayout, exponents: Sequence[int] = ()
) -> Encoded:
    """Rows as a store keeps them.

    Args:
        codec: of the store (`Store.codec`, `StoreWriter.codec`, or `row_codec(name)`).
        rows: [R, D] float32.
        layout: the modules of a row.
        exponents: one per module, if the codec is scaled.

    Returns:
        stored rows [R, W]; row_scale [R] float32, or None if the codec is not scaled;
        row_exponents [R, M] int16 on the host, or None if all are zero.
    """
    if codec.name in _KERNELS:
        return _KERNELS[codec.name].encode(rows, layout, exponents)
    stored, row_scale, own = codec.encode(rows.detach().cpu().numpy(), layout, exponents)
    return share(stored), None if row_scale is None else share(row_scale), own


def decode(
    codec: RowCodec,
    stored: Tensor,
    row_scale: Tensor | None,
    row_exponents: np.ndarray | None,
    layout: RowLayout,
    exponents: Sequence[int] = (),
) -> Tensor:
    """[R, D] float32: the rows that `encode` stored, as exactly as the codec keeps them."""
    if codec.name in _KERNELS:
        return _KERNELS[codec.name].decode(stored, row_scale, row_exponents, layout, exponents)
    scale = None if row_scale is None else row_scale.cpu().numpy()
    return share(codec.decode(stored.cpu().numpy(), scale, row_exponents, layout, exponents))


def scanned(
    codec: RowCodec,
    parts: Sequence[Tensor],
    layout: RowLayout,
    row_exponents: Tensor | None = None,
) -> Tensor | PlaneRows:
    """What a scan multiplies of stored rows: [R, D] of a dtype that `ops.scores` takes, or planes.

    The row scales and the modules' exponents are not in it: a scan has them in its own factors.
    Rows with exponents of their own, [R, M] int16 on that device, are multiplied out in float32.

    Args:
        codec: of the store.
        parts: the stored rows on a device, [R, W] for each of their files.
        layout: the modules of a row.
        row_exponents: [R, M] int16 on that device; None: all are zero.
    """
    if isinstance(codec, Planes):
        return PlaneRows(tuple(parts), share(codec.levels), layout.dim)
    stored = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    if not codec.scan_as_stored:
        elements = codec.elements(stored.cpu().numpy(), layout).astype(np.float32, copy=False)
        stored = share(elements).to(stored.device)
    if row_exponents is None:
        return stored
    wide = stored.float() if stored.dtype != torch.float32 else stored.clone()
    # 2**15 times less than 2**-252 is nothing in float32.
    for factor in powers_of_two(row_exponents.int().clamp(min=-252)):  # [R, M]
        for part, power in zip(layout.split(wide), factor.split(1, dim=1), strict=True):
            part *= power
    return wide


def elements(store: Store, rows: Tensor | PlaneRows) -> Tensor:
    """[R, D] in the modules' columns, of rows as a scan takes them: the gradients without scales.

    Neither row scales nor modules' exponents are in it. Rows in a basis of their own are taken out
    of it on the CPU, in float64, and rounded to float32.
    """
    codec, basis = store.codec, store.basis
    if isinstance(rows, PlaneRows):
        stored = np.concatenate([plane.cpu().numpy() for plane in rows.planes], axis=1)
        found = codec.elements(stored, store.layout)
    elif basis.plain:
        # Int8 is what scans multiply; the factors of norms take floating point.
        return rows.float() if rows.dtype == torch.int8 else rows
    else:
        found = rows.cpu().numpy()
    if not basis.plain:
        found = basis.original(found).astype(np.float32)
    return share(found).to(rows.device)


def scores(
    queries: Tensor, rows: Tensor | PlaneRows, row_scale: Tensor | None, row_bias: Tensor | None
) -> Tensor:
    """`ops.scores`, or `ops.plane_scores` for rows in bit planes: [Q, R] float32."""
    if isinstance(rows, PlaneRows):
        return ops.plane_scores(queries, rows.planes, rows.levels, row_scale, row_bias)
    return ops.scores(queries, rows, row_scale, row_bias)


def topk_scores(
    queries: Tensor,
    rows: Tensor | PlaneRows,
    k: int,
    row_scale: Tensor | None,
    row_bias: Tensor | None,
    state: ops.TopK | None,
    row_offset: int,
) -> ops.TopK:
    """`ops.topk_scores`, or `ops.topk_plane_scores` for rows in bit planes."""
    terms = row_scale, row_bias, state, row_offset
    if isinstance(rows, PlaneRows):
        return ops.topk_plane_scores(queries, rows.planes, rows.levels, k, *terms)
    return ops.topk_scores(queries, rows, k, *terms)


def stored_rows(
    store: Store, rows: np.ndarray, row_scale: np.ndarray, row_exponents: np.ndarray | None
) -> Tensor:
    """A block of a store's rows, [R, D] float32, as the curvature is to see them."""
    if not store.basis.plain:
        return share(store.basis.decode(store.codec, rows, row_scale, row_exponents))
    shared = share(rows), share(row_scale), row_exponents
    return decode(store.codec, *shared, store.layout, store.module_exponents)


def powers_of_two(exponent: Tensor) -> list[Tensor]:
    """Two factors, each of which float32 can hold, whose product is 2**exponent."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return [
        torch.ldexp(torch.ones_like(step, dtype=torch.float32), step)
        for step in (half, exponent - half)
    ]


def share(array: np.ndarray) -> Tensor:
    """A tensor over an array's memory, also a read-only one.

    torch.from_numpy warns about a read-only map, and nothing here writes into what it reads.
    """
    if array.flags.writeable:
        return torch.from_numpy(array)
    return torch.from_numpy(np.asarray(_Writable(array)))


class _Writable:
    """An array's memory under the array interface, without the read-only mark."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the map open
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _encode_float16(rows: Tensor, layout: RowLayout, exponents: Sequence[int]) -> Encoded:
    """`ops.pack_rows`, and what float16 would lose anew, with exponents of its own."""
    packed, row_scale = ops.pack_rows(rows, layout.sizes, exponents)
    lost = _lost_modules(rows, packed, row_scale, layout, exponents)
    if not lost:
        return packed, row_scale, None
    own = np.zeros((len(rows), len(layout)), EXPONENT_DTYPE)
    scale = row_scale.double()[:, None]  # [R, 1]
    for module, odd in lost.items():
        columns = layout.columns[module]
        part = rows[odd, columns].double() / scale[odd] * 2.0 ** -exponents[module]
        exponent = part.abs().amax(dim=1).frexp().exponent - 1  # of the largest element
        power = exponent.cpu().numpy() - LARGEST_ELEMENT_EXPONENT
        own[odd.cpu().numpy(), module] = power
        shrink = share(np.ldexp(1.0, -power)).to(part.device)  # NumPy's powers are exact
        packed[odd, columns] = (part * shrink[:, None]).half()
    return packed, row_scale, own


def _lost_modules(
    rows: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    layout: RowLayout,
    exponents: Sequence[int],
) -> dict[int, Tensor]:
    """Module -> the rows in which float16 holds it with less than 11 bits, or not at all.

    As `Float16.encode` decides it. A few elements show of nearly every module that it is well kept;
    only the others are looked at in full.
    """
    bits = packed.view(torch.int16)  # ordered as the magnitudes, without the sign
    some = bits.index_select(1, share(layout.samples).to(rows.device)) & INFINITE_BITS
    kept = some.view(len(rows), len(layout), SAMPLES).amax(dim=2) > 0  # [R, M]: one is normal
    if min(exponents) < -LARGEST_ELEMENT_EXPONENT:
        kept &= (row_scale < 2.0**127)[:, None]  # which may be less than the row needs
    if kept.all():
        return {}
    lost = {}
    for module in (~kept).any(dim=0).nonzero()[:, 0].tolist():
        here = layout.columns[module]
        largest = (bits[:, here] & 0x7FFF).amax(dim=1)
        odd = ((largest < SMALLEST_NORMAL_BITS) | (largest >= INFINITE_BITS)).nonzero()[:, 0]
        odd = odd[(rows[odd, here] != 0).any(dim=1)]
        finite = row_scale[odd] != 1  # rows that are not finite have the scale 1
        if not finite.all():
            finite |= rows[odd].isfinite().all(dim=1)
        odd = odd[finite]
        if len(odd):
            lost[module] = odd
    return lost


def _decode_float16(
    packed: Tensor,
    row_scale: Tensor,
    row_exponents: np.ndarray | None,
    layout: RowLayout,
    exponents: Sequence[int],
) -> Tensor:
    rows = ops.unpack_rows(packed, row_scale, layout.sizes, exponents)
    if row_exponents is None:
        return rows
    scale = row_scale.double()[:, None]  # [R, 1]
    for module in np.flatnonzero(row_exponents.any(axis=0)).tolist():
        columns, odd = layout.columns[module], np.flatnonzero(row_exponents[:, module])
        powers = np.ldexp(1.0, row_exponents[odd, module] + exponents[module])
        places, factors = (share(array).to(rows.device) for array in (odd, powers))
        wide = packed[places, columns].double() * scale[places] * factors[:, None]
        rows[places, columns] = wide.float()
    return rows


# Codecs that are not named here work through their NumPy methods.
_KERNELS = {
    "float16": _Kernels(_encode_float16, _decode_float16),
    "float32": _Kernels(lambda rows, *_: (rows.float(), None, None), lambda stored, *_: stored),
}
