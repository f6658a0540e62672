"""Which axis of a layer's input is the batch: what the user says of it, and what raises a doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.capture.batch import Batch, BatchAxis
from logra_kernels.capture.layers import Layer, plain_name
from logra_kernels.capture.masks import most_specific

_VIEWS = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "ToCopyBackward")


def set_batch_axes(
    model: nn.Module, layers: Sequence[Layer], batch_dim: int | Mapping[str, int] | None
) -> None:
    """Tell the layers which axis of their inputs is the batch, or why that is in doubt.

    Args:
        model: the model that holds the layers.
        layers: the watched modules.
        batch_dim: 0 or 1, or {part of a module's name: 0 or 1}; None: not told.

    Raises: ValueError for another axis, or a part that no layer's name has.
    """
    told: dict[str, Any] = dict(batch_dim if isinstance(batch_dim, Mapping) else {"": batch_dim})
    for key, dim in told.items():
        if (dim is None and batch_dim is None) or (type(dim) is int and dim in (0, 1)):
            continue
        raise ValueError(f"batch_dim: expected 0 or 1, got {dim!r}" + f" for {key!r}" * bool(key))
    for key in told:
        if all(most_specific(layer.name, [key]) is None for layer in layers):
            shown = ", ".join(layer.name for layer in layers[:4])
            raise ValueError(f"batch_dim: no watched module's name has the parts {key!r}: {shown}")
    first = (n for n, m in model.named_modules() if getattr(m, "batch_first", None) is False)
    doubtful = next(first, None)
    sequence_first = "" if doubtful is None else plain_name(doubtful) or "the model"
    for layer in layers:
        part = most_specific(layer.name, told)
        dim = None if part is None else told[part]
        layer.axis = BatchAxis(dim, sequence_first, "expert" in layer.name.lower())


def refuse_picked(module: str, x: Tensor, batch: Batch) -> None:
    """ValueError if an input [N, I] is N tokens that an index picked, not one of each example.

    It is read off the autograd graph, where the tensor that was indexed is [N, T, ...], [N·T, I] or
    packed. An expert of a mixture, or a head on masked tokens, may receive N tokens by chance.
    """
    num_examples = batch.num_examples
    if x.ndim != 2 or len(x) != num_examples or num_examples < 2:
        return
    node: Any = x.grad_fn
    while node is not None and node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    if node is None or not node.name().startswith(("IndexBackward", "IndexSelectBackward")):
        return
    sizes = node._saved_self_sym_sizes
    if node.name().startswith("IndexBackward"):
        indices = list(enumerate(node._saved_indices))
    else:
        indices = [(node._saved_dim, node._saved_index)]
    axis, index = next((axis, index) for axis, index in indices if index is not None)
    if any(size != 1 for size in sizes[:axis]):
        return  # the same tokens of every example
    index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.flatten() % sizes[axis]
    if batch.cu_seqlens is None:
        examples = index // max(sizes[axis] // num_examples, 1)
    else:
        examples = torch.bucketize(index, batch.cu_seqlens[1:].to(index.device), right=True)
    wanted = torch.arange(num_examples, device=index.device)
    if len(index) == num_examples and not torch.equal(examples, wanted):
        raise ValueError(
            f"module {module}: its input {list(x.shape)} is not one token of each of the "
            f"{num_examples} examples, but tokens that an index picked (as for an expert); leave "
            "it out by name_filter, or say watch(..., batch_dim={"
            f"{module!r}: 0}}) if its rows are the examples"
        )
