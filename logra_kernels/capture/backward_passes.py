"""The backward passes that begin while a capture is open.

torch has no hook for the beginning of a backward pass, so two of its functions are wrapped while
any capture is open: `torch.autograd.backward`, and the reentrant checkpoint's `apply`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from logra_kernels.capture.autograd_graph import require_grad


class BackwardPasses:
    """Tells the backward passes of one capture apart; a second one is an error.

    A pass that Tensor.backward begins gets a number here. A pass that begins another way
    (torch.autograd.grad) is known by the number that autograd gives it. A reentrant checkpoint
    begins passes of its own inside a pass, which belong to that pass.

    Args:
        check_roots: called with the tensors that a pass begins at, and with the gradients (or None)
            that it begins with; it may refuse them.
    """

    def __init__(
        self, check_roots: Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]
    ) -> None:
        self.check_roots = check_roots
        self.thread = 0  # the thread whose passes count
        self.seen: tuple[str, int] | None = None  # the pass that reached a watched module
        self._current: tuple[str, int] | None = None
        self._numbers = itertools.count()

    def __enter__(self) -> None:
        self._current = ("backward", next(self._numbers))

    def __exit__(self, *_: object) -> None:
        self._current = None

    def reached(self, module: str) -> None:
        """A gradient has reached a module: RuntimeError if it belongs to a second pass."""
        current = self._current or ("graph", torch._C._current_graph_task_id())
        if self.seen is None:
            self.seen = current
        elif self.seen != current:
            raise RuntimeError(
                f"module {module}: a second backward pass inside one `with`; open one for each "
                "forward and backward pass"
            )

    def watch(self) -> Callable[[], None]:
        """Watch this thread's passes from now on; returns the function that ends it.

        torch's functions are wrapped once for all captures. Captures of two threads may close in
        any order, and the last to close puts back what the first had found.
        """
        self.thread = threading.get_ident()
        with _watching:
            if not _watched:
                _unwrap.append(_wrap(torch.autograd, "backward", _watched_backward))
                _unwrap.append(_wrap(checkpoint.CheckpointFunction, "apply", _anchored_checkpoint))
            _watched.append(self)
        return self._unwatch

    def _unwatch(self) -> None:
        with _watching:
            _watched.remove(self)
            while _unwrap and not _watched:
                _unwrap.pop()()


_watched: list[BackwardPasses] = []
_unwrap: list[Callable[[], None]] = []
_watching = threading.Lock()


def _watched_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            # begun by a checkpoint, inside a pass
            return original(tensors, grad_tensors, *args, **kwargs)
        here = threading.get_ident()
        watched = [passes for passes in list(_watched) if passes.thread == here]
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        given = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors
        gradients = [None] * len(roots) if given is None else list(given)
        for passes in watched:
            passes.check_roots(roots, gradients)
        with ExitStack() as entered:
            for passes in watched:
                entered.enter_context(passes)
            return original(tensors, grad_tensors, *args, **kwargs)

    return backward


def _anchored_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """A reentrant checkpoint passes gradients on only if an input of its segment requires grad.

    In training the input does, because the weights below require grad. In a capture the weights
    are frozen, so the first floating-point input is made to require grad.
    """

    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        floating = [
            i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()
        ]
        anchored = any(args[i].requires_grad for i in floating)
        if torch.is_grad_enabled() and floating and not anchored:
            first = floating[0]
            args = (*args[:first], require_grad(args[first]), *args[first + 1 :])
        return original(function, preserve_rng_state, *args)

    return apply


def _wrap(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> Callable[[], None]:
    """Put make(original) in the place of owner.name; returns what puts the original back."""
    own = vars(owner).get(name)
    replacement = make(getattr(owner, name))
    setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)

    def restore() -> None:
        if own is None:
            delattr(owner, name)  # it was inherited
        else:
            setattr(owner, name, own)

    return restore
