"""Whether a loss is a sum over examples and tokens, read off the end of its autograd graph.

Followed are the nodes between the backward pass's root and the sums and means that the loss is made
of: additions, casts, products with constants, quotients by them. A sum must come out times 1, so
that a mean times its count is a sum, too. What a constant did to the terms before they were
summed is not seen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

AVERAGED_LOSS = ("raise", "warn", "allow")  # what an averaged loss leads to

_SCALARS_PASS = (
    "ToCopyBackward",
    "CopyBackward",
    "CopySlices",
    "AddBackward",
    "SubBackward",
    "RsubBackward",
    "NegBackward",
    "ViewBackward",
    "UnsafeViewBackward",
    "ReshapeAliasBackward",
    "ExpandBackward",
    "SqueezeBackward",
    "UnsqueezeBackward",
    "AliasBackward",
    "CloneBackward",
    "WhereBackward",
)
_NOT_LINEAR = (
    "ExpBackward",
    "LogBackward",
    "Log1PBackward",
    "PowBackward",
    "ReciprocalBackward",
    "SqrtBackward",
    "RsqrtBackward",
    "NormBackward",
    "LinalgVectorNormBackward",
    "LogsumexpBackward",
    "ProdBackward",
    "StdBackward",
    "VarBackward",
)
_MEAN = 1  # torch's number for reduction="mean"
_NUMBERS = (torch.float64, torch.int64)  # the types that a Python number has in a graph
_MOST_TOKENS = 2**24  # of a batch
_ROUNDING = 1e-6  # of a float32 mean times its count, and of the count's reciprocal


def check_loss_scale(loss_scale: Any) -> float:
    """The factor as a float. Raises: ValueError unless it is one finite number above 0."""
    is_number = isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool)
    if is_number or (isinstance(loss_scale, Tensor) and loss_scale.numel() == 1):
        value = float(loss_scale)
        if math.isfinite(value) and value > 0:
            return value
    raise ValueError(
        "loss_scale: expected a finite number above 0 (what the summed loss was multiplied by), "
        f"got {loss_scale!r:.80}"
    )


def check_summed(
    averaged_loss: str,
    num_examples: int,
    roots: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> None:
    """Refuse a loss that is no sum, or warn of it, where a backward pass begins.

    Args:
        averaged_loss: one of AVERAGED_LOSS.
        num_examples: N. A function of one example's sum is that example's loss.
        roots: where the pass begins, and `gradients`: what it begins with; None: with 1.
    """
    if averaged_loss == "allow":
        return
    pairs = zip(roots, gradients, strict=True)
    found = next(filter(None, (averaged_by(*pair, num_examples) for pair in pairs)), None)
    if found is None:
        return
    message = (
        f"loss: expected a sum over examples and tokens, got {found}; compute it with "
        "reduction='sum', or give run(..., loss_scale=) what the sum was multiplied by "
        "(1 / num_items_in_batch, scaler.get_scale(), 1 for a sum), or pass averaged_loss='allow' "
        "for rows of the loss as it is"
    )
    if averaged_loss == "raise":
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)  # the caller of Tensor.backward


class _Path(NamedTuple):
    """A node of the loss's graph, and the factors on the way to it; signs do not count."""

    node: Any
    whole: bool = True  # whether all of the loss passes here
    shared: float = 1.0  # factors of the whole loss
    computed: bool = False  # whether a tensor is among them
    own: float = 1.0  # factors of a term
    divided: float = 1.0  # of both: what quotients and means multiplied by
    by: str = ""  # what divided, nearest to the terms

    def divide(self, divisor: float, by: str) -> _Path:
        """The path past a quotient or a mean."""
        return self._replace(divided=self.divided / divisor if divisor else math.inf, by=by)


def averaged_by(loss: Tensor, gradient: Tensor | None, num_examples: int) -> str | None:
    """What makes a loss something else than a sum, or None."""
    begin = _Path(loss.grad_fn)
    if gradient is not None:
        value = _uniform(gradient)
        begin = begin._replace(shared=1.0 if value is None else abs(value), computed=True)
    if loss.grad_fn is None or loss.numel() != 1:
        return None if loss.grad_fn is None else _verdict(begin, num_examples)
    waiting, seen = [begin], set[_Path]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        node, name = path.node, path.node.name()
        if isinstance(node, BackwardCFunction) and not name.startswith("_CopyThatRequiresGrad"):
            return f"the result of {name}, which does not show whether it is a mean"
        if path.whole and num_examples > 1 and name.startswith(_NOT_LINEAR):
            return f"a function of the sum that is not linear ({name})"
        past = _past_factor(path, name)
        if past is None:
            past = _past_mean(path, name)
            node = _stack_below(node, num_examples)
            if node is None:
                found = _verdict(past, num_examples)
                if found is not None:
                    return found
                continue
        children = [child for child, _ in node.next_functions if child is not None]
        whole = past.whole and len(children) == 1
        waiting += [past._replace(node=child, whole=whole) for child in reversed(children)]
    return None


def _stack_below(node: Any, num_examples: int) -> Any:
    """The stack of scalars that a sum or mean is over, if it is not one scalar for each example."""
    sizes = tuple(getattr(node, "_saved_self_sym_sizes", ()))
    stack = node.next_functions[0][0] if len(sizes) == 1 and sizes[0] != num_examples else None
    if stack is None or not stack.name().startswith(("StackBackward", "CatBackward")):
        return None
    return stack if len(stack.next_functions) == sizes[0] else None


def _past_factor(path: _Path, name: str) -> _Path | None:
    """The path past a node that hands its scalars on, with its factor; None at another node."""
    one = math.prod(getattr(path.node, "_saved_self_sym_sizes", (0,))) == 1
    if name.startswith(_SCALARS_PASS) or (one and name.startswith(("SumBackward", "MeanBackward"))):
        return path
    if not name.startswith(("MulBackward", "DivBackward")):
        return None
    if name.startswith("DivBackward"):
        if getattr(path.node, "_saved_self", None) is not None:
            return path  # the divisor depends on the model
        divisor = float(path.node._saved_other)
        return path.divide(abs(divisor), f"a sum divided by {divisor:.6g} ({name})")
    saved = (getattr(path.node, f"_saved_{side}", None) for side in ("other", "self"))
    known = [factor for factor in saved if factor is not None]
    if len(known) != 1:
        return path  # both factors depend on the model
    factor = known[0]
    value = abs(float(factor))
    if not path.whole:
        return path._replace(own=path.own * value)
    computed = path.computed or getattr(factor, "dtype", torch.float64) not in _NUMBERS
    return path._replace(shared=path.shared * value, computed=computed)


def _past_mean(path: _Path, name: str) -> _Path:
    """The path with the factor of the mean that it ends in, if it does."""
    node = path.node
    if name.startswith("MeanBackward"):
        sizes = node._saved_self_sym_sizes
        axes = getattr(node, "_saved_dim", None) or range(len(sizes))
        # Axes are saved as unsigned numbers of 64 bits: -1 is 2**64 - 1.
        axes = [axis - (1 << 64) if axis >= 1 << 63 else axis for axis in axes]
        return path.divide(math.prod(sizes[axis] for axis in axes), f"a mean ({name})")
    if getattr(node, "_saved_reduction", None) != _MEAN:
        return path
    weight = getattr(node, "_saved_total_weight", None)  # of nll_loss: the targets that count
    count = float(node._saved_self.numel() if weight is None else weight)
    return path.divide(count, f"a mean ({name} with reduction='mean')")


def _verdict(path: _Path, num_examples: int) -> str | None:
    """What the factors on a path make of the sum at its end, or None if it is kept.

    A constant that was written as a number is the user's wish, the same in all batches, unless it
    is one over what may be a count of examples or tokens.
    """
    scales = [path.divided * path.shared, path.divided * path.shared * path.own]
    if any(math.isclose(scale, 1, rel_tol=_ROUNDING) for scale in scales):
        return None
    if path.by and not math.isclose(path.divided, 1, rel_tol=_ROUNDING):
        return f"{path.by}, which scales every row by the size of the batch"
    count = 1 / path.shared if path.shared else math.inf
    least = max(num_examples, 3)  # 0.5 is that of half a square
    may_be_count = least - 0.5 < count < _MOST_TOKENS and math.isclose(
        count, round(count), rel_tol=_ROUNDING
    )
    if not path.computed and not may_be_count:
        return None
    return f"a sum times {path.shared:.6g}"


def _uniform(gradient: Tensor) -> float | None:
    """The one value that a tensor holds, or None."""
    values = gradient.detach().flatten()
    if not len(values) or not bool((values == values[0]).all()):
        return None
    return float(values[0])
