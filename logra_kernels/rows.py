"""Stored rows as tensors: a codec's work done by ops, and arrays shared without a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.store import RowCodec, RowLayout, Store


class _Kernels(NamedTuple):
    """A codec's methods for tensors of any device."""

    encode: Callable[[Tensor, list[int], Sequence[int]], tuple[Tensor, Tensor | None]]
    decode: Callable[[Tensor, Any, list[int], Sequence[int]], Tensor]
    scan: Callable[[Tensor], Tensor]


# Codecs that are not named here work through their NumPy methods.
_KERNELS = {
    "float16": _Kernels(ops.pack_rows, ops.unpack_rows, lambda stored: stored),
    "float32": _Kernels(
        lambda rows, *_: (rows.float(), None), lambda stored, *_: stored, lambda stored: stored
    ),
}


def encode(
    codec: RowCodec, rows: Tensor, layout: RowLayout, exponents: Sequence[int] = ()
) -> tuple[Tensor, Tensor | None]:
    """Rows as a store keeps them.

    Args:
        codec: of the store (`Store.codec`, `StoreWriter.codec`, or `row_codec(name)`).
        rows: [R, D] float32.
        layout: the modules of a row.
        exponents: one per module, if the codec is scaled.

    Returns:
        stored rows [R, W], and row_scale [R] float32, or None if the codec is not scaled.
    """
    if codec.name in _KERNELS:
        return _KERNELS[codec.name].encode(rows, layout.sizes, exponents)
    stored, row_scale = codec.encode(rows.detach().cpu().numpy(), layout, exponents)
    return share(stored), None if row_scale is None else share(row_scale)


def decode(
    codec: RowCodec,
    stored: Tensor,
    row_scale: Tensor | None,
    layout: RowLayout,
    exponents: Sequence[int] = (),
) -> Tensor:
    """[R, D] float32: the rows that `encode` stored, as exactly as the codec keeps them."""
    if codec.name in _KERNELS:
        return _KERNELS[codec.name].decode(stored, row_scale, layout.sizes, exponents)
    scale = None if row_scale is None else row_scale.cpu().numpy()
    return share(codec.decode(stored.cpu().numpy(), scale, layout, exponents))


def scanned(codec: RowCodec, stored: Tensor, layout: RowLayout) -> Tensor:
    """[R, D] on the same device, of a dtype that `ops.scores` takes: what a scan multiplies.

    The row scales and the modules' exponents are not in it. A scan has them in its own factors.
    """
    if codec.name in _KERNELS:
        return _KERNELS[codec.name].scan(stored)
    elements = codec.elements(stored.cpu().numpy(), layout).astype(np.float32, copy=False)
    return share(elements).to(stored.device)


def stored_rows(store: Store, rows: np.ndarray, row_scale: np.ndarray) -> Tensor:
    """A block of a store's rows, [R, D] float32, as the curvature is to see them."""
    return decode(store.codec, share(rows), share(row_scale), store.layout, store.module_exponents)


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
