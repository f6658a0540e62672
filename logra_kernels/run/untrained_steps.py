"""A warning where an optimizer steps, but the logged passes computed no gradient to step along."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class UntrainedSteps:
    """Watches the steps of all optimizers, and warns once of one that left a model as it was.

    A logged pass without `weight_gradients` computes no gradient of a parameter. An optimizer that
    steps after it finds none, and changes nothing, without a word.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._warned = False

    def watch(self, model: nn.Module) -> None:
        """Watch the steps on a model's parameters from now on, in place of an earlier model's."""
        if self._model is None:
            hook = weakref.WeakMethod(self._after_step)
            handle = register_optimizer_step_post_hook(
                lambda optimizer, *_: None if (call := hook()) is None else call(optimizer)
            )
            weakref.finalize(self, handle.remove)
        self._model = weakref.ref(model)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        model = None if self._warned or self._model is None else self._model()
        if model is None:
            return
        own = set(model.parameters())
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p in own]
        if stepped and all(parameter.grad is None for parameter in stepped):
            self._warned = True
            warnings.warn(
                f"{type(optimizer).__name__} stepped on parameters that have no gradient, and "
                "changed nothing: run(data_id, mask) computes the parameters' gradients only with "
                "weight_gradients=True, which logging while training needs",
                stacklevel=4,
            )
