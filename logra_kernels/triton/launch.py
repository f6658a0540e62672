# mypy: allow-untyped-defs
# a kernel's arguments are Triton's values, which have no Python types
"""The one place where kernels are launched: a table chooses tiles, a formula counts programs.

A launch can be recorded instead of run (`recording`), for an architecture that is not here and with
tensors on any device, `meta` included: so the catalogue sees what a GPU would be given.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from logra_kernels.triton import heuristics


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was given. `grid` is a formula over the integer arguments and the
    constexprs: + - * // and cdiv(a, b), in integers."""

    kernel: Any
    grid: str
    arguments: dict[str, Any]  # constexprs included, by name
    config: dict[str, int]  # num_warps, num_stages

    @property
    def programs(self) -> int:
        return programs(self.grid, self.arguments)


class _State:
    launches: list[Launch] | None = None
    architecture: str | None = None
    tried: dict[str, dict[str, int]] = {}  # noqa: RUF012  replaced, never changed in place


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@cache
def _code(formula: str) -> CodeType:
    return compile(formula, "<grid>", "eval")


def programs(formula: str, arguments: Mapping[str, Any]) -> int:
    return int(eval(_code(formula), {"__builtins__": {}, "cdiv": cdiv}, dict(arguments)))


def launch(kernel: Any, grid: str, where: Tensor, config: Mapping[str, int], **arguments) -> None:
    """Run the kernel on where's device; config holds its tiles, num_warps and num_stages."""
    options = {name: config[name] for name in ("num_warps", "num_stages") if name in config}
    tiles = {name: value for name, value in config.items() if name not in options}
    if _State.launches is not None:
        _State.launches.append(Launch(kernel, grid, arguments | tiles, options))
        return
    count = programs(grid, arguments | tiles)
    if where.is_cuda:  # Triton launches on the current device
        with torch.cuda.device(where.device):
            kernel[(count,)](**arguments, **config)
    else:
        kernel[(count,)](**arguments, **config)


def choose(op: str, types: str, where: Tensor, **sizes: int) -> dict[str, int]:
    """The table's tiles for this op on where's device; sizes are what its rules may ask for."""
    if op in _State.tried:
        return dict(_State.tried[op])
    return heuristics.choose(op, types, architecture_of(where), **sizes)


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Within it nothing is run: launches are collected, as they would be on `architecture`."""
    before = _State.launches, _State.architecture
    _State.launches, _State.architecture = [], architecture
    try:
        yield _State.launches
    finally:
        _State.launches, _State.architecture = before


@contextmanager
def trying(op: str, config: dict[str, int]) -> Iterator[None]:
    """Within it the op uses this configuration instead of the table's."""
    before = _State.tried
    _State.tried = before | {op: config}
    try:
        yield
    finally:
        _State.tried = before


def is_recording() -> bool:
    return _State.launches is not None


def architecture_of(tensor: Tensor) -> str:
    """ "sm_90", "gfx942", …; "interpreter" for a tensor that is not on a GPU."""
    if _State.architecture is not None:
        return _State.architecture
    return _architecture(tensor.device.index or 0) if tensor.is_cuda else "interpreter"


@cache
def _architecture(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
