"""Gradients of modules of one shape, computed in one launch, so that a GPU needs few launches.

A backward pass reaches the modules one by one. The operands of a module's gradients wait here until
the waiting tensors reach a number of bytes, or the pass ends.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.capture.layers import Call, Layer, Operands

# The bytes that may wait, by type of device. On the CPU nothing waits: a launch costs nothing
# there, and operands that wait leave the cache.
WAITING_BYTES = {"cuda": 256 << 20}


class GradientQueue:
    """Collects the calls of layers, and computes those of one shape together.

    What was computed is returned as (module's name, G [N, Ko, Ki]) of each call. The calls of a
    group keep their order.
    """

    def __init__(self) -> None:
        self._groups: dict[Any, list[tuple[str, Operands, int]]] = {}
        self._bytes = 0

    def takes(self, layer: Layer, dy: Tensor) -> bool:
        """Whether the gradients of this call may wait."""
        alike = layer.groupable and layer.projection.coordinates is None
        return alike and dy.device.type in WAITING_BYTES

    def add(self, layer: Layer, call: Call, dy: Tensor) -> list[tuple[str, Tensor]]:
        """Let a call wait; compute all that wait if they hold too many bytes."""
        operands = layer.operands(call, dy)
        mask, cu_seqlens = operands.mask, operands.cu_seqlens
        kind = [
            None if t is None else (t.shape, t.dtype, t.stride(), t.device) for t in operands[:3]
        ]
        # All calls of one mask share its tensor on each device, and packed calls the boundaries.
        key = (*kind, id(mask), id(cu_seqlens), _stream(dy))
        self._groups.setdefault(key, []).append((layer.name, operands, operands.outputs._version))
        self._bytes += operands.inputs.nbytes + operands.outputs.nbytes
        if self._bytes > WAITING_BYTES[dy.device.type]:
            return self.flush()
        return []

    def flush(self) -> list[tuple[str, Tensor]]:
        """Compute the gradients of all calls that wait."""
        computed = []
        groups, self._groups, self._bytes = self._groups, {}, 0
        for key, members in groups.items():
            with nullcontext() if key[-1] is None else torch.cuda.stream(key[-1]):
                computed += self._compute(members)
        return computed

    def clear(self) -> None:
        """Forget all calls that wait."""
        self._groups, self._bytes = {}, 0

    def _compute(self, members: list[tuple[str, Operands, int]]) -> list[tuple[str, Tensor]]:
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
            cu_seqlens=first.cu_seqlens,
        )
        return [(name, part) for (name, _, _), part in zip(members, gradients, strict=True)]


def _stream(tensor: Tensor) -> Any:
    """The stream of the backward pass, on which its groups are computed too."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
