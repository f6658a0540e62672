"""What torch expects of every registered op."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import assert_same, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from logra_kernels import ops

X, DY, MASK = randn(3, 5, 8), randn(3, 5, 4, seed=1), torch.tensor([[1, 1, 1, 0, 0]] * 3).bool()
PROJ_IN, PROJ_OUT = randn(6, 8, seed=2), randn(2, 4, seed=3)
QUERIES, ROWS = randn(2, 20, seed=4), randn(7, 20, seed=5).half()
SCALE, BOUNDS, MODULES = torch.rand(7), torch.tensor([0, 2, 5]), ([12, 8], [0, -3])
STATE = list(ops.topk_scores(QUERIES, ROWS, 3))

CALLS: dict[str, list[tuple[Any, ...]]] = {
    "project": [(X, PROJ_IN), (X.bfloat16(), PROJ_IN), (X.double(), PROJ_IN)],
    "per_sample_gradients": [
        (X, DY, MASK, None, None),
        (X.half(), DY, MASK.float(), None, torch.float16),
        (X[0], DY[0], None, BOUNDS, None),
    ],
    "projected_gradients": [
        (X, DY, PROJ_IN, PROJ_OUT, MASK, None, None),
        (X.bfloat16(), DY, None, PROJ_OUT, None, None, torch.bfloat16),
        (X[0], DY[0], PROJ_IN, None, MASK[0], BOUNDS.int(), None),
    ],
    "projected_gradients_grouped": [
        ([X, X + 1], [DY, 2 * DY], [PROJ_IN] * 2, [PROJ_OUT] * 2, MASK, None, None),
        ([X.half()], [DY], [], [], None, None, torch.float16),
        ([X[0]] * 2, [DY[0].bfloat16()] * 2, [], [PROJ_OUT] * 2, None, BOUNDS, None),
    ],
    "covariance_update_": [
        (torch.zeros(20, 20), ROWS),
        (torch.zeros(20, 20, dtype=torch.float64), ROWS),
    ],
    "scores": [(QUERIES, ROWS, SCALE, SCALE), (QUERIES, ROWS.float(), None, None)],
    "topk_scores": [
        (QUERIES, ROWS, 3, SCALE, None, None, 0),
        (QUERIES, ROWS, 3, None, None, STATE, 7),
    ],
    "self_influence": [(ROWS, randn(5, 20, seed=6))],
    "pack_rows": [(ROWS.float(), *MODULES)],
    "unpack_rows": [(ROWS, SCALE, *MODULES)],
}


def test_every_op_is_listed() -> None:
    others = {"TopK", "available_isas", "isa", "limits", "set_isa"}
    assert set(CALLS) == set(ops.__all__) - others


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    for arguments in CALLS[name]:
        torch.library.opcheck(getattr(torch.ops.logra, name).default, arguments)


PUBLIC: dict[str, Callable[[], Any]] = {
    "project": lambda: ops.project(X, PROJ_IN),
    "per_sample_gradients": lambda: ops.per_sample_gradients(X, DY, MASK, out_dtype=torch.float16),
    "cu_seqlens": lambda: ops.per_sample_gradients(X[0], DY[0], cu_seqlens=BOUNDS),
    "segment_ids": lambda: ops.projected_gradients(
        X, DY, PROJ_IN, PROJ_OUT, segment_ids=MASK.long() - 1, num_segments=2
    ),
    "projected_gradients": lambda: ops.projected_gradients(X, DY, PROJ_IN, PROJ_OUT, MASK.float()),
    "projected_gradients_grouped": lambda: ops.projected_gradients_grouped(
        [X, X + 1], [DY, 2 * DY], [PROJ_IN] * 2, None, MASK
    ),
    "covariance_update_": lambda: ops.covariance_update_(torch.zeros(20, 20), ROWS),
    "scores": lambda: ops.scores(QUERIES, ROWS, SCALE),
    "topk_scores": lambda: tuple(
        ops.topk_scores(QUERIES, ROWS, 3, SCALE, state=STATE, row_offset=7)
    ),
    "self_influence": lambda: ops.self_influence(ROWS, torch.eye(20)),
    "pack_rows": lambda: ops.pack_rows(ROWS.float(), *MODULES),
    "unpack_rows": lambda: ops.unpack_rows(ROWS, SCALE, *MODULES),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_compile_without_a_break(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(PUBLIC[name], fullgraph=True, backend="aot_eager")
    assert_same(compiled(), PUBLIC[name]())


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


@pytest.mark.parametrize("name", CALLS)
def test_fakes_of_gpu_tensors(name: str) -> None:
    """What a trace on a GPU sees: the shapes and dtypes of the CPU's results, on the GPU."""
    for arguments in CALLS[name]:
        real = getattr(torch.ops.logra, name)(*arguments)
        with FakeTensorMode():
            fake = [to_fake(argument) for argument in arguments]
            result = getattr(torch.ops.logra, name)(*fake)
        if real is None:
            assert result is None
            continue
        pairs = (
            zip([real], [result], strict=True)
            if torch.is_tensor(real)
            else zip(real, result, strict=True)
        )
        for wanted, got in pairs:
            assert got.device.type == "cuda"
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            assert got.stride() == wanted.stride()


class EveryOp(torch.nn.Module):
    def forward(
        self, x: torch.Tensor, dy: torch.Tensor, proj: torch.Tensor, keep: torch.Tensor
    ) -> Any:
        gradients = ops.projected_gradients(x, dy, proj, proj, keep)
        grouped = ops.projected_gradients_grouped([x, dy], [dy, x], [proj] * 2, [proj] * 2, keep)
        single = ops.per_sample_gradients(ops.project(x, proj), ops.project(dy, proj), keep)
        parts = gradients, grouped.transpose(0, 1), single
        rows = torch.cat([part.flatten(1) for part in parts], dim=1)
        packed, scale = ops.pack_rows(rows, [rows.shape[1]], [1])
        wide = ops.unpack_rows(packed, scale, [rows.shape[1]], [1])
        cov = wide.new_zeros(wide.shape[1], wide.shape[1])
        ops.covariance_update_(cov, wide)
        sigma = ops.self_influence(packed, cov)
        top = ops.topk_scores(wide, packed, 2, sigma.rsqrt())
        return ops.scores(wide, packed, sigma), *ops.topk_scores(wide, packed, 2, state=top)


def test_a_module_of_every_op_compiles_for_a_gpu_that_is_not_there() -> None:
    """Traced with fake CUDA tensors into one graph that calls every op."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True):
        x, dy = (torch.empty(3, 5, 8, device="cuda", dtype=torch.float16) for _ in range(2))
        proj = torch.empty(4, 8, device="cuda", dtype=torch.float16)
        keep = torch.empty(3, 5, device="cuda", dtype=torch.bool)
        results = torch.compile(EveryOp(), fullgraph=True, backend=backend)(x, dy, proj, keep)
    (graph,) = graphs
    called = {str(node.target).split(".")[1] for node in graph.graph.nodes
              if str(node.target).startswith("logra.")}  # fmt: skip
    assert called == set(CALLS)
    assert [(r.shape, r.device.type) for r in results] == [((3, 3), "cuda")] + 4 * [
        ((3, 2), "cuda")
    ]


def to_fake(argument: Any) -> Any:
    if isinstance(argument, list) and all(torch.is_tensor(t) for t in argument):
        return [to_fake(t) for t in argument]
    if not torch.is_tensor(argument):
        return argument
    return torch.empty_strided(
        argument.shape, argument.stride(), dtype=argument.dtype, device="cuda"
    )


def test_results_are_outside_autograd() -> None:
    x, proj = X.clone().requires_grad_(), PROJ_IN.clone().requires_grad_()
    assert not ops.project(x, proj).requires_grad
    assert not ops.projected_gradients(x, DY, proj, None).requires_grad
    assert not ops.scores(QUERIES.clone().requires_grad_(), ROWS).requires_grad


def test_other_devices_use_the_reference() -> None:
    out = torch.ops.logra.scores(QUERIES.to("meta"), ROWS.to("meta"), None, None)
    assert out.shape == (2, 7)
    assert out.device.type == "meta"
