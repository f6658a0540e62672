"""Statistics that a run accumulates beside its curvature: means, variances, and users' own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from logra_kernels.curvature.moment import Squares, sum_by_halves

S = TypeVar("S", bound="Statistic")
M = TypeVar("M", bound="Mean")


class Statistic(ABC):
    """What is accumulated of the vectors of one module; each module has an object of its own.

    The vectors are a module's columns of the rows as stored ("grad"), or the tokens that count,
    P_i x ("forward") or P_o dy ("backward"). A subclass is given to setup as a class, and is kept
    in the store under its name in small letters:

        class Largest(Statistic):
            def __init__(self, size):
                super().__init__(size)
                self.values = torch.zeros(size)

            def update(self, vectors):
                self.values = torch.maximum(self.values, vectors.abs().amax(0))

            def merge(self, other):
                self.values = torch.maximum(self.values, other.values)

            def save(self):
                return {"values": self.values}

            @classmethod
            def load(cls, size, tensors):
                largest = cls(size)
                largest.values = tensors["values"]
                return largest

        run.setup({"save": "grad", "statistic": {"grad": Largest}})

    Args:
        size: of a vector.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def update(self, vectors: Tensor) -> None:
        """Add finite vectors [n, size] float32 on the CPU, n >= 1; they are not to be changed."""

    @abstractmethod
    def merge(self: S, other: S) -> None:
        """Add what another has seen."""

    @abstractmethod
    def save(self) -> Mapping[str, Tensor]:
        """Everything that `load` needs, float32 or float64, by names without a slash."""

    @classmethod
    @abstractmethod
    def load(cls: type[S], size: int, tensors: Mapping[str, Tensor]) -> S:
        """The statistic that `save` kept."""


class Mean(Statistic):
    """E[v], [size] float64: `value`."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._sums = _Sums(size)

    @property
    def count(self) -> int:
        """The number of vectors seen."""
        return self._sums.count

    @property
    def value(self) -> Tensor:
        """The mean; 0 before the first vector."""
        return self._sums.total()[0] / max(self.count, 1)

    def update(self, vectors: Tensor) -> None:
        """Add vectors [n, size] float32; the bits do not depend on how they come."""
        self._sums.update(vectors)

    def merge(self, other: Mean) -> None:
        """Add another's sums and count."""
        self._sums.merge(other._sums)

    def save(self) -> dict[str, Tensor]:
        """The sums, and the vectors that are not in them yet."""
        sums, count, waiting = self._sums.folded
        return {"sums": sums, "count": torch.tensor([float(count)]).double(), "waiting": waiting}

    @classmethod
    def load(cls: type[M], size: int, tensors: Mapping[str, Tensor]) -> M:
        """The statistic that `save` kept."""
        statistic = cls(size)
        statistic._sums = _Sums.of_folded(
            tensors["sums"], int(tensors["count"]), tensors["waiting"]
        )
        return statistic


class Variance(Mean):
    """E[v²] - E[v]², [size] float64: `value`."""

    @property
    def value(self) -> Tensor:
        """The variance over the vectors seen; 0 before the first one."""
        means = self._sums.total() / max(self.count, 1)
        return (means[1] - means[0].square()).clamp(min=0)


class _Sums(Squares):
    """Σ v and Σ v², [2, K] float64."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._sums = torch.zeros(2, size, dtype=torch.float64)

    @classmethod
    def of_folded(cls, sums: Tensor, count: int, waiting: Tensor) -> _Sums:
        """What `folded` gave."""
        made = cls(sums.shape[1])
        made._sums, made._folded = sums, count
        made.update(waiting)
        return made

    @property
    def folded(self) -> tuple[Tensor, int, Tensor]:
        """What `of_folded` takes: the sums without the vectors that wait [n, K], their count."""
        waiting = torch.empty(0, self.size) if self._buffer is None else self._buffer
        return self._sums, self._folded, waiting[: self._buffered].clone()

    def _of_block(self, block: Tensor) -> Tensor:
        return torch.stack([sum_by_halves(block.double(), 0), super()._of_block(block)])
