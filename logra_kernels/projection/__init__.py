"""The projections P_i [Ki, I] and P_o [Ko, O] of LoGra (Eq. 6)."""

import logra_kernels.projection.random  # noqa: F401 (registers its kinds)
from logra_kernels.projection.pilot import PilotProjection
from logra_kernels.projection.spec import (
    PILOTED,
    ModuleProjection,
    ProjectionKind,
    ProjectionSpec,
    build_projections,
    projection_digest,
    register_projection_kind,
)
from logra_kernels.projection.stored import (
    describe_projection,
    described_widths,
    projection_tensors,
    stored_projections,
    stored_scales,
)

__all__ = [
    "PILOTED",
    "ModuleProjection",
    "PilotProjection",
    "ProjectionKind",
    "ProjectionSpec",
    "build_projections",
    "describe_projection",
    "described_widths",
    "projection_digest",
    "projection_tensors",
    "register_projection_kind",
    "stored_projections",
    "stored_scales",
]
