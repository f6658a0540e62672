"""Chosen elements of projected per-sample gradients, scaled; the others are not computed."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from logra_kernels._checks import expect_same_device, operand
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view
from logra_kernels.ops._tokens import check_token_values, check_tokens
from logra_kernels.ops.projected_gradients import check_gradients
from logra_kernels.reference._dtype import accumulator


def projected_coordinates(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    coordinates: Tensor,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Some elements of each example's projected gradient, each times its scale.

    .. math:: r_{nc} = s_c \, \mathrm{vec}(G_n)_{p_c}, \quad
        G_n = \sum_t m_{nt} \, (P_o \, dy_{nt}) (P_i \, x_{nt})^\top

    The same, bit for bit, as `projected_gradients`, a gather and a product. What the coordinates
    do not need is not computed: on the CPU, of eight rows of G at a time, the columns behind the
    last coordinate; on a GPU, tiles without one. So a staircase costs its own area, not its corner.

    Args:
        x, dy, proj_in, proj_out, mask: as in `projected_gradients`.
        coordinates: ``[n]`` int64, places o · Ki + i in vec(G), rising.
        scale: ``[n]`` float32, s; None for 1.
        cu_seqlens, segment_ids, num_segments, out_dtype: as in `projected_gradients`.

    Returns:
        ``[N, n]`` (``[S, n]`` for segments), accumulated in float32 (float64 if an argument is
        float64).

    Raises:
        TypeError, ValueError: as `projected_gradients`; coordinates that do not rise or leave G.

    Source: the eigenbasis of EK-FAC (George et al. 2018), of which a row keeps the largest.
    """
    x, dy, mask, cu_seqlens = check_tokens(
        x, dy, mask, cu_seqlens, segment_ids, num_segments, out_dtype
    )
    return _call(x, dy, proj_in, proj_out, coordinates, scale, mask, cu_seqlens, out_dtype)


def _check(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    coordinates: Tensor,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    operands = check_gradients(x, dy, proj_in, proj_out, mask, cu_seqlens, out_dtype)
    coordinates = operand("coordinates", coordinates, [torch.int64], n=None).contiguous()
    if scale is not None:
        scale = operand("scale", scale, [torch.float32], n=coordinates.shape[0]).contiguous()
    expect_same_device(x=x, coordinates=coordinates, scale=scale)
    return *operands[:4], coordinates, scale, *operands[4:]


def _check_values(*args: Any) -> tuple[Any, ...]:
    """Refuse places outside of G, and what `check_token_values` refuses."""
    x, dy, proj_in, proj_out, coordinates = args[:5]
    ki = x.shape[-1] if proj_in is None else proj_in.shape[0]
    size = ki * (dy.shape[-1] if proj_out is None else proj_out.shape[0])
    if len(coordinates):
        rising = (coordinates[1:] > coordinates[:-1]).all()
        good = rising & (coordinates[0] >= 0) & (coordinates[-1] < size)
        text = f"coordinates: expected rising places in G, from 0 to {size - 1}"
        if coordinates.is_cuda:
            torch._assert_async(good, text)
        elif not good:
            raise ValueError(f"{text}, got {coordinates.tolist()[:16]}")
    return check_token_values(*args)


def _fake(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    coordinates: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    num = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = out_dtype or accumulator(x, dy, proj_in, proj_out)
    return x.new_empty(num, coordinates.shape[0], dtype=dtype)


def _native(
    c: ModuleType,
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    coordinates: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    out = _fake(x, dy, proj_in, proj_out, coordinates, scale, mask, cu_seqlens, torch.float32)
    mask = None if mask is None else mask.contiguous()
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    p_in = None if proj_in is None else view(proj_in)
    p_out = None if proj_out is None else view(proj_out)
    chosen = pointer(coordinates), pointer(scale), pointer(mask), pointer(bounds)
    c.projected_coordinates(view(x), view(dy), p_in, p_out, *chosen, view(out))
    return out.to(out_dtype or torch.float32)


_call = register(
    "projected_coordinates(Tensor x, Tensor dy, Tensor? proj_in, Tensor? proj_out, "
    "Tensor coordinates, Tensor? scale=None, Tensor? mask=None, Tensor? cu_seqlens=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    check=_check,
    fake=_fake,
    native=_native,
    check_values=_check_values,
)
