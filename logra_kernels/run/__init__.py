"""A run: the user's own training code, logged example by example, and asked for influence."""

from logra_kernels.run.config import Config
from logra_kernels.run.run import Run, check_ids, init
from logra_kernels.run.statistic import Covariance

__all__ = ["Config", "Covariance", "Run", "check_ids", "init"]
