"""The small models' losses with labels that the model draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from summed_losses import Losses
from torch import Tensor, nn

from logra_kernels.run import sample_labels

Logits = Callable[[nn.Module, Sequence[int]], Tensor]  # [N, C] or [N, T, C]


def sampled(logits_of: Logits, mask: Tensor | None = None, seed: int = 0) -> Losses:
    """The summed loss of drawn labels; mask [N, T] says which predictions count."""

    def loss(model: nn.Module, part: Sequence[int]) -> Tensor:
        logits = logits_of(model, part)
        ids = [f"row{int(n)}" for n in part]
        counted = None if mask is None else mask[list(part)]
        labels = sample_labels(logits, ids, seed=seed, mask=counted)
        if counted is not None:
            labels = labels.masked_fill(counted == 0, -100)
        return nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=-100
        )

    return loss
