"""Projections that are made from the model's own activations: PCA, and the eigenbasis staircase.

A pilot gives for each module C_F = E[x xᵀ] [I, I] and C_B = E[dy dyᵀ] [O, O]. Their eigenvectors of
the largest eigenvalues are P_i and P_o.

    pca     K of each side: a row holds G = P_o (dL/dW) P_iᵀ whole.
    eigen   a row holds the D coordinates, over all modules together, in which the damped inverse
            keeps most of the gradient: those with the largest Λ / (Λ + λ). Λ is the pilot's K-FAC,
            the product of a coordinate's two eigenvalues, such that the Λ of a module sum up to
            E‖dL/dW‖²; λ = 0.1 · mean of Λ over all coordinates of the module's weight. They lie in
            a corner of G, below a staircase; a few far ones are left out where only they would need
            vectors to project to. Each is stored times 1 / √(Λ + λ), so that the
            columns of all modules are of about one size.

K-FAC's Λ chooses as well as the corrected E[G²] of the same pilot does (`docs/methods.md`), and it
needs no second pass; the curvature of the rows is corrected by all of them.

Sources: Choe et al. 2024, §3.2 (PCA); the basis: EK-FAC (George et al. 2018; Grosse et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logra_kernels.defaults import DAMPING_SCALE
from logra_kernels.projection.spec import ModuleProjection, Rank, Widths, rank_pair

# What the chosen coordinates keep at least of the largest Σ (Λ / (Λ + λ))² that as many could have.
KEPT_GAIN = 0.99
# Of a module's forward and backward pass: what its projections may cost even where less would do.
SMALLEST_SHARE = 0.1


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
    """The eigenvectors of one module's moments, as columns, and their values, largest first.

    Of one-hot inputs the eigenvectors are the inputs' own axes: `vectors_in` is their order.
    """

    values_in: Tensor  # Λ_F [I] float64
    vectors_in: Tensor  # Q_F [I, I] float64, or [I] int64
    values_out: Tensor  # Λ_B [O] float64
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


def staircase(
    bases: Mapping[str, Basis], energies: Mapping[str, float], coordinates: int, examples: int
) -> PilotProjection:
    """The eigenbasis rows of D coordinates over all modules; each module has at least one.

    Args:
        bases: of each module.
        energies: E‖dL/dW‖² of each module, the sum of Λ over all its coordinates.
        coordinates: D.
        examples: the pilot's.

    Raises: ValueError for fewer coordinates than modules, or more than there are.
    """
    total = sum(len(basis.vectors_in) * len(basis.vectors_out) for basis in bases.values())
    if type(coordinates) is not int or not len(bases) <= coordinates <= total:
        raise ValueError(
            f"coordinates: expected {len(bases)} (one a module) to {total}, got {coordinates!r}"
        )
    sides = [(_relative(basis.values_out), _relative(basis.values_in)) for basis in bases.values()]
    least = _threshold(sides, coordinates)
    corners = _narrowed(
        [_corner(*pair, least) for pair in sides], list(bases.values()), coordinates
    )
    projections, shares = {}, {}
    each = zip(bases.items(), corners, _largest(corners, coordinates), strict=True)
    for (name, basis), relative, places in each:
        rows, columns = places // relative.shape[1], places % relative.shape[1]
        kept = relative.flatten()[places]
        corner = basis.corner(int(rows.max()) + 1, int(columns.max()) + 1)
        size = corner.in_features * corner.out_features
        projections[name] = replace(
            corner,
            coordinates=rows * corner.ki + columns,
            scale=_whitening((kept + DAMPING_SCALE) * (energies[name] / size)),
        )
        shares[name] = min(1.0, float(kept.sum()) / size) or 1.0
    described = {
        "kind": "eigen",
        "coordinates": coordinates,
        "pilot_examples": examples,
        "damping_scale": DAMPING_SCALE,
        "scaling": "1/sqrt(Lambda + lambda), of the pilot",
        "energy_shares": shares,
    }
    return PilotProjection(projections, described)


def _relative(values: Tensor) -> Tensor:
    """Eigenvalues over their mean: a product of both sides' is Λ over its mean in the module."""
    kept = values.clamp(min=0)
    mean = float(kept.mean())
    return kept / mean if mean > 0 else torch.zeros_like(kept)


def _threshold(sides: Sequence[tuple[Tensor, Tensor]], count: int) -> float:
    """A number that at least `count` of all modules' products reach, and hardly more if it can be.

    Args:
        sides: [O] and [I] of each module, descending.
    """
    low, high = 0.0, max(float(out[0] * into[0]) for out, into in sides)
    while high > low * (1 + 1e-6) and (high > 2.0**-100):
        middle = (low * high) ** 0.5 if low > 0 else high / 16
        reached = 0
        for out, into in sides:  # descending: as many as come before the first that is smaller
            needed = torch.where(out > 0, middle / out, torch.inf)
            reached += int(torch.searchsorted(-into, -needed, right=True).sum())
        low, high = (middle, high) if reached >= count else (low, middle)
    return low


def _corner(out: Tensor, into: Tensor, least: float) -> Tensor:
    """The products [ko, ki] in the smallest corner that holds those of `least` and above."""
    rows = max(1, int((out * into[0] >= least).sum()))
    columns = max(1, int((into * out[0] >= least).sum()))
    return torch.outer(out[:rows], into[:columns])


def _narrowed(corners: Sequence[Tensor], bases: Sequence[Basis], count: int) -> list[Tensor]:
    """The corners [ko, ki], cut to vectors that keep more than they cost.

    The projections of a token take ko·O + ki·I multiplications, its forward and backward pass
    2·I·O. The cut is at the least share of these that keeps `KEPT_GAIN`.
    """
    largest = _largest(corners, count)
    gains = [(corner / (corner + DAMPING_SCALE)).square() for corner in corners]
    best = _sum_at(gains, largest)
    worths = [_worth(gain, places) for gain, places in zip(gains, largest, strict=True)]
    costs = [_cost(gain, basis) for gain, basis in zip(gains, bases, strict=True)]
    share = SMALLEST_SHARE
    while True:
        sizes = [_affordable(*pair, share) for pair in zip(worths, costs, strict=True)]
        cut = [corner[:ko, :ki] for corner, (ko, ki) in zip(corners, sizes, strict=True)]
        if sum(corner.numel() for corner in cut) >= count:
            inside = [gain[:ko, :ki] for gain, (ko, ki) in zip(gains, sizes, strict=True)]
            if not _sum_at(inside, _largest(cut, count)) < KEPT_GAIN * best:
                return cut
        share *= 1.1


def _sum_at(gains: Sequence[Tensor], places: Sequence[Tensor]) -> float:
    pairs = zip(gains, places, strict=True)
    return sum(float(gain.flatten()[chosen].sum()) for gain, chosen in pairs)


def _worth(gain: Tensor, places: Tensor) -> Tensor:
    """[ko, ki]: the gain at `places` in the part of a corner that ends at each element."""
    wanted = torch.full((gain.numel(),), 1e-9, dtype=gain.dtype)  # of equal parts, the largest
    wanted[places] += gain.flatten()[places]
    return wanted.view(gain.shape).cumsum(0).cumsum(1)


def _cost(gain: Tensor, basis: Basis) -> Tensor:
    """[ko, ki]: what projecting to such a part costs, over the module's two passes."""
    width_in, width_out = len(basis.vectors_in), len(basis.vectors_out)
    # Projections have whole vectors of 16, so the last vector of each side may as well be full.
    rows, columns = (16 * ((torch.arange(size) + 16) // 16) for size in gain.shape)
    return (rows[:, None] * width_out + columns * width_in) / (2 * width_in * width_out)


def _affordable(worth: Tensor, cost: Tensor, share: float) -> tuple[int, int]:
    """(ko, ki) of the part that is worth most at this cost."""
    within = torch.where(cost > share, -1.0, worth)
    within[0, 0].clamp_(min=0)
    place = int(within.argmax())
    return place // worth.shape[1] + 1, place % worth.shape[1] + 1


def _whitening(damped: Tensor) -> Tensor:
    """1 / √(Λ + λ) [n] float32; 1 where the pilot saw no gradient."""
    scale = torch.where(damped > 0, damped, 1.0).rsqrt()
    # Whose squares float64, and products with a gradient float32, can hold.
    return scale.clamp(2.0**-100, 2.0**100).float()


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
