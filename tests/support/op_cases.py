"""What the ops' tests share: sizes, layouts, error bounds, and calls of every op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logra_kernels import ops

# around every vector width, and the tiles of 2, 4 and 6
TAILS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(*shape: int, kept: float = 0.7) -> Tensor:
    """Which tokens count: about that share of them."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) < kept


def gamma(terms: int) -> float:
    """Higham's gamma_n: a sum of n products, in any order, is off by at most gamma_n |a|.|b|."""
    unit = 2.0**-24
    return terms * unit / (1 - terms * unit)


def assert_within(got: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|got - exact| <= bound, element by element; exact and bound are float64."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs()
    assert not got.isnan().any()
    worst = (error / bound.clamp_min(1e-300)).max() if error.numel() else torch.tensor(0.0)
    assert bool((error <= bound).all()), f"error {float(worst):.2f} times its bound"


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between the rows; the gaps hold NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan)
    wide[..., 2:-3] = tensor
    return wide[..., 2:-3]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, at an odd address."""
    data = tensor.contiguous().view(torch.uint8).flatten()
    raw = bytearray(1 + data.numel())
    raw[1:] = data.numpy().tobytes()
    if not data.numel():
        return tensor
    return torch.frombuffer(raw, dtype=tensor.dtype, offset=1).view(tensor.shape)


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in every way to lie in memory; by the last axis, and by the second, too."""
    yield strided(tensor)
    yield misaligned(tensor)
    for axis in range(1, tensor.dim()):
        yield tensor.transpose(0, axis).contiguous().transpose(0, axis)


def same_bits(one: Any, other: Any) -> bool:
    one = (one,) if isinstance(one, Tensor) else one
    other = (other,) if isinstance(other, Tensor) else other
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_same(one: Any, other: Any) -> None:
    """The same bits from the C++ kernels; nearly so from torch, whose sums depend on layout."""
    one = (one,) if isinstance(one, Tensor) else one
    other = (other,) if isinstance(other, Tensor) else other
    tolerance = 1e-4 if ops.isa() is None else 0.0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert tolerance or ((a.signbit() == b.signbit()) | a.isnan()).all(), "0.0 and -0.0"


def assert_threads_do_not_matter(call: Callable[[], Any]) -> None:
    """The caller restores the number of threads (fixture set_threads)."""
    torch.set_num_threads(1)
    alone = call()
    torch.set_num_threads(2)
    assert same_bits(alone, call())


@dataclass(frozen=True)
class OpCall:
    """Arguments that an op's public function takes, and `torch.ops.logra` does too."""

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, home: Any = ops) -> Any:
        """The result; of what the op writes, it writes a copy."""
        arguments = self.arguments
        if self.op.endswith("_"):
            arguments = (arguments[0].clone(), *arguments[1:])
        return getattr(home, self.op)(*arguments, **self.options)

    def tensors(self) -> list[int]:
        """The places of the tensors that are only read."""
        places = [n for n, value in enumerate(self.arguments) if isinstance(value, Tensor)]
        return places[1:] if self.op.endswith("_") else places

    def put(self, others: dict[int, Any]) -> OpCall:
        """The same with other arguments in some places."""
        changed = [others.get(n, value) for n, value in enumerate(self.arguments)]
        return replace(self, arguments=tuple(changed))


def call(op: str, *arguments: Any, **options: Any) -> OpCall:
    return OpCall(op, arguments, options)


X, DY, MASK = randn(3, 5, 8), randn(3, 5, 4, seed=1), torch.tensor([[1, 1, 1, 0, 0]] * 3).bool()
PROJ_IN, PROJ_OUT = randn(6, 8, seed=2), randn(2, 4, seed=3)
QUERIES, ROWS = randn(2, 20, seed=4), randn(7, 20, seed=5).half()
SCALE, BOUNDS, MODULES = torch.rand(7) + 0.1, torch.tensor([0, 2, 5]), ([12, 8], [0, -3])
PLACES, WEIGHTS = torch.tensor([0, 1, 2, 4, 6, 11]), torch.rand(6) + 0.1
CODES = (40 * ROWS).to(torch.int8)
PLANES = [(CODES[:, n : n + 3] + 7 * n).view(torch.uint8) for n in range(4)]
LEVELS = torch.tensor([-120, -83, -60, -47, -36, -23, -14, -5, 4, 14, 23, 37, 48, 63, 82, 127])
LEVELS = LEVELS.to(torch.int8)
SIGNS, QUARTERS = LEVELS[::15].contiguous(), LEVELS[::5].contiguous()
STATE = list(ops.topk_scores(QUERIES, ROWS, 3))

CALLS = [
    call("project", X, PROJ_IN),
    call("project", X.bfloat16(), PROJ_IN),
    call("project", X.double(), PROJ_IN),
    call("per_sample_gradients", X, DY, MASK),
    call("per_sample_gradients", X.half(), DY, MASK.float(), out_dtype=torch.float16),
    call("per_sample_gradients", X[0], DY[0], cu_seqlens=BOUNDS),
    call("projected_gradients", X, DY, PROJ_IN, PROJ_OUT, MASK),
    call("projected_gradients", X, DY, PROJ_IN, PROJ_OUT, MASK.float()),
    call("projected_gradients", X.bfloat16(), DY, None, PROJ_OUT, out_dtype=torch.bfloat16),
    call("projected_gradients", X[0], DY[0], PROJ_IN, None, MASK[0], cu_seqlens=BOUNDS.int()),
    call("projected_coordinates", X, DY, PROJ_IN, PROJ_OUT, PLACES, WEIGHTS, MASK),
    call("projected_coordinates", X.half(), DY, None, PROJ_OUT, PLACES, None, MASK.float()),
    call("projected_coordinates", X, DY, None, None, PLACES, WEIGHTS, out_dtype=torch.bfloat16),
    call(
        "projected_coordinates",
        *(X[0], DY[0].bfloat16(), PROJ_IN, None, PLACES, WEIGHTS, MASK[0]),
        cu_seqlens=BOUNDS,
    ),
    call("projected_gradients_grouped", [X, X + 1], [DY, 2 * DY], [PROJ_IN] * 2, [], MASK),
    call("projected_gradients_grouped", [X, X], [DY, DY], [PROJ_IN] * 2, [PROJ_OUT] * 2, MASK),
    call("projected_gradients_grouped", [X.half()], [DY], [], [], out_dtype=torch.float16),
    call(
        "projected_gradients_grouped",
        *([X[0]] * 2, [DY[0].bfloat16()] * 2, [], [PROJ_OUT] * 2),
        cu_seqlens=BOUNDS,
    ),
    call("covariance_update_", torch.zeros(20, 20), ROWS),
    call("covariance_update_", torch.zeros(20, 20, dtype=torch.float64), ROWS),
    call("scores", QUERIES, ROWS, SCALE, SCALE),
    call("scores", QUERIES, ROWS.float()),
    call("topk_scores", QUERIES, ROWS, 3, SCALE),
    call("topk_scores", QUERIES, ROWS, 3, state=STATE, row_offset=7),
    call("scores", QUERIES, CODES, SCALE, SCALE),
    call("topk_scores", QUERIES, CODES, 3, SCALE),
    call("plane_scores", QUERIES, PLANES[:1], SIGNS, SCALE, SCALE),
    call("plane_scores", QUERIES, PLANES, LEVELS),
    call("topk_plane_scores", QUERIES, PLANES[:2], QUARTERS, 3, SCALE),
    call("topk_plane_scores", QUERIES, PLANES[:2], QUARTERS, 3, state=STATE, row_offset=7),
    call("self_influence", ROWS, randn(5, 20, seed=6)),
    call("pack_rows", ROWS.float(), *MODULES),
    call("unpack_rows", ROWS, SCALE, *MODULES),
]
NAMES = [f"{case.op}-{number}" for number, case in enumerate(CALLS)]
