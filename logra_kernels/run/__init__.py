"""Logging: the gradients of a user's own training code, example by example, into a store."""

from logra_kernels.curvature import Mean, Statistic, Variance
from logra_kernels.run.config import Config
from logra_kernels.run.coverage import Coverage, LeftOut, WatchedModule
from logra_kernels.run.diagnosis import Diagnosis, Finding
from logra_kernels.run.doctor import NO_BOS, UsersLoop, examine
from logra_kernels.run.labels import sample_labels
from logra_kernels.run.logged_pass import LoggedPass, check_ids
from logra_kernels.run.logged_rows import FinitePolicy, LoggedRows
from logra_kernels.run.pilot import MOMENTS, Pilot
from logra_kernels.run.recorder import Recorder, check_curvature
from logra_kernels.run.run import Run
from logra_kernels.run.statistic import CorrectedEigval, Covariance, Setup
from logra_kernels.run.watched import WatchedLayers

__all__ = [
    "MOMENTS",
    "NO_BOS",
    "Config",
    "CorrectedEigval",
    "Covariance",
    "Coverage",
    "Diagnosis",
    "Finding",
    "FinitePolicy",
    "LeftOut",
    "LoggedPass",
    "LoggedRows",
    "Mean",
    "Pilot",
    "Recorder",
    "Run",
    "Setup",
    "Statistic",
    "UsersLoop",
    "Variance",
    "WatchedLayers",
    "WatchedModule",
    "check_curvature",
    "check_ids",
    "examine",
    "sample_labels",
]
