"""What torch expects of every registered op."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_cases import (
    CALLS,
    DY,
    MASK,
    NAMES,
    PROJ_IN,
    PROJ_OUT,
    QUERIES,
    ROWS,
    OpCall,
    X,
    assert_same,
    call,
    randn,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from logra_kernels import ops

EVERY = pytest.mark.parametrize("case", CALLS, ids=NAMES)


def test_every_op_is_listed() -> None:
    others = {"TopK", "available_isas", "isa", "set_isa"}
    assert {case.op for case in CALLS} == set(ops.__all__) - others


@EVERY
def test_opcheck(case: OpCall) -> None:
    registered = getattr(torch.ops.logra, case.op).default
    torch.library.opcheck(registered, case.arguments, case.options)


BY_IDS = {"segment_ids": MASK.long() - 1, "num_segments": 2}


@pytest.mark.parametrize(
    "case",
    [*CALLS, call("projected_gradients", X, DY, PROJ_IN, PROJ_OUT, **BY_IDS)],
    ids=[*NAMES, "segment ids"],
)
def test_public_functions_compile_without_a_break(case: OpCall) -> None:
    torch._dynamo.reset()
    function = torch.compile(getattr(ops, case.op), fullgraph=True, backend="aot_eager")
    assert_same(case(SimpleNamespace(**{case.op: function})), case())


@pytest.mark.slow
def test_compiles_with_the_default_backend_and_changing_sizes() -> None:
    torch._dynamo.reset()

    def rows_of(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return 2 * ops.projected_gradients(x, dy, PROJ_IN, PROJ_OUT).flatten(1)

    compiled = torch.compile(rows_of, fullgraph=True, dynamic=True)
    for n, t in ((3, 5), (4, 9)):
        x, dy = randn(n, t, 8), randn(n, t, 4, seed=1)
        assert torch.equal(compiled(x, dy), rows_of(x, dy))


def test_bad_values_are_refused_at_run_time_by_compiled_code() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.per_sample_gradients, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="mask: expected only 0 and 1, got 2"):
        compiled(X, DY, 2.0 * MASK)
    # torch 2.6's dynamo says only where it saw an exception, not which
    said = "num_segments: expected a number under torch\\.compile|Observed exception"
    with pytest.raises(Exception, match=said):
        compiled(X, DY, segment_ids=MASK.long())


@EVERY
def test_fakes_of_gpu_tensors(case: OpCall) -> None:
    """What a trace on a GPU sees: the shapes and dtypes of the CPU's results, on the GPU."""
    op = getattr(torch.ops.logra, case.op)
    real = op(*case.arguments, **case.options)
    with FakeTensorMode():
        options = {name: to_fake(value) for name, value in case.options.items()}
        result = op(*map(to_fake, case.arguments), **options)
    if real is None:
        assert result is None
        return
    pairs = [(real, result)] if torch.is_tensor(real) else zip(real, result, strict=True)
    for wanted, got in pairs:
        assert got.device.type == "cuda"
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert got.stride() == wanted.stride()


@EVERY
def test_compiles_for_a_gpu_that_is_not_there(case: OpCall) -> None:
    """Traced with fake CUDA tensors into one graph, which calls the op."""
    torch._dynamo.reset()
    called = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True):
        compiled: Any = torch.compile(getattr(ops, case.op), fullgraph=True, backend=backend)
        options = {name: to_fake(value) for name, value in case.options.items()}
        result = compiled(*map(to_fake, case.arguments), **options)
    (targets,) = called
    assert f"logra.{case.op}.default" in targets
    for tensor in [result] if torch.is_tensor(result) else result:
        assert tensor.device.type == "cuda"


def to_fake(argument: Any) -> Any:
    if isinstance(argument, list) and all(torch.is_tensor(t) for t in argument):
        return [to_fake(t) for t in argument]
    if not torch.is_tensor(argument):
        return argument
    return torch.empty_strided(
        argument.shape, argument.stride(), dtype=argument.dtype, device="cuda"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.project(x, PROJ_IN),
        lambda x: ops.projected_gradients(x, DY, PROJ_IN, None),
        lambda x: ops.scores(x[0], x[0]),
        lambda x: torch.ops.logra.self_influence(x[0], PROJ_IN),
        lambda x: ops.topk_scores(x[0], ROWS[:, :8], 2)[0],
        lambda x: ops.pack_rows(x[0], [8], [0])[1],
    ],
)
def test_a_backward_pass_through_an_op_raises(call: Callable[[Any], Any]) -> None:
    out = call(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"logra::\w+ has no derivative"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match=r"has no derivative|functorch transforms"):
        torch.func.grad(lambda x: call(x).sum())(X)
    with torch.no_grad():
        assert not call(X.clone().requires_grad_()).requires_grad


def test_a_covariance_is_not_differentiated_and_its_change_is_counted() -> None:
    cov = torch.zeros(20, 20)
    both: list[Any] = [ops.covariance_update_, torch.ops.logra.covariance_update_]
    for update in both:
        before = cov._version
        update(cov, ROWS.float())
        assert cov._version > before
        with pytest.raises(RuntimeError, match="covariance_update_ has no derivative"):
            update(cov, ROWS.float().requires_grad_())
    weight = torch.ones(20, 20, requires_grad=True)
    product = (weight * cov).sum()
    ops.covariance_update_(cov, ROWS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_covariance_that_is_among_the_rows_counts_as_a_copy() -> None:
    square = randn(300, 300, seed=9)
    for update in (ops.covariance_update_, torch.ops.logra.covariance_update_):
        own = square.clone()
        update(own, own)
        assert_same(own, ops.covariance_update_(square.clone(), square))


def test_other_devices_use_the_reference() -> None:
    out = torch.ops.logra.scores(QUERIES.to("meta"), ROWS.to("meta"), None, None)
    assert out.shape == (2, 7)
    assert out.device.type == "meta"
