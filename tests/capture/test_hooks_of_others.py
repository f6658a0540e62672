"""Hooks that the user put on the model: the rows stay autograd's weight gradients, or are refused.

The truth is a loop of autograd over single examples, with the same hooks in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle
from toy_models import autograd_rows, capture_rows, make_layers, square_sum

from logra_kernels.capture import Capture


class HookedTensors(nn.Module):
    """Each watched output gets tensor hooks in the forward pass; 2-D and 3-D inputs."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.first = nn.Linear(7, 6)
        self.second = nn.Linear(6, 5)

    def forward(self, x: Any) -> Any:
        hidden = self.first(x)
        hidden.register_hook(lambda g: 2 * g)
        hidden = hidden.mul_(3) if self.inplace else torch.tanh(hidden)
        hidden.register_hook(lambda g: g - 0.25)
        out = self.second(hidden)
        out.register_hook(torch.sin)
        return out


class Plain(nn.Module):
    """Changes nothing in place, which a module with full backward hooks would not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 6)
        self.second = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


def assert_autograds_rows(model: nn.Module, x: Tensor) -> None:
    layers = make_layers(model, rank=3)
    got = capture_rows(model, layers, len(x), partial(square_sum, model, x))
    want = autograd_rows(model, layers, [partial(square_sum, model, one[None]) for one in x])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7)])
def test_tensor_hooks_inside_the_model(shape: tuple[int, ...], inplace: bool) -> None:
    torch.manual_seed(0)
    assert_autograds_rows(HookedTensors(inplace).double(), torch.randn(shape).double())


def detached(module: nn.Module, args: object, output: Tensor) -> None:
    output.detach().norm()


def tripled(module: nn.Module, gradients: Any) -> Any:
    return (3 * gradients[0],)


HOOKS: dict[str, Callable[[nn.Module], RemovableHandle]] = {
    "scales": lambda m: m.register_forward_hook(lambda m, x, o: o * 3),
    "first": lambda m: m.register_forward_hook(lambda m, x, o: o * 3, prepend=True),
    "in place": lambda m: m.register_forward_hook(lambda m, x, o: o.mul_(3)),
    "looks": lambda m: m.register_forward_hook(detached),
    "same": lambda m: m.register_forward_hook(lambda m, x, o: o),
    "tensor": lambda m: m.register_forward_hook(
        lambda m, x, o: (o.register_hook(lambda g: 2 * g), None)[1]
    ),
    "tensor in place": lambda m: m.register_forward_hook(
        lambda m, x, o: (o.register_hook(lambda g: g.mul_(2)), None)[1]
    ),
    "input": lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] * 2,)),
    "output gradient": lambda m: m.register_full_backward_pre_hook(tripled),
    "input gradient": lambda m: m.register_full_backward_hook(lambda m, i, o: tripled(m, i)),
}


@pytest.mark.parametrize("later", HOOKS)
@pytest.mark.parametrize("earlier", HOOKS)
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7)])
def test_hooks_of_a_watched_module(shape: tuple[int, ...], earlier: str, later: str) -> None:
    torch.manual_seed(0)
    model = Plain().double()
    # Without a gradient of the input, a full backward hook of the lowest module has none to change.
    x = torch.randn(shape).double().requires_grad_()
    for module in (model.first, model.second):
        HOOKS[earlier](module)
        HOOKS[later](module)
    assert_autograds_rows(model, x)


def test_a_hook_put_on_inside_the_pass() -> None:
    torch.manual_seed(0)
    model, x = Plain().double(), torch.randn(4, 7).double()
    layers = make_layers(model, rank=3)
    with Capture(model, layers, 4) as capture:
        model.second.register_forward_hook(lambda m, x, o: o * 3)
        model(x).square().sum().backward()
    want = autograd_rows(model, layers, [partial(square_sum, model, o[None]) for o in x])
    torch.testing.assert_close(capture.rows(), want, rtol=1e-11, atol=1e-12)


@contextmanager
def refused_for(module: str, reason: str) -> Iterator[None]:
    with pytest.raises(RuntimeError, match=re.escape(f"module {module}: {reason}")):
        yield


def test_a_hook_put_before_all_others_inside_the_pass_is_refused() -> None:
    model = Plain()
    with (
        refused_for("second", "a forward hook was put before all others after the pass began"),
        Capture(model, make_layers(model), 2),
    ):
        model.second.register_forward_hook(lambda m, x, o: o * 3, prepend=True)
        model(torch.randn(2, 7))


def test_a_deprecated_backward_hook_is_refused() -> None:
    model = Plain()
    model.second.register_backward_hook(lambda m, i, o: None)
    with refused_for("second", "it has a hook of register_backward_hook"):
        Capture(model, make_layers(model), 2).__enter__()
    assert not model.first._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_a_global_hook_that_only_looks() -> None:
    torch.manual_seed(0)
    handle = register_module_forward_hook(detached)
    try:
        assert_autograds_rows(Plain().double(), torch.randn(4, 7).double())
    finally:
        handle.remove()
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_global_hook_that_changes_the_output_is_refused(inplace: bool, inside: bool) -> None:
    def change(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        if not isinstance(module, nn.Linear):
            return None
        return output.mul_(3) if inplace else output * 3

    model = Plain()
    capture = Capture(model, make_layers(model), 2)
    handle = None if inside else register_module_forward_hook(change)  # type: ignore[arg-type]
    try:
        with refused_for("first", "a global forward hook"), capture:
            handle = handle or register_module_forward_hook(change)  # type: ignore[arg-type]
            model(torch.randn(2, 7))
    finally:
        assert handle is not None
        handle.remove()
    assert not nn.modules.module._global_forward_hooks
