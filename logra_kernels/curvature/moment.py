"""Sums over vectors that arrive in calls of any size, with bits that do not depend on the calls."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from logra_kernels import ops

PLACES = ("cpu", "device", "offload")
Place: TypeAlias = Literal["cpu", "device", "offload"]
"""Where the moments of vectors from another device are summed: on the CPU; on that device, where
they stay; or on that device, but kept in the CPU's memory between its calls."""

# Vectors are folded into the sum 256 at a time: a call reads and writes K² sums, and costs less
# than the K²/2 multiply-adds of each of 256 vectors on every machine measured.
FOLD_ROWS = 256
# Above this K float64 sums take more than 8 MiB, and their update twice float32's time.
FLOAT64_LARGEST_K = 1024
# Sums are rescaled when a block's largest value passes 2**8 times their unit: float32 sums hold
# 2**100 times more before they overflow.
HEADROOM_EXPONENT = 8


class Folded(ABC):
    """A sum over vectors v [K]; they are folded into it in blocks counted from the first one.

    Args:
        size: K.
        fold_rows: vectors of a block.
    """

    def __init__(self, size: int, fold_rows: int = FOLD_ROWS) -> None:
        self.size = size
        self._fold_rows = fold_rows
        self._folded = 0
        self._buffer: Tensor | None = None  # [fold_rows, K] float32
        self._buffered = 0

    @property
    def count(self) -> int:
        """The number of vectors seen."""
        return self._folded + self._buffered

    def update(self, vectors: Tensor) -> None:
        """Add finite vectors [n, K] float32, on the device of the sum."""
        while vectors.shape[0]:
            if self._buffered == 0 and vectors.shape[0] >= self._fold_rows:
                self._fold(vectors[: self._fold_rows])
                self._folded += self._fold_rows
                vectors = vectors[self._fold_rows :]
                continue
            if self._buffer is None:
                self._buffer = torch.empty(self._fold_rows, self.size, device=vectors.device)
            taken = min(self._fold_rows - self._buffered, vectors.shape[0])
            end = self._buffered + taken
            self._buffer[self._buffered : end] = vectors[:taken]
            vectors = vectors[taken:]
            self._buffered = end
            if end == self._fold_rows:
                self._fold(self._buffer)
                self._folded += end
                self._buffered = 0

    @abstractmethod
    def _fold(self, block: Tensor) -> None:
        """Add a block [n, K] to the sum."""


class Squares(Folded):
    """Σ v² [K] float64 over vectors v [K], and their count."""

    def __init__(self, size: int, fold_rows: int = FOLD_ROWS) -> None:
        super().__init__(size, fold_rows)
        self._sums = torch.zeros(size, dtype=torch.float64)

    @classmethod
    def of(cls, sums: Tensor, count: int) -> Squares:
        """The squares whose `total` and count these are."""
        squares = cls(len(sums))
        squares._sums, squares._folded = sums.double(), count
        return squares

    def merge(self, other: Squares) -> None:
        """Add another's sum and count."""
        self._sums = self._sums + other.total()
        self._folded += other.count

    def total(self) -> Tensor:
        """Σ v², [K] float64; the sum itself stays as it is, as in `Moment.snapshot`."""
        if self._buffer is None or not self._buffered:
            return self._sums
        return self._sums + self._of_block(self._buffer[: self._buffered])

    def _fold(self, block: Tensor) -> None:
        self._sums = self._sums + self._of_block(block)

    def _of_block(self, block: Tensor) -> Tensor:
        """What vectors [n, K] add to the sum."""
        return sum_by_halves(block.double().square(), 0)


class Moment(Folded):
    """Σ v vᵀ [K, K] over vectors v [K], and their count. Only the lower triangle is kept.

    Args:
        size: K.
        dtype: of the sum; float64 up to K = 1024 and float32 above, if it is None.
        fold_rows: vectors of a block.
    """

    def __init__(
        self, size: int, dtype: torch.dtype | None = None, fold_rows: int = FOLD_ROWS
    ) -> None:
        super().__init__(size, fold_rows)
        small = size <= FLOAT64_LARGEST_K
        self.dtype = dtype or (torch.float64 if small else torch.float32)
        # Allocated by the first block that is not zero: a module without gradients takes no memory.
        self._sums: Tensor | None = None
        self._exponent = 0  # the sums are in units of 4**exponent
        self.place: Place = "cpu"

    @classmethod
    def of(
        cls,
        sums: Tensor,
        exponent: int,
        count: int,
        waiting: Tensor | None = None,
        fold_rows: int = FOLD_ROWS,
    ) -> Moment:
        """The moment of these folded sums; `waiting` [n, K] are vectors that follow them."""
        moment = cls(len(sums), sums.dtype, fold_rows)
        moment._sums = sums if bool(sums.any()) else None
        moment._exponent, moment._folded = exponent, count
        if waiting is not None:
            moment.update(waiting)
        return moment

    @property
    def folded(self) -> tuple[Tensor, int, int, Tensor]:
        """What `of` takes: the sums without the vectors that wait, e of their unit, their count."""
        self._move(torch.device("cpu"))
        sums = self._sums
        if sums is None:
            sums = torch.zeros(self.size, self.size, dtype=self.dtype)
        waiting = torch.empty(0, self.size) if self._buffer is None else self._buffer
        return sums, self._exponent, self._folded, waiting[: self._buffered].clone()

    def update(self, vectors: Tensor) -> None:
        """Add finite vectors [n, K] float32 of any device; `place` says where they are summed."""
        if self.place == "cpu":
            vectors = vectors.cpu()
        self._move(vectors.device)
        super().update(vectors)
        if self.place == "offload":
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        """Bring the sums, and the vectors that wait for a whole block, to a device."""
        if self._sums is not None:
            self._sums = self._sums.to(device)
        if self._buffer is not None:
            self._buffer = self._buffer.to(device)

    def merge(self, other: Moment) -> None:
        """Add another moment's sum and count."""
        self._move(torch.device("cpu"))
        theirs, exponent = other.snapshot()
        if theirs is not None:
            mine = self._reserve(exponent, theirs.device)
            unit = 4.0 ** (exponent - self._exponent)
            mine += (theirs.double() * unit).to(self.dtype)
        self._folded += other.count

    def snapshot(self) -> tuple[Tensor | None, int]:
        """The sum's lower triangle with the buffered vectors in it, and e of its unit 4**e.

        The sum itself stays as it is: folding a part of a block early would change how later
        vectors are grouped, and so their bits. None: every vector was zero.
        """
        self._move(torch.device("cpu"))
        if self._buffer is None or not self._buffered:
            return self._sums, self._exponent
        part = Moment(self.size, self.dtype)
        part._sums = None if self._sums is None else self._sums.clone()
        part._exponent = self._exponent
        part._fold(self._buffer[: self._buffered])
        return part._sums, part._exponent

    def symmetric(self) -> Tensor:
        """Σ v vᵀ, [K, K] float64, both triangles."""
        sums, exponent = self.snapshot()
        if sums is None:
            return torch.zeros(self.size, self.size, dtype=torch.float64)
        lower = sums.double().tril() * 4.0**exponent
        return lower + lower.tril(-1).T

    def trace(self) -> float:
        """Σ |v|²; infinite or NaN if the sums are."""
        sums, exponent = self.snapshot()
        return 0.0 if sums is None else math.fsum(sums.diagonal().tolist()) * 4.0**exponent

    def _fold(self, block: Tensor) -> None:
        exponent = _exponent(block)
        if exponent is not None:
            sums = self._reserve(exponent, block.device)
            unit = self._exponent
            ops.covariance_update_(sums, block * 2.0**-unit if unit else block)

    def _reserve(self, exponent: int, device: torch.device) -> Tensor:
        """The sums, in a unit that holds vectors of values up to 2**exponent."""
        if self._sums is None:
            self._sums = torch.zeros(self.size, self.size, dtype=self.dtype, device=device)
            self._exponent = exponent
        elif exponent > self._exponent + HEADROOM_EXPONENT:
            self._sums *= 4.0 ** (self._exponent - exponent)
            self._exponent = exponent
        return self._sums


class Counts:
    """How often each place of one-hot vectors [K] is one: Σ v vᵀ, of which it is the diagonal.

    Args:
        size: K.
    """

    dtype = torch.float64

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._sums = torch.zeros(size, dtype=torch.float64)

    @classmethod
    def of(cls, sums: Tensor, count: int) -> Counts:
        """The counts whose sums [K] and number of vectors these are."""
        counts = cls(len(sums))
        counts._sums, counts.count = sums.double(), count
        return counts

    @property
    def folded(self) -> tuple[Tensor, int, int, Tensor]:
        """The sums, and what `Moment.folded` gives beside them."""
        return self._sums, 0, self.count, torch.empty(0)

    def update(self, places: Tensor) -> None:
        """Add vectors by the places of their one, [n] int64; -1 for a vector that is zero."""
        places = places.cpu()
        self._sums = self._sums + torch.bincount(places[places >= 0], minlength=self.size)
        self.count += len(places)

    def merge(self, other: Counts) -> None:
        """Add another's sums and count."""
        self._sums = self._sums + other._sums
        self.count += other.count

    def snapshot(self) -> tuple[Tensor, int]:
        """The sums, in units of 4**0."""
        return self._sums, 0

    def symmetric(self) -> Tensor:
        """The diagonal of Σ v vᵀ, [K] float64."""
        return self._sums


class SequenceMoments:
    """Σ Gᵀ G [I, I] and Σ G Gᵀ [O, O] over examples, whose gradients are G = Σ_t dy_t x_tᵀ.

    Gᵀ G = Σ_st (dy_s·dy_t) x_s x_tᵀ, so that few tokens take no G. The products are of float64.

    Args:
        width_in: I.
        width_out: O.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        self.inputs, self.outputs = (
            torch.zeros(k, k, dtype=torch.float64 if k <= FLOAT64_LARGEST_K else torch.float32)
            for k in (width_in, width_out)
        )

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add an example's tokens x [T, I] and dy [T, O]."""
        x, dy = x.double(), dy.double()
        (tokens, width_in), width_out = x.shape, dy.shape[1]
        squares = width_in**2 + width_out**2
        without = 2 * tokens**2 * (width_in + width_out) + tokens * squares
        whole = width_in * width_out * (tokens + width_in + width_out)
        if without < whole:
            self.inputs += x.T @ (dy @ dy.T @ x)
            self.outputs += dy.T @ (x @ x.T @ dy)
        else:
            gradient = dy.T @ x
            self.inputs += gradient.T @ gradient
            self.outputs += gradient @ gradient.T


def sum_by_halves(values: Tensor, dim: int) -> Tensor:
    """The sum along an axis, halves added to halves: the others' sizes do not change its bits."""
    while values.shape[dim] > 1:
        half = (values.shape[dim] + 1) // 2
        upper = values.narrow(dim, half, values.shape[dim] - half)
        values = values.narrow(dim, 0, half).clone()
        values.narrow(dim, 0, upper.shape[dim]).add_(upper)
    return values.select(dim, 0)


def _exponent(block: Tensor) -> int | None:
    """e with the largest |value| in [2**(e-1), 2**e); None where all are zero."""
    low, high = torch.aminmax(block) if block.numel() else (block.new_zeros(()),) * 2
    largest = max(-float(low), float(high))
    # 2**-e must be a float32, which 2**127 still is
    return max(math.frexp(largest)[1], -126) if largest else None
