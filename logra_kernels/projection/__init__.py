"""The projections P_i [Ki, I] and P_o [Ko, O] of LoGra (Eq. 6)."""

from logra_kernels.projection.random import (
    KINDS,
    SCALING,
    ModuleProjection,
    build_projections,
    canonical_kind,
    projection_digest,
    rank_pair,
)

__all__ = [
    "KINDS",
    "SCALING",
    "ModuleProjection",
    "build_projections",
    "canonical_kind",
    "projection_digest",
    "rank_pair",
]
