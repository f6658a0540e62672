"""Projections that are made from the model's own activations: PCA, and the eigenbasis staircase.

A pilot gives for each module C_F = E[x xᵀ] [I, I] and C_B = E[dy dyᵀ] [O, O]. Their eigenvectors of
the largest eigenvalues are P_i and P_o.

    pca     K of each side: a row holds G = P_o (dL/dW) P_iᵀ whole.
    eigen   a row holds the D coordinates, over all modules together, in which the damped inverse
            keeps most of the gradient: those with the largest (Λ / (Λ + λ))², Λ = E[G²] of the
            pilot and λ = 0.1 · mean of Λ over all coordinates of the module's weight. They lie in
            a corner of G, below a staircase. Each is stored times 1 / √(Λ + λ), so that all
            columns of all modules are of about one size.

Sources: Choe et al. 2024, §3.2 (PCA); the basis: EK-FAC (George et al. 2018; Grosse et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logra_kernels.defaults import DAMPING_SCALE
from logra_kernels.projection.spec import ModuleProjection, Rank, Widths, rank_pair

# A side of the block in which coordinates are chosen is at least this wide, and at least this many
# times the side of a square with a module's share of the coordinates.
SMALLEST_BLOCK, BLOCK_SIDES = 64, 4


@dataclass(frozen=True)
class PilotProjection:
    """Projections made from a pilot, and what a store keeps of them beside the matrices."""

    projections: Mapping[str, ModuleProjection]
    described: Mapping[str, object]

    def build(self, widths: Widths) -> dict[str, ModuleProjection]:
        """The projections of modules of these widths {name: (I, O)}.

        Raises: ValueError if the pilot was of other modules.
        """
        for name, (width_in, width_out) in widths.items():
            found = self.projections.get(name)
            if found is None or (found.in_features, found.out_features) != (width_in, width_out):
                raise ValueError(f"init: the pilot was of other modules: {name} is not one of them")
        return {name: self.projections[name] for name in widths}

    def describe(self) -> dict[str, object]:
        """What a store keeps of this, as JSON values."""
        return dict(self.described)


@dataclass(frozen=True)
class Basis:
    """The eigenvectors of one module's moments, as columns, largest eigenvalue first.

    Of one-hot inputs the eigenvectors are the inputs' own axes: `vectors_in` is their order.
    """

    vectors_in: Tensor  # Q_F [I, I] float64, or [I] int64
    vectors_out: Tensor  # Q_B [O, O] float64

    def corner(self, rank_out: int, rank_in: int) -> ModuleProjection:
        """The projection to the first vectors of each side."""
        width_in = len(self.vectors_in)
        if self.vectors_in.ndim == 1:
            proj_in = torch.zeros(min(rank_in, width_in), width_in)
            proj_in.scatter_(1, self.vectors_in[:rank_in, None], 1.0)
        else:
            proj_in = self.vectors_in[:, :rank_in].T.float().contiguous()
        return ModuleProjection(
            width_in,
            len(self.vectors_out),
            proj_in,
            self.vectors_out[:, :rank_out].T.float().contiguous(),
        )


def pca(bases: Mapping[str, Basis], rank: Rank, examples: int) -> PilotProjection:
    """The first K eigenvectors of each side, or all of a side that is narrower."""
    rank_out, rank_in = rank_pair(rank)
    corners = {name: basis.corner(rank_out, rank_in) for name, basis in bases.items()}
    described = {"kind": "pca", "rank": [rank_out, rank_in], "pilot_examples": examples}
    return PilotProjection(corners, described)


def corner_sides(widths: Widths, coordinates: int) -> dict[str, tuple[int, int]]:
    """{module name: (rank_out, rank_in)} of the corners in which the coordinates are chosen.

    Args:
        widths: {module name: (I, O)}.
        coordinates: D, over all modules.
    """
    side = max(SMALLEST_BLOCK, BLOCK_SIDES * math.ceil(math.sqrt(coordinates / len(widths))))
    while True:
        sides = {name: (min(side, o), min(side, i)) for name, (i, o) in widths.items()}
        held = sum(rank_out * rank_in for rank_out, rank_in in sides.values())
        if held >= coordinates or side >= max(max(pair) for pair in widths.values()):
            return sides
        side *= 2


def staircase(
    bases: Mapping[str, Basis],
    eigenvalues: Mapping[str, Tensor],
    energies: Mapping[str, float],
    coordinates: int,
    examples: int,
) -> PilotProjection:
    """The eigenbasis rows of D coordinates over all modules; each module has at least one.

    Args:
        bases: of each module.
        eigenvalues: Λ [ko, ki] float64 of each module, in the corner of its first eigenvectors.
        energies: E‖dL/dW‖² of each module, the sum of Λ over all its coordinates.
        coordinates: D.
        examples: the pilot's.

    Raises: ValueError for fewer coordinates than modules, or more than the corners hold.
    """
    total = sum(values.numel() for values in eigenvalues.values())
    if not len(eigenvalues) <= coordinates <= total:
        raise ValueError(
            f"coordinates: expected {len(eigenvalues)} (one a module) to {total}, got {coordinates}"
        )
    dampings = {name: _damping(energies[name], basis) for name, basis in bases.items()}
    gains = [_gain(eigenvalues[name], dampings[name]) for name in bases]
    kept = _largest(gains, coordinates)
    projections, shares = {}, {}
    for (name, basis), places in zip(bases.items(), kept, strict=True):
        values = eigenvalues[name]
        rows, columns = places // values.shape[1], places % values.shape[1]
        corner = basis.corner(int(rows.max()) + 1, int(columns.max()) + 1)
        chosen = rows * corner.ki + columns
        whitening = _whitening(values.flatten()[places] + dampings[name])
        projections[name] = replace(corner, coordinates=chosen, scale=whitening)
        energy = energies[name]
        shares[name] = min(1.0, float(values.flatten()[places].sum()) / energy) if energy else 1.0
    described = {
        "kind": "eigen",
        "coordinates": coordinates,
        "pilot_examples": examples,
        "damping_scale": DAMPING_SCALE,
        "scaling": "1/sqrt(E[g^2] + lambda), of the pilot",
        "energy_shares": {name: share or 1.0 for name, share in shares.items()},
    }
    return PilotProjection(projections, described)


def _damping(energy: float, basis: Basis) -> float:
    """λ, relative to the mean of Λ over all coordinates."""
    return DAMPING_SCALE * energy / (len(basis.vectors_in) * len(basis.vectors_out))


def _whitening(damped: Tensor) -> Tensor:
    """1 / √(Λ + λ) [n] float32; 1 where the pilot saw no gradient."""
    scale = torch.where(damped > 0, damped, 1.0).rsqrt()
    return scale.clamp(
        2.0**-100, 2.0**100
    ).float()  # whose squares float64 and products float32 hold


def _gain(values: Tensor, damping: float) -> Tensor:
    """(Λ / (Λ + λ))² [ko, ki]."""
    total = values + damping
    return torch.where(total > 0, values / total, 0.0).square()


def _largest(gains: Sequence[Tensor], count: int) -> list[Tensor]:
    """Places [n] int64, ascending, of the `count` largest over all; the largest of each first."""
    flat = [gain.flatten() for gain in gains]
    merged = torch.cat(flat)
    first = 0
    for gain in flat:  # every module has its best coordinate
        merged[first + int(gain.argmax())] = torch.inf
        first += len(gain)
    order = torch.sort(merged, descending=True, stable=True).indices[:count]
    chosen = torch.zeros(len(merged), dtype=torch.bool)
    chosen[order] = True
    return [part.nonzero()[:, 0] for part in chosen.split([len(gain) for gain in flat])]
