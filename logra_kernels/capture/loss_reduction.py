"""Whether a loss was averaged, read off the end of its autograd graph.

Seen: a mean, or a loss function with reduction="mean", followed by casts, additions, and products
or quotients. Not seen: a sum that the user divides by a count of tokens, which looks like any
other scaling.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

AVERAGED_LOSS = ("raise", "warn", "allow")  # what an averaged loss leads to

_SCALARS_PASS = (
    "ToCopyBackward",
    "AddBackward",
    "SubBackward",
    "NegBackward",
    "MulBackward",
    "DivBackward",
    "ViewBackward",
    "SqueezeBackward",
    "UnsqueezeBackward",
    "AliasBackward",
    "CloneBackward",
)
_MEAN = 1  # torch's number for reduction="mean"
_MOST_NODES = 32


def check_summed(averaged_loss: str, roots: Sequence[Tensor]) -> None:
    """Refuse an averaged loss, or warn of it, where a backward pass begins at `roots`."""
    if averaged_loss == "allow":
        return
    found = next(filter(None, (averaged_by(root) for root in roots)), None)
    if found is None:
        return
    message = (
        f"loss: expected a sum over examples and tokens, got a mean ({found}), which scales every "
        "row by the size of the batch; compute it with reduction='sum', or pass "
        "averaged_loss='allow'"
    )
    if averaged_loss == "raise":
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)  # the caller of Tensor.backward


def averaged_by(loss: Tensor) -> str | None:
    """The autograd node that averaged the loss, or None."""
    if loss.grad_fn is None or loss.numel() != 1:
        return None
    waiting: list[Any] = [loss.grad_fn]
    for _ in range(_MOST_NODES):
        if not waiting:
            break
        node = waiting.pop()
        name: str = node.name()
        if name.startswith("MeanBackward"):
            return name
        if getattr(node, "_saved_reduction", None) == _MEAN:
            return f"{name} with reduction='mean'"
        if name.startswith(_SCALARS_PASS):
            waiting += [child for child, _ in node.next_functions if child is not None]
    return None
