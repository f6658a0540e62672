"""What rows of few tokens are made of: rotating the tokens costs less than rotating the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.capture.layers import Call, Layer
from logra_kernels.capture.tokens import of_example


class ShortRows(NamedTuple):
    """A module's part of some rows, G = Σ_t (P_o dy_t)(P_i x_t)ᵀ over the tokens of a segment."""

    rows: list[int]  # their places among the rows that were asked for
    inputs: Tensor  # P_i x [n, Ki] float32, one row's tokens after the other's
    outputs: Tensor  # P_o dy [n, Ko] float32
    ends: Tensor  # [S + 1] int64, where the rows' tokens begin, and the last one's end


class ShortExamples:
    """The tokens of those of a pass's examples that have at most so many.

    An example's own number of tokens decides, whatever else is in its batch.

    Args:
        limits: {module name: tokens}; of other modules nothing is kept, nor of one that is called
            more than once in a pass, or whose gradients are not a product of tokens.
        loss_scale: what the loss, and so every dy, was multiplied by.
    """

    def __init__(self, limits: Mapping[str, int], loss_scale: float = 1.0) -> None:
        self._limits, self._loss_scale = limits, loss_scale
        self._kept: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}  # {module: {example: x, dy}}

    def add(self, layer: Layer, call: Call, dy: Tensor) -> None:
        """Keep what is short of one call of a module."""
        limit = self._limits.get(layer.name)
        if limit is None or not layer.groupable:
            return
        again = layer.name in self._kept
        kept = self._kept[layer.name] = {}
        if again or (call.mask is None and call.cu_seqlens is None and call.num_tokens > limit):
            return
        operands = layer.token_operands(call, dy)
        if operands.inputs.dtype == torch.int64:
            return
        for place in range(call.num_examples):
            inputs, outputs = of_example(operands, place)
            if len(inputs) <= limit:
                if operands.proj_out is not None:
                    outputs = ops.project(outputs.contiguous(), operands.proj_out)
                kept[place] = inputs.float(), outputs.float() / self._loss_scale

    def of(self, name: str, places: Sequence[int]) -> ShortRows | None:
        """Of a module, those of the examples `places` that are short; None if none is."""
        kept = self._kept.get(name, {})
        rows = [row for row, place in enumerate(places) if place in kept]
        if not rows:
            return None
        inputs, outputs = zip(*(kept[places[row]] for row in rows), strict=True)
        ends = torch.tensor([0, *(len(x) for x in inputs)]).cumsum(0)
        return ShortRows(rows, torch.cat(inputs), torch.cat(outputs), ends)
