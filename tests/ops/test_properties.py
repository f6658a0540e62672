"""What holds for every op: layouts, threads and splits change no bit; empty axes; bad arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from op_cases import (
    BOUNDS,
    CODES,
    DTYPES,
    DY,
    LEVELS,
    MASK,
    MODULES,
    PLACES,
    PLANES,
    PROJ_IN,
    PROJ_OUT,
    QUERIES,
    ROWS,
    SCALE,
    STATE,
    WEIGHTS,
    OpCall,
    X,
    assert_same,
    assert_threads_do_not_matter,
    call,
    layouts,
    mask_of,
    randn,
    same_bits,
)
from refusals import refused
from torch import Tensor

from logra_kernels import ops

pytestmark = pytest.mark.usefixtures("poison")

Cut = tuple[tuple[int, ...], int, tuple[int, ...]]  # arguments cut, the result's axis, bounds


def small(dtype: torch.dtype) -> list[OpCall]:
    x, dy = randn(3, 9, 70, dtype=dtype), randn(3, 9, 33, seed=1)
    proj_in, proj_out = randn(40, 70, seed=2), randn(8, 33, seed=3)
    rows, scale = randn(9, 77, dtype=dtype, seed=1), torch.rand(9) + 0.1
    wide = torch.ldexp(randn(20, 9001), torch.arange(-100, 100, 10)[:, None]).to(dtype)
    modules = [9000, 1], [0, 5]
    return [
        call("project", x, proj_in),
        call("per_sample_gradients", x, dy),
        call("projected_gradients", x, dy, proj_in, proj_out, mask_of(3, 9).float()),
        call("covariance_update_", torch.zeros(33, 33), randn(20, 33, dtype=dtype)),
        *(call("scores", randn(count, 77), rows, scale, scale) for count in (2, 40)),
        call("topk_scores", randn(9, 77), rows, 4, scale),
        call("self_influence", randn(9, 33, dtype=dtype), randn(10, 33, seed=1)),
        call("self_influence", randn(430, 600, dtype=dtype), randn(600, 600, seed=1).tril()),
        call("pack_rows", wide, *modules),
        call("unpack_rows", randn(20, 9001).half(), torch.ones(20), *modules),
    ]


WAYS = pytest.mark.parametrize("home", [ops, torch.ops.logra], ids=["function", "torch"])


def result(case: OpCall, home: Any) -> Any:
    """By the short way or by torch's dispatcher; a covariance is what it was given."""
    if home is ops or not case.op.endswith("_"):
        return case(home)
    cov = case.arguments[0].clone()
    getattr(home, case.op)(cov, *case.arguments[1:])
    return cov


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_layout_nor_way_changes_bits(isa: str, dtype: torch.dtype, home: Any) -> None:
    for case in small(dtype):
        expected = case()
        for place in case.tensors():
            for view in layouts(case.arguments[place]):
                assert_same(result(case.put({place: view}), home), expected)


def large(dtype: torch.dtype) -> list[tuple[OpCall, list[Cut]]]:
    """Of several tasks a thread, panels and blocks; and the axes along which each may be cut."""
    x, dy, mask = randn(7, 400, 70, dtype=dtype), randn(7, 400, 65, seed=1), mask_of(7, 400)
    # more tokens than go through at a time: 2 MiB of projections are 2,976 here, with AVX-512
    raw = randn(5, 900, 64, dtype=dtype), randn(5, 900, 48, dtype=dtype, seed=1)
    projections = randn(70, 64, seed=2), randn(33, 48, seed=3)
    tokens, proj = randn(150, 1300, dtype=dtype), randn(150, 1300, seed=1)  # several panels
    rows, queries, scale = randn(150, 2100, dtype=dtype), randn(70, 2100, seed=1), torch.rand(150)
    exact = queries.bfloat16().float()  # bfloat16 rows have a kernel for these
    mixed = torch.where(torch.arange(70)[:, None] % 3 == 0, exact, queries)
    scan: list[Cut] = [((1, 2), 1, (0, 1, 56, 150)), ((0,), 0, (0, 1, 5, 38, 70))]
    cases: list[tuple[OpCall, list[Cut]]] = [
        (call("per_sample_gradients", x, dy, mask), [((0, 1, 2), 0, (0, 1, 5, 7))]),
        (
            call("projected_gradients", *raw, *projections, mask_of(5, 900, kept=0.9)),
            [((0, 1, 4), 0, (0, 1, 4, 5))],
        ),
        (call("covariance_update_", torch.zeros(150, 150), randn(600, 150, dtype=dtype)), []),
        (call("covariance_update_", torch.zeros(150, 150).double(), randn(600, 150)), []),
        (
            call("topk_scores", randn(40, 300), randn(500, 300, dtype=dtype, seed=1), 20),
            [((0,), 0, (0, 1, 34, 40))],
        ),
        (call("pack_rows", randn(60, 9001, dtype=dtype), [9001], [5]), [((0,), 0, (0, 1, 7, 60))]),
        (
            call("unpack_rows", randn(60, 9001).half(), torch.ones(60), [9001], [5]),
            [((0, 1), 0, (0, 1, 7, 60))],
        ),
    ]
    for given in (proj, proj.bfloat16().float(), proj.bfloat16(), proj.half()):
        cases.append((call("project", tokens, given), [((0,), 0, (0, 1, 61, 150))]))
    cases += [(call("scores", some, rows, scale), scan) for some in (queries, exact, mixed)]
    for count, size in ((200, 140), (430, 600)):  # 600: more columns than one chain sums
        columns = randn(count, 3 * size, dtype=dtype)[:, size : 2 * size]
        factor = randn(size, size, seed=1).tril()
        cases.append((call("self_influence", columns, factor), [((0,), 0, (0, 1, 51, 200, count))]))
    return cases


def joined(parts: Sequence[Any], axis: int) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), axis)
    return [torch.cat(some, axis) for some in zip(*parts, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("native", "set_threads")
def test_threads_and_splits_do_not_change_bits(isa: str, dtype: torch.dtype) -> None:
    for case, cuts in large(dtype):
        assert_threads_do_not_matter(case)
        for places, axis, bounds in cuts:
            parts = [
                case.put({n: case.arguments[n][a:b] for n in places})() for a, b in pairwise(bounds)
            ]
            assert same_bits(joined(parts, axis), case()), (case.op, places)


@WAYS
def test_empty_axes_give_zeros(isa: str, home: Any) -> None:
    tokens, projections = (randn(0, 4, 5), randn(0, 4, 3)), (randn(6, 5), randn(2, 3))
    no_token, masked = (randn(2, 0, 5), randn(2, 0, 3)), (randn(2, 4, 5), randn(2, 4, 3))
    grouped: tuple[Any, ...] = [X[:0]] * 3, [DY[:0]] * 3, [PROJ_IN] * 3, []
    for case, shape in (
        (call("project", randn(3, 0), randn(4, 0)), (3, 4)),
        (call("project", randn(3, 5), randn(0, 5)), (3, 0)),
        (call("per_sample_gradients", *tokens), (0, 3, 5)),
        (call("per_sample_gradients", *no_token), (2, 3, 5)),
        (call("per_sample_gradients", randn(2, 4, 0), randn(2, 4, 3)), (2, 3, 0)),
        (call("per_sample_gradients", *masked, torch.zeros(2, 4)), (2, 3, 5)),
        (call("projected_gradients", *tokens, *projections), (0, 2, 6)),
        (call("projected_gradients", *no_token, *projections), (2, 2, 6)),
        (call("projected_coordinates", *tokens, *projections, torch.arange(5)), (0, 5)),
        (call("projected_coordinates", *no_token, *projections, torch.arange(5)), (2, 5)),
        (call("projected_coordinates", *masked, None, None, torch.arange(0)), (2, 0)),
        (call("projected_gradients_grouped", *grouped), (3, 0, 4, 6)),
        (call("covariance_update_", torch.zeros(0, 0), randn(3, 0)), (0, 0)),
        (call("scores", randn(0, 5), randn(3, 5)), (0, 3)),
        (call("scores", randn(2, 5), randn(0, 5)), (2, 0)),
        (call("scores", randn(2, 0), randn(3, 0)), (2, 3)),
        (call("self_influence", randn(0, 4), randn(4, 4)), (0,)),
        (call("self_influence", randn(3, 4), randn(0, 4)), (3,)),
        (call("self_influence", randn(3, 0), randn(2, 0)), (3,)),
    ):
        assert torch.equal(result(case, home), torch.zeros(shape)), case.op


def given(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    return arguments, options


FLOATS = "expected float16 or bfloat16 or float32 or float64"
FALLS = "cu_seqlens: expected values that never fall, from 0 to 5 at most, got"
RISE = "coordinates: expected rising places in G,"
SIZES = "module_sizes: expected sizes of at least 0 that sum to 20, got"
X0, DY0, COV = X[0], DY[0], torch.zeros(20, 20)
# no difference is negative in int32
WRAPS = torch.tensor([0, 2**31 - 1, -(2**31), -1, 5]).int()
INT_IDS = [STATE[0], STATE[1].int(), *STATE[2:]]

# {op: {message: arguments}}: the public functions and `torch.ops.logra` say the same.
WRONG_TYPES: dict[str, dict[str, Any]] = {
    "project": {
        f"x: {FLOATS}, got complex64": given(X.to(torch.complex64), PROJ_IN),
        f"x: {FLOATS}, got int64": given(X.long(), PROJ_IN),
    },
    "per_sample_gradients": {
        "mask: expected bool, integer or float, got complex64": given(X, DY, MASK * 1j),
        "out_dtype: expected float16, bfloat16, float32 or float64, got int32": given(
            X, DY, out_dtype=torch.int32
        ),
        "cu_seqlens: expected int32 or int64, got float32": given(
            X0, DY0, cu_seqlens=BOUNDS.float()
        ),
    },
    "projected_gradients": {f"proj_out: {FLOATS}, got int64": given(X, DY, None, PROJ_OUT.long())},
    "projected_coordinates": {
        "coordinates: expected int64, got int32": given(X, DY, None, None, PLACES.int()),
        "scale: expected float32, got float64": given(X, DY, None, None, PLACES, WEIGHTS.double()),
    },
    "projected_gradients_grouped": {
        "xs[1]: expected the dtype float32 of xs[0], got float16": given(
            [X, X.half()], [DY, DY], [], []
        ),
    },
    "covariance_update_": {
        "cov: expected float32 or float64, got float16": given(COV.half(), ROWS)
    },
    "scores": {
        "queries: expected float32 or float64, got float16": given(QUERIES.half(), ROWS),
        f"rows: {FLOATS} or int8, got int32": given(QUERIES, ROWS.int()),
        "row_bias: expected float32, got float16": given(QUERIES, ROWS, None, SCALE.half()),
        "row_scale: expected float32, got float64": given(QUERIES, ROWS, SCALE.double()),
    },
    "plane_scores": {
        "planes[1]: expected uint8, got int8": given(QUERIES, [PLANES[0], CODES], LEVELS[:4]),
        "levels: expected int8, got float32": given(QUERIES, PLANES, LEVELS.float()),
        "queries: expected float32 or float64, got float16": given(QUERIES.half(), PLANES, LEVELS),
        "row_scale: expected float32, got float64": given(QUERIES, PLANES, LEVELS, SCALE.double()),
    },
    "topk_plane_scores": {
        "state.top_ids: expected int64, got int32": given(
            QUERIES, PLANES, LEVELS, 3, state=INT_IDS
        ),
    },
    "topk_scores": {
        "state.top_ids: expected int64, got int32": given(QUERIES, ROWS, 3, state=INT_IDS),
    },
    "self_influence": {
        "factor: expected float32 or float64, got float16": given(ROWS, QUERIES.half())
    },
    "unpack_rows": {"packed: expected float16, got float32": given(ROWS.float(), SCALE, *MODULES)},
}
WRONG_VALUES: dict[str, dict[str, Any]] = {
    "project": {
        "proj: expected [K, I=8], got [2, 4]": given(X, PROJ_OUT),
        "proj: expected [K, I=8], got [8]": given(X, PROJ_IN[0]),
        "x: expected [..., I], got []": given(X[0, 0, 0], PROJ_IN),
    },
    "per_sample_gradients": {
        "dy: expected [N=3, T=5, O], got [3, 4, 4]": given(X, DY[:, :4]),
        "mask: expected [N=3, T=5], got [3, 4]": given(X, DY, MASK[:, :4]),
        "mask: expected [N=3, T=5], got [5, 3]": given(X, DY, MASK.T),
        "mask: expected only 0 and 1, got 2": given(X, DY, 2 * MASK),
        "mask: expected only 0 and 1, got 0.5": given(X, DY, MASK / 2),
        "x: expected [T, I], got [3, 5, 8]": given(X, DY, cu_seqlens=BOUNDS),
        f"{FALLS} [0, 4, 3]": given(X0, DY0, cu_seqlens=torch.tensor([0, 4, 3])),
        f"{FALLS} [0, 9]": given(X0, DY0, cu_seqlens=torch.tensor([0, 9])),
        f"{FALLS} {WRAPS.tolist()}": given(X0, DY0, cu_seqlens=WRAPS),
    },
    "projected_gradients": {
        "proj_in: expected [Ki, I=8], got [2, 4]": given(X, DY, PROJ_OUT, None),
        "proj_out: expected [Ko, O=4], got [4]": given(X, DY, None, PROJ_OUT[0]),
    },
    "projected_coordinates": {
        "scale: expected [n=6], got [5]": given(X, DY, None, None, PLACES, WEIGHTS[:5]),
        f"{RISE} from 0 to 31, got [0, 32]": given(X, DY, None, None, torch.tensor([0, 32])),
        f"{RISE} from 0 to 11, got [-1, 2]": given(X, DY, PROJ_IN, PROJ_OUT, torch.tensor([-1, 2])),
        f"{RISE} from 0 to 31, got [4, 4]": given(X, DY, None, None, torch.tensor([4, 4])),
    },
    "projected_gradients_grouped": {
        "xs: expected at least one module, got none": given([], [], [], []),
        "dys: expected 2 tensors, one a module like xs, got 1": given([X, X], [DY], [], []),
        "projs_in: expected 2 tensors, one a module like xs, got 1": given(
            [X, X], [DY, DY], [PROJ_IN], []
        ),
        "xs[1]: expected the shape [3, 5, 8] of xs[0], got [3, 2, 8]": given(
            [X, X[:, :2]], [DY, DY], [], []
        ),
        "dys[1]: expected the shape [3, 5, 4] of dys[0], got [3, 2, 4]": given(
            [X, X], [DY, DY[:, :2]], [], []
        ),
        "projs_in[0]: expected [Ki, I=8], got [2, 4]": given([X], [DY], [PROJ_OUT], []),
        "mask: expected only 0 and 1, got 2": given([X], [DY], [], [], 2 * MASK),
    },
    "covariance_update_": {
        "cov: expected [K=20, K=20], got [20, 21]": given(torch.zeros(20, 21), ROWS),
        "cov: expected [K=20, K=20], got [4, 4]": given(torch.zeros(4, 4), ROWS),
        "rows: expected [R, K], got [20]": given(COV, ROWS[0]),
        "cov: expected a contiguous tensor, got strides (40, 2)": given(
            torch.zeros(20, 40)[:, ::2], ROWS
        ),
    },
    "scores": {
        "rows: expected [R, D=20], got [7, 5]": given(QUERIES, ROWS[:, :5]),
        "queries: expected [Q, D], got [20]": given(QUERIES[0], ROWS),
        "row_scale: expected [R=7], got [3]": given(QUERIES, ROWS, SCALE[:3]),
        "expected tensors on one device, got queries on cpu, rows on meta": given(
            QUERIES, ROWS.to("meta")
        ),
    },
    "plane_scores": {
        "planes: expected 1 to 4 tensors, got 0": given(QUERIES, [], LEVELS[:1]),
        "planes: expected 1 to 4 tensors, got 5": given(QUERIES, [*PLANES, PLANES[0]], LEVELS),
        "planes[0]: expected [R, B=3], got [7, 2]": given(QUERIES, [PLANES[0][:, :2]], LEVELS[:2]),
        "planes[1]: expected [R=7, B=3], got [6, 3]": given(
            QUERIES, [PLANES[0], PLANES[1][:6]], LEVELS[:4]
        ),
        "levels: expected [levels=4], got [16]": given(QUERIES, PLANES[:2], LEVELS),
        "row_bias: expected [R=7], got [3]": given(QUERIES, PLANES, LEVELS, None, SCALE[:3]),
        "expected tensors on one device, got queries on cpu, planes[0] on meta": given(
            QUERIES, [PLANES[0].to("meta")], LEVELS[:2]
        ),
        "expected tensors on one device, got queries on cpu, levels on meta": given(
            QUERIES, PLANES, LEVELS.to("meta")
        ),
    },
    "topk_plane_scores": {
        "k: expected at least 1, got 0": given(QUERIES, PLANES, LEVELS, 0),
        "row_offset: expected at least 0, got -1": given(QUERIES, PLANES, LEVELS, 3, row_offset=-1),
        "state.top_scores: expected [Q=2, k=2], got [2, 3]": given(
            QUERIES, PLANES, LEVELS, 2, state=STATE
        ),
    },
    "topk_scores": {
        "k: expected at least 1, got 0": given(QUERIES, ROWS, 0),
        "row_offset: expected at least 0, got -1": given(QUERIES, ROWS, 3, row_offset=-1),
        f"row_offset: expected ids below 2**63, got {2**63 - 5} + R": given(
            QUERIES, ROWS, 2, row_offset=2**63 - 5
        ),
        "state.top_scores: expected [Q=2, k=2], got [2, 3]": given(QUERIES, ROWS, 2, state=STATE),
        "state: expected the four tensors of a TopK, got 2": given(
            QUERIES, ROWS, 3, state=STATE[:2]
        ),
    },
    "self_influence": {
        "factor: expected [M, K=20], got [6, 8]": given(ROWS, PROJ_IN),
        "rows: expected [R, K], got [20]": given(ROWS[0], QUERIES),
    },
    "pack_rows": {"rows: expected [R, D], got [20]": given(ROWS[0], *MODULES)},
    "unpack_rows": {"row_scale: expected [R=7], got [1]": given(ROWS, SCALE[:1], *MODULES)},
}
WRONG_MODULES: dict[str, tuple[list[int], list[int]]] = {
    f"{SIZES} [12, 9] with sum 21": ([12, 9], [0, 0]),
    f"{SIZES} [21, -1] with sum 20": ([21, -1], [0, 0]),
    "module_exponents: expected 1, got 2": ([20], [0, 0]),
    "module_exponents: expected 2, got 1": ([12, 8], [0]),
    "module_exponents: expected -126 to 127, got 128": ([20], [128]),
}
for _message, _modules in WRONG_MODULES.items():
    WRONG_VALUES["pack_rows"][_message] = given(ROWS, *_modules)
    WRONG_VALUES["unpack_rows"][_message] = given(ROWS, SCALE, *_modules)

REFUSED = [
    (error, op, message)
    for error, table in ((TypeError, WRONG_TYPES), (ValueError, WRONG_VALUES))
    for op, cases in table.items()
    for message in cases
]


@WAYS
@pytest.mark.parametrize(("error", "op", "message"), REFUSED)
def test_bad_arguments(home: Any, error: type[Exception], op: str, message: str) -> None:
    """The kernels read and write memory by these arguments, whoever calls them."""
    arguments, options = (WRONG_TYPES if error is TypeError else WRONG_VALUES)[op][message]
    with pytest.raises(error) as caught:
        getattr(home, op)(*arguments, **options)
    assert str(caught.value) == message


def test_bad_arguments_that_only_a_function_takes() -> None:
    gradients, ids = ops.per_sample_gradients, torch.tensor([0, 0, 1, 1, 2])
    packed = partial(gradients, X0, DY0)
    named = partial(packed, segment_ids=ids)
    refused("rows: expected a tensor, got list", ops.scores, QUERIES, [1.0], error=TypeError)
    refused("x: expected [N, T, I], [N, I] or packed [T, I], got [8]", gradients, X0[0], DY)
    refused("segment_ids: expected -1 to 1 (num_segments=2), got 0 to 2", named, num_segments=2)
    refused("segment_ids: expected None beside cu_seqlens, got both", named, cu_seqlens=BOUNDS)
    refused("num_segments: expected None without segment_ids", packed, num_segments=3)
    registered = torch.ops.logra.per_sample_gradients  # one token an example is the function's
    refused("x: expected [N, T, I], got [5, 8]", registered, X0, DY0)
