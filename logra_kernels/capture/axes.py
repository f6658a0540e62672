"""Which axis of a layer's input is the batch: what the user says of it, and what raises a doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.capture.batch import Batch, BatchAxis, axis_in_doubt
from logra_kernels.capture.layers import Layer, plain_name
from logra_kernels.capture.masks import most_specific

_VIEWS = (
    "ViewBackward",
    "UnsafeViewBackward",
    "ReshapeAliasBackward",
    "CloneBackward",
    "ToCopyBackward",
)


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
    says = {name: getattr(m, "batch_first", None) for name, m in model.named_modules()}
    doubtful = next((plain_name(name) for name, first in says.items() if first is False), None)
    sequence_first = "" if doubtful is None else doubtful or "the model"
    batch_first = any(first is True for first in says.values())
    for layer in layers:
        part = most_specific(layer.name, told)
        dim = None if part is None else told[part]
        layer.axis = BatchAxis(
            dim, sequence_first, batch_first, routed="expert" in layer.name.lower()
        )


def refuse_picked(module: str, x: Tensor, batch: Batch) -> None:
    """ValueError if an input [N, I] is N tokens that an index picked, not one of each example.

    It is read off the autograd graph, where the tensor that was indexed is [N, T, ...], [N·T, I] or
    packed. An expert of a mixture, or a head on masked tokens, may receive N tokens by chance.
    """
    num_examples = batch.num_examples
    if x.ndim != 2 or len(x) != num_examples or num_examples < 2:
        return
    node = _behind_views(x)
    if node is None or not node.name().startswith(("IndexBackward", "IndexSelectBackward")):
        return
    sizes = node._saved_self_sym_sizes
    if node.name().startswith("IndexBackward"):
        indices = list(enumerate(node._saved_indices))
    else:
        indices = [(node._saved_dim, node._saved_index)]
    axis, index = next((axis, index) for axis, index in indices if index is not None)
    axis = _signed(axis)
    table = node.next_functions[0][0].name()
    if any(size != 1 for size in sizes[:axis]) or table.endswith("AccumulateGrad"):
        return  # the same tokens of every example, or rows of a parameter
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


class SwappedAxes:
    """Looks for a tensor whose first two axes were swapped, which may have put sequences first.

    It is asked where T = N, and of tokens that were flattened, where a shape does not tell; and not
    in a model with `batch_first=True`, whose modules swap axes in and out.
    """

    def __init__(self) -> None:
        self._walked = set[Any]()  # nodes of the graph that were looked at, with all above them

    def refuse_input(self, layer: Layer, x: Tensor, batch: Batch) -> None:
        """ValueError if the graph of a linear layer's input, or its strides, show a swap."""
        count, mask = batch.num_examples, batch.mask
        if not _tells_nothing(layer) or count < 2:
            return
        if x.ndim == 2:
            flattened = mask is not None and len(x) == mask.numel() and mask.shape[1] > 1
            node = _behind_views(x) if flattened else None
            found = node is not None and _swaps(node)
        else:
            found = _may_be_swapped(x, count) and (_is_transposed(x) or self._swap_above(x))
        if found:
            raise axis_in_doubt(layer.name, x.shape, _SWAPPED, "[T, N, ...]")

    def refuse_gradient(self, layer: Layer, dy: Tensor, batch: Batch) -> None:
        """ValueError if the strides of a linear layer's output gradient show a swap after it."""
        count = batch.num_examples
        if (
            count > 1
            and _tells_nothing(layer)
            and _may_be_swapped(dy, count)
            and _is_transposed(dy)
        ):
            raise axis_in_doubt(layer.name, dy.shape, _SWAPPED, "[T, N, ...]")

    def forget(self) -> None:
        """Let go of the graph."""
        self._walked.clear()

    def _swap_above(self, x: Tensor) -> bool:
        waiting: list[Any] = [x.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in self._walked:
                continue
            self._walked.add(node)
            if _swaps(node):
                return True
            waiting += [child for child, _ in node.next_functions]
        return False


_SWAPPED = "the first two axes of a tensor before or after it are swapped"


def _tells_nothing(layer: Layer) -> bool:
    """Whether a layer is linear, in a model none of whose modules says that the batch is first."""
    return type(layer).count_tokens is Layer.count_tokens and not layer.axis.batch_first


def _may_be_swapped(tensor: Tensor, count: int) -> bool:
    return tensor.ndim > 2 and tensor.shape[0] == tensor.shape[1] == count


def _is_transposed(tensor: Tensor) -> bool:
    return 0 < tensor.stride(0) < tensor.stride(1)


def _swaps(node: Any) -> bool:
    """Whether a node of the graph swaps the first two of three axes or more."""
    name = node.name()
    if name.startswith("TransposeBackward"):
        sizes = node._input_metadata[0].shape
        axes = {_signed(dim) % len(sizes) for dim in (node._saved_dim0, node._saved_dim1)}
        return len(sizes) > 2 and axes == {0, 1}
    if name.startswith("PermuteBackward"):
        return [_signed(dim) % len(node._saved_dims) for dim in node._saved_dims][:2] == [1, 0]
    return False


def _behind_views(x: Tensor) -> Any:
    """The node that made a tensor's values, or None."""
    node: Any = x.grad_fn
    while node is not None and node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    return node


def _signed(axis: int) -> int:
    """An axis as it was written; a graph saves it as an unsigned number of 64 bits."""
    return axis - (1 << 64) if axis >= 1 << 63 else axis
