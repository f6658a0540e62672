"""The raw projected curvature: H = (1/N) Σ g gᵀ per module."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from logra_kernels.curvature.base import Curvature, register_curvature
from logra_kernels.curvature.moment import FOLD_ROWS, Moment
from logra_kernels.curvature.preconditioner import (
    CholeskyPreconditioner,
    EigenPreconditioner,
    ModuleMatrices,
    Preconditioner,
    each_module,
)
from logra_kernels.defaults import CURVATURE
from logra_kernels.store import Module, Store

R = TypeVar("R", bound="RawCurvature")

# Buffers of rows that wait to be folded take at most this.
FOLD_BYTES = 256 << 20


@register_curvature
class RawCurvature(Curvature):
    """Per-module covariance of the stored rows: Σ g gᵀ [K, K], and the number of rows.

    H = covariance / count. The sums are float64 up to K = 1024 and float32 above, unless asked
    otherwise. Rows are folded in blocks counted from the first row, so that the bits do not depend
    on how the rows were split into calls. Arguments as in `Curvature`.
    """

    kind = "raw"
    rank_by_rows = True

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        super().__init__(modules, dtype)
        self.fold_rows = max(1, min(FOLD_ROWS, FOLD_BYTES // (4 * self.layout.dim)))
        self._moments = [Moment(size, dtype, self.fold_rows) for size in self.layout.sizes]
        self._version = 0
        self._checksum: tuple[int, str] | None = None
        self._eigen: tuple[int, list[tuple[Tensor, Tensor]]] | None = None

    @property
    def count(self) -> int:
        """The number of rows seen."""
        return self._moments[0].count

    def update(self, rows: Tensor) -> None:
        """Add rows [R, D] float32, as the store holds them.

        Raises:
            TypeError, ValueError: another dtype or shape, a value that is not finite.
        """
        self._check_rows(rows)
        self.update_finite(rows)

    def update_finite(self, rows: Tensor) -> None:
        """Add finite rows [R, D]; they are folded into the sums `fold_rows` at a time."""
        rows = rows.detach().cpu()
        self._version += 1
        for moment, columns in zip(self._moments, self.layout.split(rows), strict=True):
            moment.update(columns)

    def merge(self: R, other: R) -> R:
        """Add another curvature's sums and count (another shard's or rank's); returns self."""
        self._check_same(other)
        for mine, theirs in zip(self._moments, other._moments, strict=True):
            mine.merge(theirs)
        self._version += 1
        return self

    def covariance(self, name: str) -> Tensor:
        """Σ g gᵀ of one module, [K, K] float64, both triangles.

        Raises:
            KeyError: no module has the name.
        """
        if name not in self.layout.names:
            raise KeyError(f"no module '{name}'; there are {self.layout.names}")
        return self._moments[self.layout.names.index(name)].symmetric()

    @property
    def covariances(self) -> dict[str, Tensor]:
        """Every module's covariance, {name: [K, K] float64}."""
        each = zip(self.layout.names, self._moments, strict=True)
        return {name: moment.symmetric() for name, moment in each}

    @property
    def checksum(self) -> str:
        """A hash of the sums, the count and the layout: equal bits, equal checksum."""
        if self._checksum is None or self._checksum[0] != self._version:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(repr((self.kind, self.count, self.layout.signature)).encode())
            for moment in self._moments:
                sums, exponent = moment.snapshot()
                digest.update(repr((exponent, None if sums is None else sums.dtype)).encode())
                if sums is not None:
                    digest.update(sums.numpy().data)
            self._checksum = (self._version, digest.hexdigest())
        return self._checksum[1]

    def save(self, store: Store) -> None:
        """Write the sums into the store under the kind's name; no damping is part of them."""
        self._check_layout("store", store.layout)
        tensors: dict[str, np.ndarray] = {}
        exponents: dict[str, int] = {}
        for module, moment in zip(self.layout, self._moments, strict=True):
            sums, exponent = moment.snapshot()
            if sums is None:
                sums = torch.zeros(module.size, module.size, dtype=moment.dtype)
            tensors[module.name] = sums.numpy()
            exponents[module.name] = exponent
        meta = {**self._described(self.checksum), "exponents": exponents}
        store.save_curvature(self.kind, tensors, meta)

    @classmethod
    def load(cls: type[R], store: Store) -> R:
        """The sums that a store holds, checked against their checksum."""
        rebuild = f"{cls.__name__}.rebuild(store).save(store)"
        if cls.kind not in store.curvatures:
            what = "no curvature" if cls.kind == CURVATURE else f"no curvature '{cls.kind}'"
            raise ValueError(
                f"{store.path}: holds {what}; compute it from the rows with {rebuild}, or ask for "
                "curvature='none'"
            )
        tensors, meta = store.load_curvature(cls.kind)
        curvature = cls(store.layout)
        damaged = f"{store.path}: curvature '{cls.kind}'"
        rebuild = f"rebuild it with {rebuild}"
        try:
            exponents = [int(meta["exponents"][name]) for name in store.layout.names]
            count = int(meta["count"])
            checksum = meta["checksum"]
            curvature._take(meta)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
            raise ValueError(
                f"{damaged} lacks its exponents, count or checksum; {rebuild}"
            ) from None
        for i, module in enumerate(store.layout):
            if module.name not in tensors:
                raise ValueError(f"{damaged} lacks module '{module.name}'")
            sums = torch.from_numpy(np.array(tensors[module.name]))
            size = module.size
            if tuple(sums.shape) != (size, size):
                raise ValueError(
                    f"{damaged} of module '{module.name}': "
                    f"expected [{size}, {size}], got {list(sums.shape)}"
                )
            curvature._moments[i] = Moment.of(
                sums, exponents[i], count, fold_rows=curvature.fold_rows
            )
        if curvature.checksum != checksum:
            raise ValueError(f"{damaged} does not match its checksum; {rebuild}")
        return curvature

    def _take(self, meta: Mapping[str, Any]) -> None:
        """What `_described` gave, beside the checksum."""
        self.labels = meta.get("labels", "data")

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

        precisions = [torch.finfo(moment.dtype).eps for moment in self._moments]
        matrices = ModuleMatrices(self.kind, self.checksum, self.layout, means, precisions, moment)
        if solver == "eigh":
            return EigenPreconditioner(matrices, dampings, self._eigendecompositions())
        return CholeskyPreconditioner(matrices, dampings)

    def _moment(self, i: int) -> Tensor:
        """H of module i, [K, K] float64."""
        return self._moments[i].symmetric() / self.count

    def _trace(self, i: int) -> float:
        trace = self._moments[i].trace() / self.count
        if not math.isfinite(trace):
            raise ValueError(f"module '{self.layout.names[i]}': H is not finite; rebuild it")
        return trace

    def _eigendecompositions(self) -> list[tuple[Tensor, Tensor]]:
        if self._eigen is None or self._eigen[0] != self._version:
            pairs = each_module(len(self.layout), lambda i: torch.linalg.eigh(self._moment(i)))
            self._eigen = (self._version, [(pair[0], pair[1]) for pair in pairs])
        return self._eigen[1]
