"""How a launcher checks its tensors, gets its tiles from the table and launches its kernel.

A launch can be recorded instead of run (`recording`), for an architecture that is not present and
with tensors on any device, `meta` included. So the catalogue sees what a GPU would be given.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from logra_kernels.triton import heuristics

# triton.knobs, which reads the same variable, is missing in Triton 3.2, the oldest that we support.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

_FLOATING = (torch.float16, torch.bfloat16, torch.float32)

# How many programs a kernel is launched with: the product of these factors. A factor is the name of
# an integer argument, or (size, tile): the number of tiles that cover the size.
Grid = tuple[str | tuple[str, str], ...]


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was given."""

    kernel: Any
    grid: Grid
    arguments: dict[str, Any]  # by name, constexprs included
    config: dict[str, int]  # num_warps, num_stages

    @property
    def programs(self) -> int:
        """The number of programs on the grid."""
        return programs(self.grid, self.arguments)


class _State:
    launches: list[Launch] | None = None  # a list while launches are recorded
    architecture: str | None = None  # the one that launches are recorded for
    tried: dict[str, dict[str, int]] = {}  # noqa: RUF012  replaced, never changed in place


def programs(grid: Grid, arguments: Mapping[str, Any]) -> int:
    """The product of a grid's factors: arguments, or quotients of two rounded up."""
    return math.prod(
        arguments[factor]
        if isinstance(factor, str)
        else triton.cdiv(*(arguments[name] for name in factor))
        for factor in grid
    )


def launch(
    kernel: Any, grid: Grid, where: Tensor, config: Mapping[str, int], **arguments: Any
) -> None:
    """Run the kernel on where's device; config holds its tiles, num_warps and num_stages."""
    options = {name: config[name] for name in ("num_warps", "num_stages") if name in config}
    arguments |= {name: value for name, value in config.items() if name not in options}
    if _State.launches is not None:
        _State.launches.append(Launch(kernel, grid, arguments, options))
        return
    count = programs(grid, arguments)
    if where.is_cuda:  # Triton launches on the current device
        with torch.cuda.device(where.device):
            kernel[(count,)](**arguments, **options)
    else:
        kernel[(count,)](**arguments, **options)


def choose(op: str, types: str, where: Tensor, **sizes: int) -> dict[str, int]:
    """The table's tiles for this op on where's device; sizes are what its rules may ask for."""
    if op in _State.tried:
        return dict(_State.tried[op])
    return heuristics.choose(op, types, architecture_of(where), **sizes)


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Inside this context launches are collected, as `architecture` would get them, and not run."""
    before = _State.launches, _State.architecture
    _State.launches, _State.architecture = [], architecture
    try:
        yield _State.launches
    finally:
        _State.launches, _State.architecture = before


@contextmanager
def trying(op: str, config: dict[str, int]) -> Iterator[None]:
    """Inside this context the op uses this configuration instead of the table's."""
    before = _State.tried
    _State.tried = before | {op: config}
    try:
        yield
    finally:
        _State.tried = before


def architecture_of(tensor: Tensor) -> str:
    """The name "sm_90", "gfx942", …; "interpreter" for a tensor that is not on a GPU."""
    if _State.architecture is not None:
        return _State.architecture
    return _architecture(tensor.device.index or 0) if tensor.is_cuda else "interpreter"


@cache
def _architecture(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def check(**tensors: Tensor | None) -> None:
    """Raise unless all tensors are on one GPU (or on the CPU, for the interpreter)."""
    device = next(t.device for t in tensors.values() if t is not None)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
        if device.type != "cuda" and not INTERPRETED and _State.launches is None:
            raise RuntimeError(
                f"{name}: the Triton kernels need a tensor on a GPU, got one on {device}; "
                "set TRITON_INTERPRET=1 before Python starts to interpret them on the CPU"
            )


def check_floating(**tensors: Tensor | None) -> None:
    """The same, and raise unless their types are those that the kernels read."""
    check(**tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATING:
            raise TypeError(
                f"{name}: expected float16, bfloat16 or float32, got {str(tensor.dtype)[6:]}"
            )


def last_axis_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, else a contiguous copy."""
    return tensor if tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def tile(size: int, largest: int) -> int:
    """The power of two in [16, largest] that covers size; tl.dot takes no axis below 16."""
    return max(16, min(largest, int(triton.next_power_of_2(size))))
