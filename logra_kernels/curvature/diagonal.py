"""The diagonal curvature: Λ = E[g²] of each coordinate, for rows in an eigenbasis.

In the eigenbasis of the two sides' moments H is nearly diagonal, and Λ are EK-FAC's corrected
eigenvalues. The damping is relative to the mean of Λ over all Ko·Ki coordinates of the module's
weight, of which a row of the projection "eigen" holds the largest: the store says how large a share
of the gradients' energy E‖G‖² they hold.

Such a row holds t = s·g, whitened by the pilot's s. The sums are of t², and λ is that of g: a score
is Σ q_t t / (E[t²] + λ s²), which is Σ q_g g / (E[g²] + λ).

Source: EK-FAC (George et al. 2018; Grosse et al. 2023).
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from logra_kernels.curvature.base import Curvature, register_curvature
from logra_kernels.curvature.moment import Squares
from logra_kernels.curvature.preconditioner import DiagonalPreconditioner, Preconditioner
from logra_kernels.progress import Progress
from logra_kernels.projection import stored_scales
from logra_kernels.store import Module, Store


class CoordinateCurvature(Curvature):
    """A curvature whose λ is that of g, also where rows hold t = s·g.

    Arguments as in `Curvature`.
    """

    of_coordinates = True

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        super().__init__(modules, dtype)
        # Per module: coordinates of the weight's gradient, and the share of its energy in a row.
        self._whole = [(float(size), 1.0) for size in self.layout.sizes]
        self._scales: list[Tensor | None] = [None] * len(self.layout)  # s [K] of each module

    @property
    @abstractmethod
    def eigenvalues(self) -> dict[str, Tensor]:
        """{module name: Λ = E[t²] of its columns, as rows hold them, [K] float64}."""

    def complete(self, store: Store, progress: Progress = None) -> None:
        """Take from the store how much of a module's gradient its rows hold, and by what scale."""
        self._scales = stored_scales(store)
        described = store.projection if isinstance(store.projection, dict) else {}
        shares = described.get("energy_shares", {})
        for i, name in enumerate(self.layout.names):
            if name in shares:
                width_in, width_out = described["widths"][name]
                self._whole[i] = float(width_in * width_out), float(shares[name])

    def mean_eigenvalues(self) -> list[float]:
        """The mean of E[g²] over all coordinates of each module's weight."""
        each = zip(self.eigenvalues.values(), self._scales, self._whole, strict=True)
        return [
            float((values if s is None else values / s.double().square()).sum()) / share / whole
            for values, s, (whole, share) in each
        ]


@register_curvature
class DiagonalCurvature(CoordinateCurvature):
    """Σ g² of each coordinate of the rows, in float64. Arguments as in `Curvature`.

    Raises:
        ValueError: also another dtype than float64 or None.
    """

    kind = "diagonal"

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        super().__init__(modules, dtype)
        if dtype not in (None, torch.float64):
            raise ValueError(f"dtype: expected float64 or None for 'diagonal', got {dtype}")
        self._squares = Squares(self.layout.dim)

    @property
    def count(self) -> int:
        """The number of rows seen."""
        return self._squares.count

    def update(self, rows: Tensor) -> None:
        """Add rows [R, D] float32, as the store holds them.

        Raises:
            TypeError, ValueError: another dtype or shape, a value that is not finite.
        """
        self._check_rows(rows)
        self.update_finite(rows)

    def update_finite(self, rows: Tensor) -> None:
        """Add finite rows [R, D] float32."""
        self._squares.update(rows.detach().cpu())

    def merge(self, other: DiagonalCurvature) -> DiagonalCurvature:
        """Add another curvature's sums and count (another shard's or rank's); returns self."""
        self._check_same(other)
        self._squares.merge(other._squares)
        return self

    @property
    def eigenvalues(self) -> dict[str, Tensor]:
        """{module name: Λ of its columns, as rows hold them, [K] float64}."""
        parts = self.layout.split(self._squares.total()[None] / max(self.count, 1))
        return {name: part[0] for name, part in zip(self.layout.names, parts, strict=True)}

    @property
    def checksum(self) -> str:
        """A hash of the sums, the count and the layout: equal bits, equal checksum."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.kind, self.count, self.layout.signature, self._whole)).encode())
        digest.update(self._squares.total().numpy().data)
        for s in self._scales:
            digest.update(b"" if s is None else s.numpy().data)
        return digest.hexdigest()

    def save(self, store: Store) -> None:
        """Write the sums into the store under the name "diagonal"."""
        self._check_layout("store", store.layout)
        squares = self._squares.total().numpy()
        store.save_curvature(self.kind, {"squares": squares}, self._described(self.checksum))

    @classmethod
    def load(cls, store: Store) -> DiagonalCurvature:
        """The sums that a store holds, checked against their checksum."""
        if cls.kind not in store.curvatures:
            raise ValueError(f"{store.path}: holds no curvature 'diagonal'")
        tensors, meta = store.load_curvature(cls.kind)
        rebuild = "rebuild it with DiagonalCurvature.rebuild(store).save(store)"
        curvature = cls(store.layout)
        try:
            sums = torch.from_numpy(np.array(tensors["squares"]))
            curvature._squares = Squares.of(sums.view(store.layout.dim), int(meta["count"]))
            curvature.complete(store)
            matches = curvature.checksum == meta["checksum"]
            curvature.labels = meta.get("labels", "data")
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{store.path}: curvature 'diagonal' lacks {error}; {rebuild}"
            ) from None
        if not matches:
            raise ValueError(
                f"{store.path}: curvature 'diagonal' does not match its checksum; {rebuild}"
            )
        return curvature

    def _preconditioner(
        self, means: Sequence[float], dampings: Sequence[float], solver: str
    ) -> Preconditioner:
        values = list(self.eigenvalues.values())
        return DiagonalPreconditioner(
            self.kind,
            self.checksum,
            self.layout,
            values,
            dampings,
            solver,
            scales=self._scales,
        )
