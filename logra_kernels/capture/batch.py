"""What the user says of one batch: how many examples it holds, and which of its tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BatchAxis(NamedTuple):
    """Where a layer's inputs have their examples.

    dim: the axis that the user told, 0 or 1; None: the first, unless that is in doubt.
    sequence_first: the name of a module that takes [T, N, ...], which raises a doubt.
    batch_first: whether a module of the model says that it takes [N, T, ...].
    routed: whether the layer is an expert, whose input may be a list of tokens.
    """

    dim: int | None = None
    sequence_first: str = ""
    batch_first: bool = False
    routed: bool = False


class Batch:
    """N examples and what counts of their tokens. A logged pass checks it here and nowhere else.

    Args:
        num_examples: N.
        mask: [N, T] of 0 and 1 (bool, integer or float), on any device; None: every token counts.
        cu_seqlens: [N+1] integers from 0 that rise: example n's tokens are those from
            cu_seqlens[n] to cu_seqlens[n + 1] of a packed sequence.
        position_ids: [T] or [1, T], the same told by positions that begin at 0 in each example.
        name: what an error calls the mask.

    Raises: ValueError for another shape, other values, or a mask of packed tokens.
    """

    def __init__(
        self,
        num_examples: int,
        mask: Any = None,
        *,
        cu_seqlens: Any = None,
        position_ids: Any = None,
        name: str = "mask",
    ) -> None:
        self.num_examples = num_examples
        self._name = name
        self.mask = None if mask is None else _as_bool(name, mask, num_examples)  # [N, T]
        self.cu_seqlens = _as_cu_seqlens(num_examples, cu_seqlens, position_ids)  # [N+1]
        self._num_packed = 0 if self.cu_seqlens is None else int(self.cu_seqlens[-1])
        if self.cu_seqlens is not None and mask is not None:
            raise ValueError(
                "mask: expected None beside packed sequences, which have no padding; leave tokens "
                "out by their labels"
            )
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def mask_on(self, device: torch.device) -> Tensor | None:
        """The mask, copied to a device once for all layers."""
        return self._on("mask", self.mask, device)

    def cu_seqlens_on(self, device: torch.device) -> Tensor | None:
        """The boundaries of packed examples, copied to a device once for all layers."""
        return self._on("cu_seqlens", self.cu_seqlens, device)

    def count_tokens(
        self,
        module: str,
        lead: torch.Size,
        shape: torch.Size,
        axis: BatchAxis = BatchAxis(),  # noqa: B008 (a tuple of constants)
    ) -> tuple[int, bool]:
        """(T, whether mask and packing apply), for an input of `shape`.

        `lead` is the shape without its feature axis. [N, ...]: T is the product of the other
        axes. [N]: T = 1, and a token mask does not apply. [N·T] with a mask [N, T]: the model
        flattened the examples' tokens. Packed tokens are [T] or [1, T].

        Raises: ValueError if the input does not hold N examples, or the mask another T, or if it
            cannot be told which axis is the batch.
        """
        count, mask = self.num_examples, self.mask
        if self.cu_seqlens is not None and lead.numel() == max(lead, default=0) == self._num_packed:
            return self._num_packed, True
        if len(lead) == 1:
            if lead[0] == count:
                one_token = mask is not None and mask.shape[1] == 1
                if axis.routed and axis.dim is None and count > 1 and not one_token:
                    raise axis_in_doubt(
                        module, shape, f"{module} is an expert", "N tokens of its own"
                    )
                return 1, one_token
            if mask is not None and lead[0] == mask.numel():
                if mask.shape[1] > 1:
                    _refuse_doubt(module, count, shape, axis)
                return mask.shape[1], True
            raise self.shape_error(module, shape, "[N, ...], or [N*T, ...] with a mask [N, T]")
        dim = axis.dim or 0
        if self.cu_seqlens is not None or len(lead) <= dim or lead[dim] != count:
            raise self.shape_error(
                module, shape, "[T, N, features]" if dim else "[N, ..., features], the batch first"
            )
        if lead[1] == count:
            _refuse_doubt(module, count, shape, axis)
        return self.expect_tokens(module, lead.numel() // max(count, 1)), True

    def expect_tokens(self, module: str, tokens: int) -> int:
        """T, if the mask has as many columns as the module has tokens; else a ValueError."""
        if self.mask is not None and self.mask.shape[1] != tokens:
            raise ValueError(
                f"{self._name}: expected shape [N, T] = [{self.num_examples}, {tokens}] for the "
                f"tokens of module {module}, got {list(self.mask.shape)}"
            )
        return tokens

    def shape_error(self, module: str, shape: torch.Size, want: str) -> ValueError:
        """The error for an input of a module that does not hold the batch's examples."""
        if self.cu_seqlens is not None:
            want = f"[1, T, features] or [T, features] with T = {self._num_packed} packed tokens"
        advice = ""
        if len(shape) > 2 and shape[1] == self.num_examples and "[N, ..." in want:
            advice = "; if its second axis is the batch, say watch(..., batch_dim=1)"
        return ValueError(
            f"module {module}: expected an input of shape {want} with N = {self.num_examples} "
            f"(one per data_id), got {list(shape)}{advice}; if the module does not see the "
            "examples one by one, leave it out by name_filter or type_filter"
        )

    def _on(self, name: str, tensor: Tensor | None, device: torch.device) -> Tensor | None:
        if tensor is None:
            return None
        if (name, device) not in self._on_device:
            self._on_device[name, device] = tensor.to(device)
        return self._on_device[name, device]


def _refuse_doubt(module: str, count: int, shape: torch.Size, axis: BatchAxis) -> None:
    if axis.dim is None and axis.sequence_first and count > 1:
        why = f"{axis.sequence_first} has batch_first=False"
        raise axis_in_doubt(module, shape, why, "[T, N, ...]")


def axis_in_doubt(module: str, shape: torch.Size, why: str, other: str) -> ValueError:
    """The error for an input whose batch axis cannot be told."""
    return ValueError(
        f"module {module}: {why}, so that its input {list(shape)} may hold {other}, and the "
        "gradients of examples would be mixed; say which axis is the batch by "
        f"watch(..., batch_dim=0 or 1), for one module by batch_dim={{{module!r}: 0}}, or leave "
        "it out by name_filter"
    )


def _as_bool(name: str, mask: Any, num_examples: int) -> Tensor:
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: expected a tensor [N, T] of 0 and 1, got {mask!r:.80}"
        ) from error
    if mask.ndim != 2 or mask.shape[0] != num_examples:
        raise ValueError(
            f"{name}: expected shape [N, T] with N = {num_examples} (one row per data_id), "
            f"got {list(mask.shape)}"
        )
    kept: Tensor = mask != 0
    if mask.dtype != torch.bool and not torch.equal(kept.to(mask.dtype), mask):
        raise ValueError(f"{name}: expected only 0 and 1, got other values")
    return kept


def _as_cu_seqlens(num_examples: int, cu_seqlens: Any, position_ids: Any) -> Tensor | None:
    """The boundaries [N+1] of packed examples, int64, or None if the tokens are not packed."""
    if cu_seqlens is not None and position_ids is not None:
        raise ValueError("position_ids: expected None beside cu_seqlens, got both")
    if position_ids is not None:
        bounds = _starts(_integers("position_ids", position_ids))
    elif cu_seqlens is not None:
        bounds = _integers("cu_seqlens", cu_seqlens)
        if bounds.ndim != 1 or not len(bounds) or bounds[0] != 0 or (bounds.diff() < 1).any():
            raise ValueError(
                "cu_seqlens: expected [N+1] integers from 0 that rise, "
                f"got {_shown(bounds)} of shape {list(bounds.shape)}"
            )
    else:
        return None
    if len(bounds) != num_examples + 1:
        raise ValueError(
            f"{'cu_seqlens' if position_ids is None else 'position_ids'}: expected "
            f"{num_examples} packed examples (one per data_id), got {len(bounds) - 1}"
        )
    return bounds


def _starts(positions: Tensor) -> Tensor:
    """The boundaries of examples whose positions are 0, 1, 2, …"""
    tokens = positions[0] if positions.ndim == 2 and len(positions) == 1 else positions
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"position_ids: expected shape [T] or [1, T], got {list(positions.shape)}")
    starts = (tokens == 0).nonzero()[:, 0]
    places = torch.arange(len(tokens), device=tokens.device)
    if tokens[0] != 0 or (tokens != places - starts[(tokens == 0).cumsum(0) - 1]).any():
        raise ValueError(
            "position_ids: expected positions that count up from 0 in each example, "
            f"got {_shown(tokens)}"
        )
    return torch.cat([starts, starts.new_tensor([len(tokens)])])


def _integers(name: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a tensor of integers, got {values!r:.80}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {tensor.dtype}")
    return tensor.detach().long()


def _shown(values: Tensor) -> Sequence[Any]:
    return [*values.flatten()[:16].tolist(), *["…"] * (values.numel() > 16)]
