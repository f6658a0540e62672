"""Curvatures of the stored rows, their damping, and the preconditioners they give."""

from logra_kernels.curvature.preconditioner import IdentityPreconditioner, Preconditioner
from logra_kernels.curvature.raw import RawCurvature, check_damping

__all__ = ["IdentityPreconditioner", "Preconditioner", "RawCurvature", "check_damping"]
