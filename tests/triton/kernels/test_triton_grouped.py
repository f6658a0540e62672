from typing import Any

import pytest
import torch
from bounds import BRAIN, FULL, HALF
from torch import Tensor

from logra_kernels import reference
from logra_kernels.triton import launch, projected_gradients, projected_gradients_grouped


def modules(count: int, *shape: int, dtype: torch.dtype = HALF) -> list[Tensor]:
    return [torch.randn(*shape).to(dtype) for _ in range(count)]


def check(*sides: Any, **options: Any) -> None:
    """The bits are those of single calls, and the values are near the reference."""
    got = projected_gradients_grouped(*sides, **options)
    for m, part in enumerate(got):
        alone: list[Any] = [side[m] if side else None for side in sides]
        one = projected_gradients(*alone, **options)
        assert torch.equal(part, one), f"module {m} differs from a single call"
    want = reference.projected_gradients_grouped(*sides, **options)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (FULL, FULL), (FULL, BRAIN)])
@pytest.mark.parametrize("sides", ["both", "out", "neither"])
def test_equals_single_calls(dtypes: tuple[torch.dtype, torch.dtype], sides: str) -> None:
    xs = modules(3, 2, 150, 20, dtype=dtypes[0])
    dys = modules(3, 2, 150, 36, dtype=dtypes[1])
    projs_in = modules(3, 7, 20, dtype=dtypes[0]) if sides == "both" else []
    projs_out = modules(3, 5, 36, dtype=dtypes[1]) if sides != "neither" else []
    mask = torch.rand(2, 150) > 0.3
    check(xs, dys, projs_in, projs_out, mask=mask)
    check(xs, dys, projs_in, projs_out)


def test_one_module() -> None:
    xs, dys = (modules(1, 2, 20, 18) for _ in range(2))
    check(xs, dys, [], [])


def test_packed() -> None:
    xs, dys = modules(3, 300, 18), modules(3, 300, 20)
    bounds = torch.tensor([2, 2, 140, 290])
    check(xs, dys, modules(3, 4, 18), [], mask=torch.arange(300) % 7 > 0, cu_seqlens=bounds)


def test_wide_gradients_are_projected_first() -> None:
    """Beyond two tiles a side each module is projected first; then all share one launch."""
    xs, dys = modules(2, 1, 20, 30), modules(2, 1, 20, 190)
    check(xs, dys, modules(2, 10, 30), [])


def test_modules_of_other_strides_or_addresses_have_launches_of_their_own() -> None:
    xs, dys = modules(4, 2, 30, 32), modules(4, 2, 30, 16)
    xs[1] = torch.randn(2, 30, 48).half()[..., :32]
    xs[2] = torch.randn(2, 30, 49).half()[..., 1:33]
    check(xs, dys, [], [])
    with launch.recording("sm_90") as launches:
        projected_gradients_grouped(xs, dys, [], [])
    assert [one.arguments["modules"] for one in launches] == [1, 1, 1, 1]
    with launch.recording("sm_90") as launches:
        projected_gradients_grouped([xs[0], xs[3]], dys[:2], [], [])
    assert [one.arguments["modules"] for one in launches] == [2]


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_out_dtype(dtype: torch.dtype) -> None:
    xs, dys = modules(2, 2, 200, 18), modules(2, 2, 200, 20)
    check(xs, dys, [], [], out_dtype=dtype)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    n, t, i, o = shape
    xs, dys = modules(2, n, t, i), modules(2, n, t, o)
    check(xs, dys, [], [])


def test_torchs_default_device_is_not_asked() -> None:
    xs, dys = modules(2, 1, 9, 18), modules(2, 1, 9, 20)
    with torch.device("meta"):
        got = projected_gradients_grouped(xs, dys, [], [])
    assert torch.equal(got, projected_gradients_grouped(xs, dys, [], []))
