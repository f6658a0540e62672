"""The raw projected curvature: H = (1/N) sum of g g^T per module, and its damping.

The sum and the count are kept apart, so that shards and ranks merge by addition. Damping goes in,
a preconditioner comes out: nothing is remembered from one damping to the next.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.curvature.preconditioner import (
    CholeskyPreconditioner,
    EigenPreconditioner,
    IdentityPreconditioner,
    Preconditioner,
    each_module,
)
from logra_kernels.progress import Progress, track
from logra_kernels.rows import dtype_name, layout, module_of, split_columns, stored_rows
from logra_kernels.store import Module, Store

__all__ = ["IdentityPreconditioner", "Preconditioner", "RawCurvature", "check_damping"]

DEFAULT_DAMPING_SCALE = 0.1
SOLVERS = ("cholesky", "eigh")

# Rows are folded into the covariance this many at a time: a call reads and writes K^2 sums, which
# 256 rows' K^2 / 2 multiply-adds each outweigh on every machine measured.
FOLD_ROWS = 256
FOLD_BYTES = 256 << 20
# Above this K a float64 covariance costs 8 K^2 > 8 MiB a module, and its update twice the time.
FLOAT64_LARGEST_K = 1024
# A covariance is rescaled when a block's largest gradient passes 2**8 times its unit; float32
# sums then hold 2**100 more before they overflow.
HEADROOM_EXPONENT = 8


class RawCurvature:
    """Per-module covariance of the stored rows: sum of g g^T, [K, K], and the number of rows.

    Args:
        modules: the row's layout, in the store's order.
        dtype: float64, float32, or None for float64 up to K = 1024 and float32 above.
    """

    kind = "raw"

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        if not modules:
            raise ValueError("modules: expected at least one, got none")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype: expected float32, float64 or None, got {dtype}")
        self.modules = list(modules)
        self.dim = sum(module.size for module in self.modules)
        self.fold_rows = max(1, min(FOLD_ROWS, FOLD_BYTES // (4 * self.dim)))
        self._dtypes = [dtype or _default_dtype(module.size) for module in self.modules]
        # allocated by the first non-zero block: a module without gradients costs nothing
        self._sums: list[Tensor | None] = [None] * len(self.modules)
        self._exponents = [0] * len(self.modules)  # gradients are in units of 2**exponent
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

        Rows are folded in blocks counted from the first row, so that the bits do not depend on how
        they were split into calls.
        """
        if rows.dtype != torch.float32:
            raise TypeError(f"rows: expected float32, got {dtype_name(rows.dtype)}")
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"rows: expected [R, {self.dim}], got {list(rows.shape)}")
        rows = rows.detach().cpu()
        self._check_finite(rows)
        self._version += 1
        while rows.shape[0]:
            if self._buffered_rows == 0 and rows.shape[0] >= self.fold_rows:
                self._fold(rows[: self.fold_rows])
                rows = rows[self.fold_rows :]
                continue
            if self._buffer is None:
                self._buffer = torch.empty(self.fold_rows, self.dim)
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
        if layout(other.modules) != layout(self.modules):
            raise ValueError(
                f"other: expected the modules {layout(self.modules)}, got {layout(other.modules)}"
            )
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
        """The sum of g g^T of one module, [K, K] float64, both triangles, in true scale."""
        index = next((i for i, m in enumerate(self.modules) if m.name == name), None)
        if index is None:
            raise KeyError(f"no module '{name}'; there are {[m.name for m in self.modules]}")
        return self._symmetric(index)

    @property
    def covariances(self) -> dict[str, Tensor]:
        """Every module's covariance, {name: [K, K] float64}."""
        return {module.name: self._symmetric(i) for i, module in enumerate(self.modules)}

    @property
    def checksum(self) -> str:
        """A hash of the sums, the count and the layout: equal bits, equal checksum."""
        if self._checksum is None or self._checksum[0] != self._version:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(repr((self.kind, self.count, layout(self.modules))).encode())
            for i in range(len(self.modules)):
                sums, exponent = self._snapshot(i)
                digest.update(repr((exponent, None if sums is None else sums.dtype)).encode())
                if sums is not None:
                    digest.update(sums.numpy().data)
            self._checksum = (self._version, digest.hexdigest())
        return self._checksum[1]

    def save(self, store: Store) -> None:
        """Write the sums into the store as its curvature "raw" (no damping is part of it)."""
        if layout(store.modules) != layout(self.modules):
            raise ValueError(
                f"store: expected the modules {layout(self.modules)}, got {layout(store.modules)}"
            )
        tensors: dict[str, np.ndarray] = {}
        exponents: dict[str, int] = {}
        for i, module in enumerate(self.modules):
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
        """The curvature "raw" a store holds.

        Raises:
            ValueError: the store has none, or its file does not match its checksum.
        """
        if cls.kind not in store.curvatures:
            raise ValueError(
                f"{store.path}: holds no curvature; compute it from the rows with "
                "RawCurvature.rebuild(store).save(store), or ask for curvature='none'"
            )
        tensors, meta = store.load_curvature(cls.kind)
        curvature = cls(store.modules)
        for i, module in enumerate(store.modules):
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
            curvature._exponents[i] = int(meta["exponents"][module.name])
            curvature._sums[i] = sums if bool(sums.any()) else None
        curvature._folded_rows = int(meta["count"])
        if curvature.checksum != meta["checksum"]:
            raise ValueError(
                f"{store.path}: curvature 'raw' does not match its checksum; rebuild it with "
                "RawCurvature.rebuild(store).save(store)"
            )
        return curvature

    @classmethod
    def rebuild(
        cls, store: Store, dtype: torch.dtype | None = None, progress: Progress = None
    ) -> RawCurvature:
        """The curvature of a store's rows, block by block; equal bits to one kept while logging."""
        curvature = cls(store.modules, dtype)
        done = track(progress, store.num_rows, "curvature")
        for _, rows, row_scale in store.blocks(curvature.fold_rows):
            curvature.update(stored_rows(store, rows, row_scale))
            done(rows.shape[0])
        return curvature

    def damped(
        self,
        damping_scale: float | None = None,
        damping: float | None = None,
        solver: str = "cholesky",
    ) -> Preconditioner:
        """(H + lambda I)^-1 for one damping.

        lambda = damping_scale * mean eigenvalue of H = damping_scale * trace(H) / K per module, or
        lambda = damping for every module. With neither, damping_scale is 0.1. Everything is
        factorised in float64.

        Args:
            damping_scale: relative damping, >= 0.
            damping: absolute damping, >= 0; only one of the two.
            solver: "cholesky" refuses a singular H + lambda I; "eigh" takes its pseudo-inverse
                (eigenvalues within K eps of zero are dropped) and keeps its eigendecomposition for
                the next damping.

        A module whose covariance is zero has mean eigenvalue 0 and no inverse: its scores are zero,
        and a warning names it.
        """
        damping_scale, damping = check_damping(damping_scale, damping)
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got '{solver}'")
        if self.count == 0:
            raise ValueError("curvature: expected at least one row, got none")
        means = [self._trace(i) / module.size for i, module in enumerate(self.modules)]
        lambdas = [damping_scale * mean if damping is None else damping for mean in means]
        silent = [m.name for i, m in enumerate(self.modules) if self._is_zero(i) and not lambdas[i]]
        if silent:
            warnings.warn(
                f"no gradient ever reached {', '.join(silent)}: "
                "its curvature is zero, and so are its scores",
                stacklevel=2,
            )
        if solver == "eigh":
            return EigenPreconditioner(self, means, lambdas, self._eigendecompositions())
        return CholeskyPreconditioner(self, means, lambdas)

    def sweep(
        self, damping_scales: Sequence[float] | None = None, dampings: Sequence[float] | None = None
    ) -> Iterator[Preconditioner]:
        """One preconditioner per damping, from one eigendecomposition."""
        if (damping_scales is None) == (dampings is None):
            raise ValueError("sweep: expected damping_scales or dampings, one of the two")
        for value in damping_scales or ():
            yield self.damped(damping_scale=value, solver="eigh")
        for value in dampings or ():
            yield self.damped(damping=value, solver="eigh")

    def _check_finite(self, rows: Tensor) -> None:
        finite = rows.isfinite()
        if finite.all():
            return
        row, column = (int(v) for v in (~finite).nonzero()[0])
        raise ValueError(
            f"rows: row {row} is not finite in module '{module_of(self.modules, column).name}'"
        )

    def _fold(self, block: Tensor) -> None:
        for i, columns in enumerate(split_columns(block, self.modules)):
            self._fold_module(i, columns)
        self._folded_rows += block.shape[0]

    def _fold_module(self, i: int, columns: Tensor) -> None:
        exponent = _exponent(columns)
        if exponent is None:
            return
        _add(self._reserve(i, exponent), columns, self._exponents[i])

    def _reserve(self, i: int, exponent: int) -> Tensor:
        """The sums of module i, in a unit that holds gradients up to 2**exponent."""
        sums = self._sums[i]
        if sums is None:
            size = self.modules[i].size
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
        part = RawCurvature([self.modules[i]], self._dtypes[i])
        kept = self._sums[i]
        part._sums, part._exponents = [None if kept is None else kept.clone()], [self._exponents[i]]
        columns = split_columns(self._buffer[: self._buffered_rows], self.modules)[i]
        part._fold_module(0, columns)
        return part._sums[0], part._exponents[0]

    def _symmetric(self, i: int) -> Tensor:
        size = self.modules[i].size
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
            raise ValueError(f"module '{self.modules[i].name}': H is not finite; rebuild it")
        return trace

    def _is_zero(self, i: int) -> bool:
        if self._sums[i] is not None:
            return False
        if self._buffer is None:
            return True
        columns = split_columns(self._buffer[: self._buffered_rows], self.modules)[i]
        return not bool(columns.any())

    def _eigendecompositions(self) -> list[tuple[Tensor, Tensor]]:
        if self._eigen is None or self._eigen[0] != self._version:
            pairs = each_module(len(self.modules), lambda i: torch.linalg.eigh(self._moment(i)))
            self._eigen = (self._version, [(pair[0], pair[1]) for pair in pairs])
        return self._eigen[1]


def check_damping(damping_scale: float | None, damping: float | None) -> tuple[float, float | None]:
    """(damping_scale, damping) with the default filled in; the scale is unused beside a damping."""
    if damping_scale is not None and damping is not None:
        raise ValueError(
            "damping_scale, damping: expected one of the two, "
            f"got damping_scale={damping_scale} and damping={damping}"
        )
    for name, value in (("damping_scale", damping_scale), ("damping", damping)):
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    if damping is not None:
        return 0.0, float(damping)
    return (DEFAULT_DAMPING_SCALE if damping_scale is None else float(damping_scale)), None


def _add(sums: Tensor, columns: Tensor, exponent: int) -> None:
    """sums += columns^T columns in units of 4**exponent, lower triangle."""
    if exponent:
        columns = columns * 2.0**-exponent
    ops.covariance_update_(sums, columns)


def _exponent(columns: Tensor) -> int | None:
    """e with the largest |value| in [2**(e-1), 2**e); None where all are zero."""
    low, high = torch.aminmax(columns) if columns.numel() else (columns.new_zeros(()),) * 2
    largest = max(-float(low), float(high))
    # 2**-e must be a float32, which 2**127 still is
    return max(math.frexp(largest)[1], -126) if largest else None


def _default_dtype(size: int) -> torch.dtype:
    return torch.float64 if size <= FLOAT64_LARGEST_K else torch.float32
