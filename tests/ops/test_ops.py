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
    others = {"TopK", "available_isas", "isa", "set_isa"}
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
        ops.topk_scores(QUERIES, ROWS, 3, SCALE, state=ops.TopK(*STATE), row_offset=7)
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


UNSAFE: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "a covariance of another size": (
        "covariance_update_",
        (torch.zeros(4, 4), ROWS),
        r"cov: expected \[K=20, K=20\]",
    ),
    "a covariance in steps": (
        "covariance_update_",
        (torch.zeros(20, 40)[:, ::2], ROWS),
        "cov: expected a contiguous",
    ),
    "a short row_scale": (
        "scores",
        (QUERIES, ROWS, SCALE[:3], None),
        r"row_scale: expected \[R=7\]",
    ),
    "a row_scale in float64": (
        "scores",
        (QUERIES, ROWS, SCALE.double()),
        "row_scale: expected float32",
    ),
    "rows of another width": ("scores", (QUERIES, ROWS[:, :5]), r"rows: expected \[R, D=20\]"),
    "rows of integers": ("scores", (QUERIES, ROWS.int()), "rows: expected float16 or"),
    "an unscaled top k": ("topk_scores", (QUERIES, ROWS, 0), "k: expected at least 1, got 0"),
    "a state of another k": (
        "topk_scores",
        (QUERIES, ROWS, 2, None, None, STATE, 0),
        r"state.top_scores: expected \[Q=2, k=2\]",
    ),
    "ids beyond int64": (
        "topk_scores",
        (QUERIES, ROWS, 2, None, None, None, 2**63 - 5),
        "row_offset: expected ids below",
    ),
    "a mask of another shape": (
        "per_sample_gradients",
        (X, DY, MASK[:, :2]),
        r"mask: expected \[N=3, T=5\]",
    ),
    "packed tokens without their segments": (
        "per_sample_gradients",
        (X[0], DY[0]),
        r"x: expected \[N, T, I\]",
    ),
    "segments behind the tokens": (
        "per_sample_gradients",
        (X[0], DY[0], None, torch.tensor([0, 9])),
        "cu_seqlens: expected values",
    ),
    "segments whose difference wraps": (
        "per_sample_gradients",
        (X[0], DY[0], None, torch.tensor([0, 2**31 - 1, -(2**31), 5]).int()),
        "cu_seqlens: expected values",
    ),
    "a projection of another width": (
        "projected_gradients",
        (X, DY, PROJ_OUT),
        r"proj_in: expected \[Ki, I=8\]",
    ),
    "modules of other shapes": (
        "projected_gradients_grouped",
        ([X, X[:, :2]], [DY, DY], [], []),
        r"xs\[1\]: expected the shape",
    ),
    "no module": (
        "projected_gradients_grouped",
        ([], [], [], []),
        "xs: expected at least one module",
    ),
    "a factor of another width": (
        "self_influence",
        (ROWS, PROJ_IN),
        r"factor: expected \[M, K=20\]",
    ),
    "sizes beyond the row": ("pack_rows", (ROWS, [12, 9], [0, 0]), "module_sizes: expected sizes"),
    "a missing exponent": (
        "pack_rows",
        (ROWS, [12, 8], [0]),
        "module_exponents: expected 2, got 1",
    ),
    "a short scale": ("unpack_rows", (ROWS, SCALE[:1], *MODULES), r"row_scale: expected \[R=7\]"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_an_op_called_by_torch_checks_its_arguments(case: str) -> None:
    """The kernels read and write memory by these arguments, whoever calls them."""
    name, arguments, message = UNSAFE[case]
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(torch.ops.logra, name)(*arguments)


def test_an_op_called_by_torch_takes_what_its_function_takes() -> None:
    """Strided rows and a cov that is among the rows give what copies of them give."""
    wide = randn(7, 40, seed=8)[:, ::2]
    assert_same(torch.ops.logra.scores(QUERIES, wide), ops.scores(QUERIES, wide.contiguous()))
    square = randn(300, 300, seed=9)
    for update in (ops.covariance_update_, torch.ops.logra.covariance_update_):
        own = square.clone()
        update(own, own)
        assert_same(own, ops.covariance_update_(square.clone(), square))


def test_other_devices_use_the_reference() -> None:
    out = torch.ops.logra.scores(QUERIES.to("meta"), ROWS.to("meta"), None, None)
    assert out.shape == (2, 7)
    assert out.device.type == "meta"
