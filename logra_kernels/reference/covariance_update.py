"""Uncentred second moment: cov += rows^T rows, on the lower triangle."""

from torch import Tensor

from logra_kernels.reference._dtype import accumulator


def covariance_update_(cov: Tensor, rows: Tensor) -> None:
    """cov [K, K] float32 or float64, in place; rows [R, K]. Above the diagonal nothing changes."""
    rows = rows.to(accumulator(cov, rows))
    cov += (rows.T @ rows).tril().to(cov.dtype)  # [K, K]
