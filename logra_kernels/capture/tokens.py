"""The tokens of a pass: P_i x and P_o dy of every watched module, for Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.capture.layers import Call, Layer, Operands


@dataclass
class Tokens:
    """What a pass's modules were called with, kept until the pass ends.

    The memory is that of the projected activations, or, for a side without a projection, of the
    activations themselves.
    """

    loss_scale: float = 1.0  # what the loss, and so every dy, was multiplied by
    _calls: dict[str, list[Operands]] = field(default_factory=dict)

    def add(self, layer: Layer, call: Call, dy: Tensor) -> None:
        """Keep one call of a module.

        Raises: ValueError if the module's kind makes its gradients in a way of its own.
        """
        if not layer.groupable:
            raise ValueError(
                f"module {layer.name}: its kind {type(layer).__name__} has gradients of its own, "
                "which have no Kronecker factors; leave it out by name_filter or type_filter"
            )
        operands = layer.token_operands(call, dy)
        outputs = operands.outputs
        if operands.proj_out is not None:
            outputs = ops.project(outputs, operands.proj_out)
        self._calls.setdefault(layer.name, []).append(operands._replace(outputs=outputs))

    def of(self, name: str, form: str, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A module's vectors of the examples `places`, one example after the other.

        Args:
            name: the module's.
            form: "expand": every token that counts; "reduce": for each example the mean of its
                inputs and the sum of its output gradients, over the tokens that count.
            places: the examples' places in the batch.

        Returns: P_i x [n, Ki] and P_o dy [n, Ko], float32; of one-hot x their places [n] int64, as
            `Layer.token_operands` gives them. Both are empty for a module that was not called.

        Raises: ValueError for the mean of one-hot inputs, whose moment is not diagonal.
        """
        found_in, found_out = [], []
        for place in places:
            kept = [of_example(call, place) for call in self._calls.get(name, ())]
            if not kept:
                continue
            x, dy = (torch.cat(side) for side in zip(*kept, strict=True))
            dy = dy.float() / self.loss_scale
            if x.dtype == torch.int64:
                if form == "reduce":
                    raise ValueError(
                        f"module {name}: the mean of one-hot inputs has a moment of I x I; take "
                        'the form "expand" (kfac, ekfac), or a projection of the inputs'
                    )
            else:
                x = x.float()
            if form == "reduce":
                x, dy = x.mean(0, keepdim=True) if len(x) else x, dy.sum(0, keepdim=True)
                dy = dy[: len(x)]
            found_in.append(x)
            found_out.append(dy)
        if not found_in:
            return torch.empty(0, 0), torch.empty(0, 0)
        return torch.cat(found_in), torch.cat(found_out)


def of_example(call: Operands, place: int) -> tuple[Tensor, Tensor]:
    """The tokens of one example that count: P_i x [t, Ki] and P_o dy [t, Ko]."""
    x, dy, mask, ends = call.inputs, call.outputs, call.mask, call.cu_seqlens
    if ends is not None:
        part = slice(int(ends[place]), int(ends[place + 1]))
        return x[part], dy[part]
    x, dy = x[place], dy[place]
    return (x, dy) if mask is None else (x[mask[place]], dy[mask[place]])
