"""Projection of activations or output gradients."""

from types import ModuleType

import torch
from torch import Tensor

from logra_kernels._checks import FLOATS, expect_dtype, expect_same_device, operand, plain
from logra_kernels.ops._direct import NARROW, dense, direct, kernels
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import flat_tokens, rows_view, view
from logra_kernels.reference._dtype import accumulator


def project(x: Tensor, proj: Tensor) -> Tensor:
    r"""Project every token onto the rows of a projection.

    .. math:: y_t = P x_t

    Args:
        x: ``[..., I]`` float16, bfloat16, float32 or float64.
        proj: ``[K, I]`` P, of any of these types, on the same device.

    Returns:
        ``[..., K]`` float32, accumulated in float32 (float64 if an argument is float64).

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that disagree.

    Source: LoGra (Choe et al. 2024), Eq. 6: P_i x_t and P_o dy_t.
    """
    if direct(x, proj) and (out := _direct(x, proj)) is not None:
        return out
    return _call(x, proj)


def _check(x: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    expect_dtype("x", x, *FLOATS)
    if x.dim() == 0:
        raise ValueError("x: expected [..., I], got []")
    proj = operand("proj", proj, FLOATS, K=None, I=x.shape[-1])
    expect_same_device(x=x, proj=proj)
    return plain(x), proj


def _direct(x: Tensor, proj: Tensor) -> Tensor | None:
    """None for arguments that take the long way."""
    shape = x.shape
    if (
        not dense(proj, 2)
        or x.dtype not in NARROW
        or not shape
        or shape[-1] != proj.shape[1]
        or shape[-1] == 0
        or not x.is_contiguous()
    ):
        return None
    out = x.new_empty((*shape[:-1], proj.shape[0]), dtype=torch.float32)
    kernels().project(rows_view(x), view(proj), out.data_ptr())
    return out


def _fake(x: Tensor, proj: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], proj.shape[0]), dtype=accumulator(x, proj))


def _kernel(c: ModuleType, x: Tensor, proj: Tensor) -> Tensor:
    out = x.new_empty((*x.shape[:-1], proj.shape[0]), dtype=torch.float32)
    tokens = flat_tokens(x)  # [M, I], kept alive through the call
    c.project(view(tokens), view(proj), out.data_ptr())
    return out


_call = register(
    "project(Tensor x, Tensor proj) -> Tensor",
    check=_check,
    fake=_fake,
    native=_kernel,
)
