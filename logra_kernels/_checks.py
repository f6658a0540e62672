"""One wording for every rejected argument: what was wanted and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of stored rows that a scan reads.
STORED = (*FLOATS, torch.int8)
WIDE = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expect_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def expect_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    expect_tensor(name, tensor)
    if tensor.dtype not in allowed:
        wanted = " or ".join(dtype_name(d) for d in allowed)
        raise TypeError(f"{name}: expected {wanted}, got {dtype_name(tensor.dtype)}")


def expect_shape(name: str, tensor: Tensor, **axes: int | None) -> None:
    """`axes` in order, None for any size: expect_shape("rows", rows, R=None, D=d).

    A trailing underscore tells two axes of one name apart: K=k, K_=k.
    """
    expect_tensor(name, tensor)
    sizes = tensor.shape
    if len(sizes) == len(axes):
        for wanted, size in zip(axes.values(), sizes, strict=True):
            if wanted is not None and wanted != size:
                break
        else:
            return
    named = [(axis.rstrip("_"), size) for axis, size in axes.items()]
    text = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in named)
    raise ValueError(f"{name}: expected [{text}], got {list(sizes)}")


def operand(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], **axes: int | None) -> Tensor:
    """The tensor with a contiguous last axis, once its type and its axes are as expected."""
    expect_dtype(name, tensor, *dtypes)
    expect_shape(name, tensor, **axes)
    return plain(tensor)


def expect_same_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        text = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected tensors on one device, got {text}")


def expect_sizes(name: str, sizes: Sequence[int], total: int) -> None:
    if any(size < 0 for size in sizes) or sum(sizes) != total:
        raise ValueError(
            f"{name}: expected sizes of at least 0 that sum to {total}, got {list(sizes)} "
            f"with sum {sum(sizes)}"
        )


def plain(tensor: Tensor) -> Tensor:
    """The same values with a contiguous last axis, which the kernels need; copied where need be."""
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor
