"""Rows, queries and covariances that every library is given, and their scores in float64."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from logra_kernels.store import Module

DAMPING_SCALE = 0.1  # λ over the mean eigenvalue, the same for every library


class InfluenceSetting:
    """N rows of D = modules · rank² numbers whose spectrum decays, as that of gradients does."""

    def __init__(
        self,
        rank: int,
        num_modules: int,
        num_rows: int,
        most_queries: int,
        checked: int | None = None,  # rows whose scores are compared with float64; None: all
    ) -> None:
        torch.manual_seed(0)
        self.rank, self.checked = rank, checked or num_rows
        self._known: dict[str, Tensor] = {}
        self.modules = [Module(f"module.{index}", rank, rank) for index in range(num_modules)]
        self.rows = torch.empty(num_rows, num_modules * rank**2)
        self.queries = torch.empty(most_queries, self.rows.shape[1])
        for columns in range(0, self.rows.shape[1], rank**2):
            scale = torch.logspace(0, -1.5, rank**2)  # standard deviations of the coordinates
            for target in (self.rows, self.queries):
                part = torch.randn(len(target), rank**2) * scale
                target[:, columns : columns + rank**2] = part.roll(columns // rank**2, dims=1)

    def title(self, num_queries: int) -> str:
        """The setting's sizes in words."""
        n, d = self.rows.shape
        return f"Q={num_queries}, N={n}, D={d} ({len(self.modules)} modules of {self.rank}²)"

    @cached_property
    def covariances(self) -> dict[str, Tensor]:
        """(1/N) Σ g gᵀ of each module, [K, K] float64 (from float32 products)."""
        return {
            module.name: (part.T @ part).double() / len(part)
            for module, part in zip(self.modules, self._parts(self.rows), strict=True)
        }

    @cached_property
    def _factors(self) -> list[Tensor]:
        """Cholesky factors of H + λI, float64."""
        factors = []
        for covariance in self.covariances.values():
            damped = covariance.clone()
            damped.diagonal().add_(DAMPING_SCALE * covariance.diagonal().mean())
            factors.append(torch.linalg.cholesky(damped))
        return factors

    def expected(self, num_queries: int, mode: str) -> Tensor:
        """[Q, checked] float64. Modes have our names; "identity" is the gradients' dot product."""
        if mode not in self._known:
            self._known[mode] = self._scores(mode)
        return self._known[mode][:num_queries]

    def _scores(self, mode: str) -> Tensor:
        rows = self.rows[: self.checked]
        if mode == "identity":
            return self.queries.double() @ rows.double().T
        scores = torch.zeros(len(self.queries), len(rows), dtype=torch.float64)
        row_squares = torch.zeros(len(rows), dtype=torch.float64)
        query_squares = torch.zeros(len(self.queries), dtype=torch.float64)
        parts = zip(self._factors, self._parts(self.queries), self._parts(rows), strict=True)
        for factor, query, row in parts:
            query = torch.cholesky_solve(query.double().T, factor)
            scores += query.T @ row.double().T
            if mode != "dot":
                row = torch.linalg.solve_triangular(factor, row.double().T, upper=False)
                row_squares += row.square().sum(0)
                query_squares += (factor.T @ query).square().sum(0)
        if mode in ("l-relatif", "whitened-cosine"):
            scores /= row_squares.sqrt()
        if mode == "whitened-cosine":
            scores /= query_squares.sqrt()[:, None]
        return scores

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = rows.split(self.rank**2, dim=1)
        return parts
