"""Curvatures of the stored rows, their damping, and the preconditioners they give."""

from logra_kernels.curvature.base import (
    Curvature,
    Labels,
    curvature_kind,
    curvature_of,
    kinds,
    load_curvature,
    preconditioner_of,
    register_curvature,
    usual_kind,
)
from logra_kernels.curvature.damping import DampingScale, check_damping
from logra_kernels.curvature.diagonal import DiagonalCurvature
from logra_kernels.curvature.kronecker import (
    EcShampooCurvature,
    EkfacCurvature,
    EkfacReduceCurvature,
    KfacCurvature,
    KfacReduceCurvature,
    KroneckerCurvature,
)
from logra_kernels.curvature.moment import PLACES, Place
from logra_kernels.curvature.preconditioner import (
    IdentityPreconditioner,
    Preconditioner,
    plain_preconditioner,
)
from logra_kernels.curvature.raw import RawCurvature
from logra_kernels.curvature.shrunk import ShrunkCurvature
from logra_kernels.curvature.statistic import Mean, Statistic, Variance

__all__ = [
    "PLACES",
    "Curvature",
    "DampingScale",
    "DiagonalCurvature",
    "EcShampooCurvature",
    "EkfacCurvature",
    "EkfacReduceCurvature",
    "IdentityPreconditioner",
    "KfacCurvature",
    "KfacReduceCurvature",
    "KroneckerCurvature",
    "Labels",
    "Mean",
    "Place",
    "Preconditioner",
    "RawCurvature",
    "ShrunkCurvature",
    "Statistic",
    "Variance",
    "check_damping",
    "curvature_kind",
    "curvature_of",
    "kinds",
    "load_curvature",
    "plain_preconditioner",
    "preconditioner_of",
    "register_curvature",
    "usual_kind",
]
