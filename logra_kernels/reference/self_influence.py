"""Self-influence of a module's rows: sigma = ||W g||^2 with W^T W = (H + lambda I)^-1."""

from torch import Tensor

from logra_kernels.reference._dtype import accumulator


def self_influence(rows: Tensor, factor: Tensor) -> Tensor:
    """rows [R, K], factor W [M, K] (for instance L^-1 with H + lambda I = L L^T) -> [R]."""
    dtype = accumulator(rows, factor)
    return (rows.to(dtype) @ factor.to(dtype).T).square().sum(dim=1)  # [R]
