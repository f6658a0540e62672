"""Projection of activations or output gradients (LoGra Eq. 6): P x for every token."""

from torch import Tensor

from logra_kernels.reference._dtype import accumulator


def project(x: Tensor, proj: Tensor) -> Tensor:
    """x [..., I], proj [K, I] -> [..., K]."""
    dtype = accumulator(x, proj)
    return x.to(dtype) @ proj.to(dtype).T  # [..., K]
