"""The raw projected curvature: H = (1/N) Σ g gᵀ per module."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels._checks import dtype_name
from logra_kernels.curvature.base import Curvature, register_curvature
from logra_kernels.curvature.preconditioner import (
    CholeskyPreconditioner,
    EigenPreconditioner,
    ModuleMatrices,
    Preconditioner,
    each_module,
)
from logra_kernels.store import Module, Store

# Rows are folded into the covariance 256 at a time: a call reads and writes K² sums, and costs less
# than the K²/2 multiply-adds of each of 256 rows on every machine measured. A buffer of rows takes
# at most FOLD_BYTES.
FOLD_ROWS = 256
FOLD_BYTES = 256 << 20
# Above this K float64 sums take more than 8 MiB a module, and their update twice float32's time.
FLOAT64_LARGEST_K = 1024
# Sums are rescaled when a block's largest gradient passes 2**8 times their unit: float32 sums hold
# 2**100 times more before they overflow.
HEADROOM_EXPONENT = 8


@register_curvature
class RawCurvature(Curvature):
    """Per-module covariance of the stored rows: Σ g gᵀ [K, K], and the number of rows.

    H = covariance / count. The sums are float64 up to K = 1024 and float32 above, unless asked
    otherwise. Rows are folded in blocks counted from the first row, so that the bits do not depend
    on how the rows were split into calls. Arguments as in `Curvature`.
    """

    kind = "raw"

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        super().__init__(modules, dtype)
        self.fold_rows = max(1, min(FOLD_ROWS, FOLD_BYTES // (4 * self.layout.dim)))
        small = [size <= FLOAT64_LARGEST_K for size in self.layout.sizes]
        self._dtypes = [dtype or (torch.float64 if k else torch.float32) for k in small]
        # Allocated by the first block that is not zero: a module without gradients takes no memory.
        self._sums: list[Tensor | None] = [None] * len(self.layout)
        self._exponents = [0] * len(self.layout)  # gradients are in units of 2**exponent
        self._folded_rows = 0
        self._buffer: Tensor | None = None  # [fold_rows, D] float32
        self._buffered_rows = 0
        self._version = 0
        self._checksum: tuple[int, str] | None = None
        self._eigen: tuple[int, list[tuple[Tensor, Tensor]]] | None = None

    @property
    def count(self) -> int:
        """The number of rows seen."""
        return self._folded_rows + self._buffered_rows

    def update(self, rows: Tensor) -> None:
        """Add rows [R, D] float32, as the store holds them.

        Raises:
            TypeError, ValueError: another dtype or shape, a value that is not finite.
        """
        if rows.dtype != torch.float32:
            raise TypeError(f"rows: expected float32, got {dtype_name(rows.dtype)}")
        if rows.ndim != 2 or rows.shape[1] != self.layout.dim:
            raise ValueError(f"rows: expected [R, {self.layout.dim}], got {list(rows.shape)}")
        self._check_finite(rows)
        self.update_finite(rows)

    def update_finite(self, rows: Tensor) -> None:
        """Add finite rows [R, D]; they are folded into the sums `fold_rows` at a time."""
        rows = rows.detach().cpu()
        self._version += 1
        while rows.shape[0]:
            if self._buffered_rows == 0 and rows.shape[0] >= self.fold_rows:
                self._fold(rows[: self.fold_rows])
                rows = rows[self.fold_rows :]
                continue
            if self._buffer is None:
                self._buffer = torch.empty(self.fold_rows, self.layout.dim)
            taken = min(self.fold_rows - self._buffered_rows, rows.shape[0])
            end = self._buffered_rows + taken
            self._buffer[self._buffered_rows : end] = rows[:taken]
            rows = rows[taken:]
            self._buffered_rows = end
            if end == self.fold_rows:
                self._fold(self._buffer)
                self._buffered_rows = 0

    def merge(self, other: RawCurvature) -> RawCurvature:
        """Add another curvature's sums and count (another shard's or rank's); returns self."""
        self._check_layout("other", other.layout)
        for i, dtype in enumerate(self._dtypes):
            theirs, exponent = other._snapshot(i)
            if theirs is None:
                continue
            mine = self._reserve(i, exponent)
            unit = 4.0 ** (exponent - self._exponents[i])
            mine += (theirs.double() * unit).to(dtype)
        self._folded_rows += other.count
        self._version += 1
        return self

    def covariance(self, name: str) -> Tensor:
        """Σ g gᵀ of one module, [K, K] float64, both triangles.

        Raises:
            KeyError: no module has the name.
        """
        if name not in self.layout.names:
            raise KeyError(f"no module '{name}'; there are {self.layout.names}")
        return self._symmetric(self.layout.names.index(name))

    @property
    def covariances(self) -> dict[str, Tensor]:
        """Every module's covariance, {name: [K, K] float64}."""
        return {name: self._symmetric(i) for i, name in enumerate(self.layout.names)}

    @property
    def checksum(self) -> str:
        """A hash of the sums, the count and the layout: equal bits, equal checksum."""
        if self._checksum is None or self._checksum[0] != self._version:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(repr((self.kind, self.count, self.layout.signature)).encode())
            for i in range(len(self.layout)):
                sums, exponent = self._snapshot(i)
                digest.update(repr((exponent, None if sums is None else sums.dtype)).encode())
                if sums is not None:
                    digest.update(sums.numpy().data)
            self._checksum = (self._version, digest.hexdigest())
        return self._checksum[1]

    def save(self, store: Store) -> None:
        """Write the sums into the store under the name "raw"; no damping is part of them."""
        self._check_layout("store", store.layout)
        tensors: dict[str, np.ndarray] = {}
        exponents: dict[str, int] = {}
        for i, module in enumerate(self.layout):
            sums, exponent = self._snapshot(i)
            if sums is None:
                sums = torch.zeros(module.size, module.size, dtype=self._dtypes[i])
            tensors[module.name] = sums.numpy()
            exponents[module.name] = exponent
        meta = {
            "kind": self.kind,
            "count": self.count,
            "exponents": exponents,
            "checksum": self.checksum,
        }
        store.save_curvature(self.kind, tensors, meta)

    @classmethod
    def load(cls, store: Store) -> RawCurvature:
        """The sums that a store holds, checked against their checksum."""
        if cls.kind not in store.curvatures:
            raise ValueError(
                f"{store.path}: holds no curvature; compute it from the rows with "
                "RawCurvature.rebuild(store).save(store), or ask for curvature='none'"
            )
        tensors, meta = store.load_curvature(cls.kind)
        curvature = cls(store.layout)
        rebuild = "rebuild it with RawCurvature.rebuild(store).save(store)"
        try:
            curvature._exponents = [int(meta["exponents"][name]) for name in store.layout.names]
            curvature._folded_rows = int(meta["count"])
            checksum = meta["checksum"]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{store.path}: curvature 'raw' lacks its exponents, count or checksum; {rebuild}"
            ) from None
        for i, module in enumerate(store.layout):
            if module.name not in tensors:
                raise ValueError(f"{store.path}: curvature 'raw' lacks module '{module.name}'")
            sums = torch.from_numpy(np.array(tensors[module.name]))
            size = module.size
            if tuple(sums.shape) != (size, size):
                raise ValueError(
                    f"{store.path}: curvature 'raw' of module '{module.name}': "
                    f"expected [{size}, {size}], got {list(sums.shape)}"
                )
            curvature._dtypes[i] = sums.dtype
            curvature._sums[i] = sums if bool(sums.any()) else None
        if curvature.checksum != checksum:
            raise ValueError(
                f"{store.path}: curvature 'raw' does not match its checksum; {rebuild}"
            )
        return curvature

    def mean_eigenvalues(self) -> list[float]:
        """trace(H) / K of each module.

        Raises:
            ValueError: one is not finite.
        """
        return [self._trace(i) / size for i, size in enumerate(self.layout.sizes)]

    def _preconditioner(
        self, means: Sequence[float], dampings: Sequence[float], solver: str
    ) -> Preconditioner:
        version = self._version

        def moment(i: int) -> Tensor:
            if self._version != version:
                raise RuntimeError("curvature: rows came in since damped(); ask it for another")
            return self._moment(i)

        precisions = [torch.finfo(dtype).eps for dtype in self._dtypes]
        matrices = ModuleMatrices(self.kind, self.checksum, self.layout, means, precisions, moment)
        if solver == "eigh":
            return EigenPreconditioner(matrices, dampings, self._eigendecompositions())
        return CholeskyPreconditioner(matrices, dampings)

    def _check_finite(self, rows: Tensor) -> None:
        finite = rows.isfinite()
        if finite.all():
            return
        row, column = (int(v) for v in (~finite).nonzero()[0])
        raise ValueError(
            f"rows: row {row} is not finite in module '{self.layout.module_of(column).name}'"
        )

    def _fold(self, block: Tensor) -> None:
        for i, columns in enumerate(self.layout.split(block)):
            self._fold_module(i, columns)
        self._folded_rows += block.shape[0]

    def _fold_module(self, i: int, columns: Tensor) -> None:
        exponent = _exponent(columns)
        if exponent is None:
            return
        sums = self._reserve(i, exponent)
        unit = self._exponents[i]
        ops.covariance_update_(sums, columns * 2.0**-unit if unit else columns)

    def _reserve(self, i: int, exponent: int) -> Tensor:
        """The sums of module i, in a unit that holds gradients up to 2**exponent."""
        sums = self._sums[i]
        if sums is None:
            size = self.layout.sizes[i]
            sums = self._sums[i] = torch.zeros(size, size, dtype=self._dtypes[i])
            self._exponents[i] = exponent
        elif exponent > self._exponents[i] + HEADROOM_EXPONENT:
            sums *= 4.0 ** (self._exponents[i] - exponent)
            self._exponents[i] = exponent
        return sums

    def _snapshot(self, i: int) -> tuple[Tensor | None, int]:
        """Module i's lower triangle with the buffered rows in it, and its unit.

        The sums themselves stay as they are: folding a part of a block early would change how
        later rows are grouped, and so their bits.
        """
        if self._buffer is None or not self._buffered_rows:
            return self._sums[i], self._exponents[i]
        part = RawCurvature([self.layout[i]], self._dtypes[i])
        kept = self._sums[i]
        part._sums, part._exponents = [None if kept is None else kept.clone()], [self._exponents[i]]
        part._fold_module(0, self._buffer[: self._buffered_rows, self.layout.columns[i]])
        return part._sums[0], part._exponents[0]

    def _symmetric(self, i: int) -> Tensor:
        size = self.layout.sizes[i]
        sums, exponent = self._snapshot(i)
        if sums is None:
            return torch.zeros(size, size, dtype=torch.float64)
        lower = sums.double().tril() * 4.0**exponent
        return lower + lower.tril(-1).T

    def _moment(self, i: int) -> Tensor:
        """H of module i, [K, K] float64."""
        return self._symmetric(i) / self.count

    def _trace(self, i: int) -> float:
        sums, exponent = self._snapshot(i)
        if sums is None:
            return 0.0
        trace = math.fsum(sums.diagonal().tolist()) * 4.0**exponent / self.count
        if not math.isfinite(trace):
            raise ValueError(f"module '{self.layout.names[i]}': H is not finite; rebuild it")
        return trace

    def _eigendecompositions(self) -> list[tuple[Tensor, Tensor]]:
        if self._eigen is None or self._eigen[0] != self._version:
            pairs = each_module(len(self.layout), lambda i: torch.linalg.eigh(self._moment(i)))
            self._eigen = (self._version, [(pair[0], pair[1]) for pair in pairs])
        return self._eigen[1]


def _exponent(columns: Tensor) -> int | None:
    """e with the largest |value| in [2**(e-1), 2**e); None where all are zero."""
    low, high = torch.aminmax(columns) if columns.numel() else (columns.new_zeros(()),) * 2
    largest = max(-float(low), float(high))
    # 2**-e must be a float32, which 2**127 still is
    return max(math.frexp(largest)[1], -126) if largest else None
