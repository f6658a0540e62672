"""Projected per-sample gradients of several modules of one shape, in one launch on a GPU."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from logra_kernels._checks import (
    FLOATS,
    dtype_name,
    expect_dtype,
    expect_same_device,
    expect_shape,
    plain,
)
from logra_kernels.ops._library import register
from logra_kernels.ops._pointers import pointer, view
from logra_kernels.ops._tokens import check_token_values
from logra_kernels.ops.projected_gradients import check_gradients, empty_gradients


def projected_gradients_grouped(
    xs: Sequence[Tensor],
    dys: Sequence[Tensor],
    projs_in: Sequence[Tensor] | None,
    projs_out: Sequence[Tensor] | None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Sum each example's outer products for M modules of equal shapes, which share their tokens.

    .. math:: G_{mn} = \sum_t w_{nt} \, (P_o^m \, dy^m_{nt}) (P_i^m \, x^m_{nt})^\top

    Each module's part equals `projected_gradients` bit for bit. On a GPU all of them are one
    launch; on the CPU they are computed one after the other.

    Args:
        xs: M tensors ``[N, T, I]`` of one dtype (float16, bfloat16, float32 or float64);
            ``[N, I]`` stands for T = 1.
        dys: M tensors ``[N, T, O]``, likewise; their dtype may differ from that of xs.
        projs_in: M tensors ``[Ki, I]``, or None for the identity (then Ki = I).
        projs_out: M tensors ``[Ko, O]``, or None for the identity (then Ko = O).
        mask: ``[N, T]`` 0 or 1 of any real dtype, for all modules. A token masked by 0 is skipped,
            whatever it holds; None keeps all.
        cu_seqlens: ``[S+1]`` int32 or int64. Tokens are packed as in `projected_gradients`.
        out_dtype: dtype of the result; None for the accumulator's.

    Returns:
        ``[M, N, Ko, Ki]`` (``[M, S, Ko, Ki]`` for segments), accumulated in float32 (float64 if an
        argument is float64).

    Raises:
        TypeError: another dtype, or dtypes that differ between modules.
        ValueError: no module, shapes or devices that disagree, segments out of range, a mask that
            is not 0 or 1.

    Source: LoGra (Choe et al. 2024), Eq. 6.
    """
    if cu_seqlens is None and xs and isinstance(xs[0], Tensor) and xs[0].dim() == 2:
        xs, dys = [x.unsqueeze(1) for x in xs], [dy.unsqueeze(1) for dy in dys]
        mask = None if mask is None else mask.unsqueeze(1)
    projs = list(projs_in or ()), list(projs_out or ())
    return _call(list(xs), list(dys), *projs, mask, cu_seqlens, out_dtype)


def _check(
    xs: list[Tensor],
    dys: list[Tensor],
    projs_in: list[Tensor],
    projs_out: list[Tensor],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """All modules are as the first, and the first is as `projected_gradients` takes it."""
    if not xs:
        raise ValueError("xs: expected at least one module, got none")
    named = {"xs": xs, "dys": dys, "projs_in": projs_in, "projs_out": projs_out}
    for name, tensors in named.items():
        if len(tensors) != len(xs) and (tensors or name == "dys"):
            raise ValueError(
                f"{name}: expected {len(xs)} tensors, one a module like xs, got {len(tensors)}"
            )
        for m, tensor in enumerate(tensors):
            expect_dtype(f"{name}[{m}]", tensor, *FLOATS)
            if tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"{name}[{m}]: expected the shape {list(tensors[0].shape)} of {name}[0], "
                    f"got {list(tensor.shape)}"
                )
            if tensor.dtype != tensors[0].dtype:
                raise TypeError(
                    f"{name}[{m}]: expected the dtype {dtype_name(tensors[0].dtype)} of {name}[0], "
                    f"got {dtype_name(tensor.dtype)}"
                )
            expect_same_device(**{"xs[0]": xs[0], f"{name}[{m}]": tensor})
    _, _, _, _, *shared = check_gradients(xs[0], dys[0], None, None, mask, cu_seqlens, out_dtype)
    if projs_in:
        expect_shape("projs_in[0]", projs_in[0], Ki=None, I=xs[0].shape[-1])
    if projs_out:
        expect_shape("projs_out[0]", projs_out[0], Ko=None, O=dys[0].shape[-1])
    lists = ([plain(tensor) for tensor in tensors] for tensors in named.values())
    return *lists, *shared


def _fake(
    xs: list[Tensor], dys: list[Tensor], projs_in: list[Tensor], projs_out: list[Tensor], *rest: Any
) -> Tensor:
    p_in, p_out = (projs[0] if projs else None for projs in (projs_in, projs_out))
    return empty_gradients(xs[0], dys[0], p_in, p_out, *rest, len(xs))


def _native(
    c: ModuleType,
    xs: list[Tensor],
    dys: list[Tensor],
    projs_in: list[Tensor],
    projs_out: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    out = _fake(xs, dys, projs_in, projs_out, mask, cu_seqlens, torch.float32)
    mask = None if mask is None else mask.contiguous()
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    for m, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        p_in = view(projs_in[m]) if projs_in else None
        p_out = view(projs_out[m]) if projs_out else None
        c.projected_gradients(
            view(x), view(dy), p_in, p_out, pointer(mask), pointer(bounds), view(out[m])
        )
    return out.to(out_dtype or torch.float32)


_call = register(
    "projected_gradients_grouped(Tensor[] xs, Tensor[] dys, Tensor[] projs_in, "
    "Tensor[] projs_out, Tensor? mask=None, Tensor? cu_seqlens=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    check=_check,
    fake=_fake,
    native=_native,
    check_values=check_token_values,
)
