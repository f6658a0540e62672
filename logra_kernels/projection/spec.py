"""What a projection is made from: a registered kind, a rank and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from logra_kernels.defaults import RANK, SEED

Rank = int | tuple[int, int]
Widths = Mapping[str, tuple[int, int]]  # {module name: (I, O)}


@dataclass(frozen=True)
class ModuleProjection:
    """The two projections of one module; None stands for the identity.

    in_features: I; out_features: O; proj_in: [Ki, I] float32; proj_out: [Ko, O] float32.
    coordinates: [n] int64, ascending: the elements of vec(G), G [Ko, Ki], that a row holds; None:
        all of them.
    scale: [n] float32 above 0, what a row holds of each coordinate being `scale` times it; None: 1.
    """

    in_features: int
    out_features: int
    proj_in: Tensor | None = None
    proj_out: Tensor | None = None
    coordinates: Tensor | None = None
    scale: Tensor | None = None

    @property
    def ki(self) -> int:
        """Columns of a projected gradient: P_i's rows, or I without P_i."""
        return self.in_features if self.proj_in is None else self.proj_in.shape[0]

    @property
    def ko(self) -> int:
        """Rows of a projected gradient: P_o's rows, or O without P_o."""
        return self.out_features if self.proj_out is None else self.proj_out.shape[0]

    @property
    def row_shape(self) -> tuple[int, int]:
        """The module's part of a row: (Ko, Ki), or (1, n) for chosen coordinates."""
        chosen = self.coordinates
        return (self.ko, self.ki) if chosen is None else (1, len(chosen))


class ProjectionKind(Protocol):
    """One way of making P_i and P_o; `register_projection_kind` gives it its name."""

    @property
    def name(self) -> str:
        """The name that a store keeps."""

    def matrix(
        self, spec: ProjectionSpec, module: str, side: str, shape: tuple[int, int]
    ) -> Tensor:
        """P [K, width] in float32, for the side "in" or "out" of a module, where K < width."""

    def describe(self, spec: ProjectionSpec) -> dict[str, object]:
        """What a store keeps of the projection beside kind and rank, as JSON values."""


_kinds: dict[str, ProjectionKind] = {}
PILOTED = ("pca", "eigen")  # kinds that are made from a pilot, and so from no seed


def register_projection_kind(kind: ProjectionKind, *other_names: str) -> None:
    """Let `ProjectionSpec(kind=...)` find a kind by its own name and by any other name given."""
    _kinds.update(dict.fromkeys((*other_names, kind.name), kind))


@dataclass(frozen=True)
class ProjectionSpec:
    """Everything that determines the projections of a model's modules, beside their widths.

    kind: a registered kind: "random" (which is "normal"), "normal" or "rademacher".
    rank: K of both sides, or (rank_out, rank_in).
    seed: any integer; a store keeps it.

    Raises: ValueError for an unknown kind, or a rank below 1.
    """

    kind: str = "random"
    rank: Rank = RANK
    seed: int = SEED

    def __post_init__(self) -> None:
        rank_pair(self.rank)
        _kind_named(self.kind)

    def build(self, widths: Widths) -> dict[str, ModuleProjection]:
        """{module name: its P_i and P_o}; a side that is no wider than its rank is left whole."""
        rank_out, rank_in = rank_pair(self.rank)
        return {
            name: ModuleProjection(
                width_in,
                width_out,
                self._matrix(name, "in", rank_in, width_in),
                self._matrix(name, "out", rank_out, width_out),
            )
            for name, (width_in, width_out) in widths.items()
        }

    def describe(self) -> dict[str, object]:
        """What a store keeps of this, as JSON values."""
        kind = _kind_named(self.kind)
        return {"kind": kind.name, "rank": list(rank_pair(self.rank)), **kind.describe(self)}

    def _matrix(self, module: str, side: str, rank: int, width: int) -> Tensor | None:
        if rank >= width:
            return None
        return _kind_named(self.kind).matrix(self, module, side, (rank, width))


def _kind_named(name: str) -> ProjectionKind:
    if name in _kinds:
        return _kinds[name]
    known = ", ".join(_kinds)
    if name in PILOTED:
        raise ValueError(
            f"init: '{name}' is made from a pilot: pass some examples inside "
            f"`with run.pilot('{name}', ...)`; without one there are {known}"
        )
    raise ValueError(f"init: expected one of {known}, got {name!r}")


def rank_pair(rank: Rank) -> tuple[int, int]:
    """(rank_out, rank_in)."""
    pair = tuple(rank) if isinstance(rank, tuple | list) else (rank, rank)
    if len(pair) != 2 or any(type(one) is not int or one < 1 for one in pair):
        raise ValueError(f"rank: expected an integer >= 1 or (rank_out, rank_in), got {rank!r}")
    return pair[0], pair[1]


def build_projections(
    features: Widths, rank: Rank, init: str = "random", seed: int = SEED
) -> dict[str, ModuleProjection]:
    """`ProjectionSpec(init, rank, seed).build(features)`.

    Args:
        features: {module name: (I, O)}, the widths of the module's input and output.
        rank: K of both sides, or (rank_out, rank_in).
        init: "random", "normal" or "rademacher".
        seed: any integer.

    Returns: {module name: ModuleProjection}.

    Raises: ValueError for an unknown init, or a rank below 1.
    """
    return ProjectionSpec(init, rank, seed).build(features)


def projection_digest(projections: Mapping[str, ModuleProjection]) -> str:
    """SHA-256 over names, sides and values: a store tells by it whether a projection is its own."""
    digest = hashlib.sha256()
    for name, projection in projections.items():
        for side, proj in (("in", projection.proj_in), ("out", projection.proj_out)):
            digest.update(f"{name}\0{side}\0".encode())
            if proj is not None:
                digest.update(proj.numpy().astype("<f4").tobytes())
        if projection.coordinates is not None:
            digest.update(f"{name}\0coordinates\0".encode())
            digest.update(projection.coordinates.numpy().astype("<i8").tobytes())
        if projection.scale is not None:
            digest.update(f"{name}\0scale\0".encode())
            digest.update(projection.scale.numpy().astype("<f4").tobytes())
    return digest.hexdigest()
