"""Curvatures of the stored rows, their damping, and the preconditioners they give."""

from logra_kernels.curvature.base import (
    Curvature,
    curvature_kind,
    kinds,
    load_curvature,
    preconditioner_of,
    register_curvature,
)
from logra_kernels.curvature.damping import check_damping, module_dampings
from logra_kernels.curvature.preconditioner import (
    CholeskyPreconditioner,
    EigenPreconditioner,
    IdentityPreconditioner,
    ModuleMatrices,
    Preconditioner,
)
from logra_kernels.curvature.raw import RawCurvature

__all__ = [
    "CholeskyPreconditioner",
    "Curvature",
    "EigenPreconditioner",
    "IdentityPreconditioner",
    "ModuleMatrices",
    "Preconditioner",
    "RawCurvature",
    "check_damping",
    "curvature_kind",
    "kinds",
    "load_curvature",
    "module_dampings",
    "preconditioner_of",
    "register_curvature",
]
