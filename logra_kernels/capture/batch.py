"""What the user says of one batch: how many examples it holds, and which of its tokens count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Batch:
    """N examples and their token mask. A logged pass checks the mask here and nowhere else.

    Args:
        num_examples: N.
        mask: [N, T] of 0 and 1 (bool, integer or float), on any device; None: every token counts.

    Raises: ValueError for a mask of another shape, or with other values.
    """

    def __init__(self, num_examples: int, mask: Any = None) -> None:
        self.num_examples = num_examples
        self.mask = None if mask is None else _as_bool(mask, num_examples)  # [N, T]
        self._on_device: dict[torch.device, Tensor] = {}

    def mask_on(self, device: torch.device) -> Tensor | None:
        """The mask, copied to a device once for all layers."""
        if self.mask is None:
            return None
        if device not in self._on_device:
            self._on_device[device] = self.mask.to(device)
        return self._on_device[device]

    def count_tokens(self, module: str, lead: torch.Size, shape: torch.Size) -> tuple[int, bool]:
        """(T, whether the mask applies), for an input of `shape`, `lead` without its feature axis.

        lead [N, ...]: T is the product of the other axes. lead [N]: T = 1, and a token mask does
        not apply. lead [N·T] with a mask [N, T]: the model flattened the examples' tokens.

        Raises: ValueError if the input does not hold N examples, or the mask another T.
        """
        count, mask = self.num_examples, self.mask
        if len(lead) == 1:
            if lead[0] == count:
                return 1, mask is not None and mask.shape[1] == 1
            if mask is not None and lead[0] == mask.numel():
                return mask.shape[1], True
            raise self.shape_error(module, shape, "[N, ...], or [N*T, ...] with a mask [N, T]")
        if len(lead) == 0 or lead[0] != count:
            raise self.shape_error(module, shape, "[N, ..., features], the batch first")
        return self.expect_tokens(module, lead[1:].numel()), True

    def expect_tokens(self, module: str, tokens: int) -> int:
        """T, if the mask has as many columns as the module has tokens; else a ValueError."""
        if self.mask is not None and self.mask.shape[1] != tokens:
            raise ValueError(
                f"mask: expected shape [N, T] = [{self.num_examples}, {tokens}] for the tokens of "
                f"module {module}, got {list(self.mask.shape)}"
            )
        return tokens

    def shape_error(self, module: str, shape: torch.Size, want: str) -> ValueError:
        """The error for an input of a module that does not hold the batch's examples."""
        return ValueError(
            f"module {module}: expected an input of shape {want} with N = {self.num_examples} "
            f"(one per data_id), got {list(shape)}; if the module does not see the examples one "
            "by one, leave it out by name_filter or type_filter"
        )


def _as_bool(mask: Any, num_examples: int) -> Tensor:
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"mask: expected a tensor [N, T] of 0 and 1, got {mask!r:.80}") from error
    if mask.ndim != 2 or mask.shape[0] != num_examples:
        raise ValueError(
            f"mask: expected shape [N, T] with N = {num_examples} (one row per data_id), "
            f"got {list(mask.shape)}"
        )
    kept: Tensor = mask != 0
    if mask.dtype != torch.bool and not torch.equal(kept.to(mask.dtype), mask):
        raise ValueError("mask: expected only 0 and 1, got other values")
    return kept
