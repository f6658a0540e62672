"""The raw curvature of chosen coordinates, shrunk towards its diagonal.

N rows determine E[t_i t_j] of two coordinates only roughly: taken as it comes, it is inverted with
its errors. The diagonal alone, which is EK-FAC's curvature, leaves all of these out. Between the
two lies, per module and in the units in which rows hold the coordinates,

    H = diag(Λ) + (1 − ρ)(E[t tᵀ] − diag(Λ))     ρ = Σ_{i≠j} Var(H_ij) / Σ_{i≠j} H_ij²

ρ is at most 1. Var(H_ij) = (E[t_i² t_j²] − H_ij²) / N, whose first terms add up to
Σ_{i≠j} E[t_i² t_j²] = E[|t|⁴ − Σ_i t_i⁴]: a number for each row.

Source: Schäfer and Strimmer 2005, A Shrinkage Approach to Large-Scale Covariance Matrix Estimation
(its target D); Ledoit and Wolf 2004.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from logra_kernels.curvature.base import register_curvature
from logra_kernels.curvature.diagonal import CoordinateCurvature
from logra_kernels.curvature.moment import Squares, sum_by_halves
from logra_kernels.curvature.preconditioner import Preconditioner, ScaledRows
from logra_kernels.curvature.raw import RawCurvature
from logra_kernels.progress import Progress
from logra_kernels.store import Module, Store


@register_curvature
class ShrunkCurvature(CoordinateCurvature, RawCurvature):
    """Σ t tᵀ of each module's part of the rows, [K, K], kept as `RawCurvature` keeps it.

    Arguments as in `Curvature`. λ is relative to the mean of E[g²] over all coordinates of the
    module's weight, as it is for the diagonal curvature.
    """

    kind = "shrunk"
    rank_by_rows = False  # what the rows do not determine is shrunk away

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        super().__init__(modules, dtype)
        # Of |t_i t_j|, i ≠ j, over a row's products in each module.
        self._products = Squares(len(self.layout))

    def update_finite(self, rows: Tensor) -> None:
        """Add finite rows [R, D] float32."""
        super().update_finite(rows)
        parts = [part.double().square() for part in self.layout.split(rows.detach().cpu())]
        norms = [
            (sum_by_halves(part, 1).square() - sum_by_halves(part.square(), 1)).clamp(min=0).sqrt()
            for part in parts
        ]
        self._products.update(torch.stack(norms, dim=1).float())

    def merge(self, other: ShrunkCurvature) -> ShrunkCurvature:
        """Add another curvature's sums and count (another shard's or rank's); returns self."""
        super().merge(other)
        self._products.merge(other._products)
        return self

    def complete(self, store: Store, progress: Progress = None) -> None:
        """Take from the store how much of a module's gradient its rows hold, and by what scale."""
        super().complete(store, progress)
        self._eigen = None  # of other scales

    @classmethod
    def load(cls, store: Store) -> ShrunkCurvature:
        """The sums that a store holds, checked against their checksum."""
        curvature = super().load(store)
        curvature.complete(store)
        return curvature

    @property
    def checksum(self) -> str:
        """A hash of the sums, the count and the layout: equal bits, equal checksum."""
        digest = hashlib.blake2b(super().checksum.encode(), digest_size=16)
        digest.update(self._products.total().numpy().data)
        return digest.hexdigest()

    def _described(self, checksum: str) -> dict[str, Any]:
        return {**super()._described(checksum), "products": self._products.total().tolist()}

    def _take(self, meta: Mapping[str, Any]) -> None:
        super()._take(meta)
        sums = torch.tensor(meta["products"], dtype=torch.float64).view(len(self.layout))
        self._products = Squares.of(sums, int(meta["count"]))

    @property
    def eigenvalues(self) -> dict[str, Tensor]:
        """{module name: Λ = E[t²] of its columns, as rows hold them, [K] float64}."""
        sums = self.covariances
        return {name: sums[name].diagonal() / max(self.count, 1) for name in self.layout.names}

    @property
    def shrinkages(self) -> dict[str, float]:
        """{module name: ρ}."""
        whole = super()._moment
        return {name: self._shrinkage(i, whole(i)) for i, name in enumerate(self.layout.names)}

    def _preconditioner(
        self, means: Sequence[float], dampings: Sequence[float], solver: str
    ) -> Preconditioner:
        return ScaledRows(super()._preconditioner(means, dampings, solver), self._scales)

    def _moment(self, i: int) -> Tensor:
        """H of module i, of g, [K, K] float64."""
        h = super()._moment(i)
        diagonal = h.diagonal().clone()
        h *= 1 - self._shrinkage(i, h)
        h.diagonal().copy_(diagonal)
        s = self._scales[i]
        return h if s is None else h / torch.outer(s.double(), s.double())

    def _shrinkage(self, i: int, h: Tensor) -> float:
        """ρ of module i, whose E[t tᵀ] is h [K, K]; 1 where coordinates have no products."""
        squares = float(h.square().sum() - h.diagonal().square().sum())  # Σ_{i≠j} H_ij²
        if squares <= 0:
            return 1.0
        errors = (float(self._products.total()[i]) / self.count - squares) / self.count
        return min(1.0, max(0.0, errors / squares))
