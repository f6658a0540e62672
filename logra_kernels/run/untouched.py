"""A look at a model that leaves no trace in it, nor in the random numbers of the program."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, loader: Any = None) -> Iterator[None]:
    """Put back, at the end, what passes over batches of a loader may change.

    That is the mode of every module, the buffers (such as running means), and the state of the
    random number generators of torch, NumPy, Python and the loader.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    owners = (loader, getattr(loader, "sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in states:
            generator.set_state(state)
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
        for module, training in modes:
            module.training = training


@contextmanager
def gradients_kept(loss: Tensor) -> Iterator[None]:
    """Put back the .grad of every leaf that a backward pass from `loss` reaches."""
    ends = (node for node in _nodes(loss) if type(node).__name__ == "AccumulateGrad")
    leaves = {node.variable for node in ends}
    kept = [(leaf, leaf.grad) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None  # a sum into the user's tensor would change it
    try:
        yield
    finally:
        for leaf, grad in kept:
            leaf.grad = grad


def _nodes(loss: Tensor) -> set[Any]:
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [child for child, _ in node.next_functions]
    return seen
