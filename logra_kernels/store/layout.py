"""Which columns of a row belong to which module. Only this file adds up modules' sizes."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

SAMPLES = 2  # columns of a module in `RowLayout.samples`
GOLDEN = 0.6180339887498949  # its multiples, modulo 1, lie apart


@dataclass(frozen=True)
class Module:
    """One watched layer's part of a row: vec(G) of G [ko, ki], row-major."""

    name: str
    ko: int
    ki: int

    @property
    def size(self) -> int:
        """Columns of a row that belong to the module."""
        return self.ko * self.ki


@dataclass(frozen=True)
class RowLayout(Sequence[Module]):
    """The modules of a row in order; module i owns the columns `columns[i]` of D = `dim`."""

    modules: tuple[Module, ...]

    @classmethod
    def of(cls, modules: Iterable[Module]) -> RowLayout:
        """The layout of a row that holds these modules, one after the other."""
        return modules if isinstance(modules, cls) else cls(tuple(modules))

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: Any) -> Any:
        return self.modules[index]

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    @cached_property
    def names(self) -> list[str]:
        """The modules' names."""
        return [module.name for module in self.modules]

    @cached_property
    def sizes(self) -> list[int]:
        """The modules' numbers of columns, Ko·Ki each."""
        return [module.size for module in self.modules]

    @cached_property
    def offsets(self) -> list[int]:
        """The first column of each module, and at the end D."""
        return [0, *accumulate(self.sizes)]

    @property
    def dim(self) -> int:
        """D, the number of columns of a row."""
        return self.offsets[-1]

    @cached_property
    def columns(self) -> list[slice]:
        """The columns of each module."""
        return [slice(*ends) for ends in zip(self.offsets, self.offsets[1:], strict=False)]

    @cached_property
    def samples(self) -> np.ndarray:
        """[M · SAMPLES] columns: a few of each module; a small one may have one of them twice."""
        starts, sizes = np.array(self.offsets[:-1]), np.array(self.sizes)
        steps = sizes[:, None] * (GOLDEN * np.arange(1, SAMPLES + 1) % 1)  # [M, SAMPLES]
        columns: np.ndarray = (starts[:, None] + steps.astype(np.int64)).reshape(-1)
        return columns

    @property
    def signature(self) -> list[tuple[str, int]]:
        """Names and sizes, as the checksums and cache keys of stored files hash them."""
        return list(zip(self.names, self.sizes, strict=True))

    def split(self, rows: Any) -> list[Any]:
        """Views [R, Ko·Ki] of the modules' columns of rows [R, D], an array or a tensor."""
        return [rows[:, columns] for columns in self.columns]

    def span(self, members: Sequence[int]) -> slice:
        """From the first column of modules `members` (ascending) to the last one's end."""
        return slice(self.offsets[members[0]], self.offsets[members[-1] + 1])

    def module_of(self, column: int) -> Module:
        """The module that a column belongs to.

        Raises:
            IndexError: the column is not one of the row's.
        """
        if not 0 <= column < self.dim:
            raise IndexError(f"column {column}: expected one of {self.dim}")
        return self.modules[bisect.bisect_right(self.offsets, column) - 1]
