"""The short way past torch's dispatcher: taken where nothing differs, left where anything does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_cases import CALLS, DY, PROJ_IN, X, same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from logra_kernels import _native, ops
from logra_kernels.ops._direct import direct

# A call of each op.
FIRST = {case.op: case for case in reversed(CALLS)}

needs_kernels = pytest.mark.skipif(ops.isa() is None, reason="only the kernels have a short way")


@needs_kernels
def test_plain_tensors_take_it() -> None:
    assert direct(X, None, X.bfloat16()[:, 1:])
    with torch.no_grad(), torch.autocast("cpu"):
        assert direct(X, nn.Parameter(X), X.clone().requires_grad_())
    assert not direct(nn.Parameter(X)), "autograd has to see what it differentiates"
    with torch.inference_mode():
        assert direct(X, torch.zeros(3))
    seen = []
    X.clone().requires_grad_().mul(2).register_hook(lambda dy: seen.append(direct(dy)))
    x = X.clone().requires_grad_()
    y = x * 2
    y.register_hook(lambda dy: seen.append(direct(dy)))
    y.sum().backward()
    assert seen == [True]


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        X.as_subclass(Subclass),
        X.to_sparse(),
        X.to("meta"),
        torch._neg_view(X),
        torch._efficientzerotensor(3, 5, 8),
        torch._to_functional_tensor(X),
        X.to_mkldnn(),
        [[1.0]],
    ],
    ids=lambda t: type(t).__name__ + str(getattr(t, "layout", "")),
)
def test_other_tensors_do_not(tensor: Any) -> None:
    assert not direct(X, tensor)


def test_a_negated_view_counts_as_its_values() -> None:
    assert same_bits(ops.project(torch._neg_view(X), PROJ_IN), ops.project(-X, PROJ_IN))


class SeenByDispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenByFunction(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def profiled() -> Iterator[Any]:
    class Seen:
        names: list[str]

    seen = Seen()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield seen
    seen.names = [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("watching", [SeenByDispatch, SeenByFunction, profiled])
@pytest.mark.parametrize("name", FIRST)
def test_who_watches_operations_sees_the_op(watching: Any, name: str) -> None:
    plain = FIRST[name]()
    with watching() as seen:
        watched = FIRST[name]()
    assert any(f"logra.{name}" in n or f"logra::{name}" in n for n in seen.names), seen.names
    assert same_bits(plain, watched)


@pytest.mark.parametrize("name", FIRST)
def test_under_a_fake_mode_the_result_is_fake(name: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        result = FIRST[name]()
    for tensor in [result] if isinstance(result, Tensor) else result:
        assert type(tensor).__name__ == "FakeTensor"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_goes_through_the_dispatcher() -> None:
    """A batched tensor passes for one slice; torch runs the op once a slice."""
    mapped = torch.func.vmap(lambda x: ops.per_sample_gradients(x, DY[:1]))(X[:, None])
    each = torch.stack([ops.per_sample_gradients(x[None], DY[:1]) for x in X])
    assert same_bits(mapped, each)


def test_a_trace_records_the_op() -> None:
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: ops.project(x, PROJ_IN))(X).code
    assert "logra.project" in graph


def test_without_the_kernels_there_is_no_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "C", None)
    assert not direct(X)
    assert ops.project(X, PROJ_IN).shape == (3, 5, 6)
