"""What a capture does to the user's autograd graph: small additions that change no value."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

# The overload itself: looking it up takes as long as the call.
_unsafe_view = torch.ops.aten._unsafe_view.default


def hookable(output: Tensor) -> tuple[Tensor, Node, int]:
    """What stands for a module's output, the graph node that makes it, and its place there.

    The node receives the gradient of the output as the module made it: after all hooks that the
    user puts on the tensor, and before any later change of the tensor in place.
    """
    is_view = output._is_view()
    made = output
    if not output.requires_grad:
        made = require_grad(output)
    elif is_view or output.is_leaf:
        # The same memory, neither a view nor a leaf. The output of a linear layer on tokens is a
        # view of its matrix product; a change of it in place would go around the view's node.
        made = _unsafe_view(output, output.shape)
    assert made.grad_fn is not None
    # A view stays one: autograd drops the hooks on a view that is then changed in place.
    return made.view_as(made) if is_view else made, made.grad_fn, made.output_nr


def require_grad(tensor: Tensor) -> Tensor:
    """A copy that requires grad, so that the backward pass comes down to it.

    It is a copy, because the tensor itself could neither be changed in place afterwards (it would
    be a leaf) nor be a view.
    """
    anchor = torch.empty(0, device=tensor.device, requires_grad=True)
    copy: Tensor = _CopyThatRequiresGrad.apply(tensor, anchor)  # type: ignore[no-untyped-call]
    return copy


def plain_arithmetic(like: Tensor) -> AbstractContextManager[Any]:
    """Turn autograd off, and autocast where it is on (turning it off takes 3 us)."""
    if not torch.is_autocast_enabled(like.device.type):
        return torch.no_grad()
    context = ExitStack()
    context.enter_context(torch.no_grad())
    context.enter_context(torch.autocast(like.device.type, enabled=False))
    return context


def untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, hidden from Dynamo: that of torch 2.6 traces the hooks of a compiled model.

    Importing Dynamo takes a second. Where it was not imported, nothing is compiled.
    """
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


class _CopyThatRequiresGrad(torch.autograd.Function):
    """A copy of the tensor. The anchor makes it require grad, and never receives a gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None
