"""Rows as tensors: a module's columns, a mapped file's memory, a packed block in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.store import Module, Store


def stored_rows(store: Store, rows: np.ndarray, row_scale: np.ndarray) -> Tensor:
    """A block of a store's rows, [R, D] float32, as the curvature is to see them."""
    block = share(rows)
    if block.dtype == torch.float32:
        return block
    sizes = [module.size for module in store.modules]
    return ops.unpack_rows(block, share(row_scale), sizes, store.module_exponents)


def share(array: np.ndarray) -> Tensor:
    """A tensor over an array's memory, also a read-only one.

    torch.from_numpy warns about a read-only map, and nothing here writes into what it reads.
    """
    if array.flags.writeable:
        return torch.from_numpy(array)
    return torch.from_numpy(np.asarray(_Writable(array)))


def split_columns(rows: Tensor, modules: Sequence[Module]) -> list[Tensor]:
    """Views [R, K] of the modules' columns of rows [R, D]."""
    return list(rows.split([module.size for module in modules], dim=1))


def module_of(modules: Sequence[Module], column: int) -> Module:
    """The module a column of a row belongs to."""
    for module in modules:
        if column < module.size:
            return module
        column -= module.size
    raise IndexError(f"column {column} lies behind the last module")


class _Writable:
    """An array's memory under the array interface, without the read-only mark."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the map open
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def layout(modules: Sequence[Module]) -> list[tuple[str, int]]:
    return [(module.name, module.size) for module in modules]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
