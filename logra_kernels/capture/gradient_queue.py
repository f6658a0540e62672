"""Gradients of modules of one shape, computed together: on a GPU a whole model is a few launches.

A backward pass meets the modules one by one. What a module's gradients are made of waits here until
the tensors kept from being freed reach a number of bytes, or the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.capture.layers import Call, Layer, Operands

# How much may wait, by type of device. On the CPU a launch costs nothing, and to wait would cost
# cache: nothing does.
WAITING_BYTES = {"cuda": 256 << 20}


class GradientQueue:
    """add() what arrives in a backward pass; `done(name, gradients [N, Ko, Ki])` is called for each
    of them, in the order of their arrival within a group, when it is computed."""

    def __init__(self, done: Callable[[str, Tensor], None]) -> None:
        self._done = done
        self._groups: dict[Any, list[tuple[str, Operands, int]]] = {}
        self._bytes = 0

    def takes(self, layer: Layer, dy: Tensor) -> bool:
        return layer.groupable and dy.device.type in WAITING_BYTES

    def add(self, layer: Layer, call: Call, dy: Tensor) -> None:
        operands = layer.operands(call, dy)
        mask = operands.mask
        kind = [
            None if t is None else (t.shape, t.dtype, t.stride(), t.device) for t in operands[:3]
        ]
        # the mask is the batch's: one tensor on each device
        key = (*kind, None if mask is None else id(mask), _stream(dy))
        self._groups.setdefault(key, []).append((layer.name, operands, operands.outputs._version))
        self._bytes += operands.inputs.nbytes + operands.outputs.nbytes
        if self._bytes > WAITING_BYTES[dy.device.type]:
            self.flush()

    def flush(self) -> None:
        groups, self._groups, self._bytes = self._groups, {}, 0
        for key, members in groups.items():
            with nullcontext() if key[-1] is None else torch.cuda.stream(key[-1]):
                self._compute(members)

    def clear(self) -> None:
        self._groups, self._bytes = {}, 0

    def _compute(self, members: list[tuple[str, Operands, int]]) -> None:
        for name, operands, version in members:
            if operands.outputs._version != version:
                raise RuntimeError(
                    f"module {name}: the gradient of its output was changed in place during the "
                    "backward pass; make the change out of place"
                )
        first = members[0][1]
        projs_out = [o.proj_out for _, o, _ in members if o.proj_out is not None]
        gradients = ops.projected_gradients_grouped(
            [operands.inputs for _, operands, _ in members],
            [operands.outputs for _, operands, _ in members],
            None,
            projs_out or None,
            first.mask,
        )
        for (name, _, _), part in zip(members, gradients, strict=True):
            self._done(name, part)


def _stream(tensor: Tensor) -> Any:
    """Where the backward pass computes: the work is put there, too."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
