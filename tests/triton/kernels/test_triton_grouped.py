import pytest
import torch
from torch import Tensor

from logra_kernels import reference
from logra_kernels.triton import launch, projected_gradients, projected_gradients_grouped

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def modules(
    count: int, *shape: int, dtype: torch.dtype = HALF, device: str = "cpu"
) -> list[Tensor]:
    return [torch.randn(*shape, device=device).to(dtype) for _ in range(count)]


def check(
    xs: list[Tensor],
    dys: list[Tensor],
    projs_in: list[Tensor],
    projs_out: list[Tensor],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The bits are those of single calls, and the values are near the reference."""
    got = projected_gradients_grouped(xs, dys, projs_in, projs_out, mask, cu_seqlens, out_dtype)
    for m, part in enumerate(got):
        p_in, p_out = (projs[m] if projs else None for projs in (projs_in, projs_out))
        one = projected_gradients(xs[m], dys[m], p_in, p_out, mask, cu_seqlens, out_dtype)
        assert torch.equal(part, one), f"module {m} differs from a single call"
    want = reference.projected_gradients_grouped(
        xs, dys, projs_in, projs_out, mask, cu_seqlens, out_dtype=out_dtype
    )
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    return got


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (FULL, FULL), (FULL, BRAIN)])
@pytest.mark.parametrize("sides", ["both", "out", "neither"])
def test_equals_single_calls(
    device: str, dtypes: tuple[torch.dtype, torch.dtype], sides: str
) -> None:
    xs = modules(3, 2, 150, 20, dtype=dtypes[0], device=device)
    dys = modules(3, 2, 150, 36, dtype=dtypes[1], device=device)
    projs_in = modules(3, 7, 20, dtype=dtypes[0], device=device) if sides == "both" else []
    projs_out = modules(3, 5, 36, dtype=dtypes[1], device=device) if sides != "neither" else []
    mask = torch.rand(2, 150, device=device) > 0.3
    check(xs, dys, projs_in, projs_out, mask)
    check(xs, dys, projs_in, projs_out)


def test_one_module(device: str) -> None:
    xs, dys = (modules(1, 2, 20, 18, device=device) for _ in range(2))
    check(xs, dys, [], [])


def test_packed(device: str) -> None:
    xs, dys = modules(3, 300, 18, device=device), modules(3, 300, 20, device=device)
    bounds = torch.tensor([2, 2, 140, 290], device=device)
    check(xs, dys, modules(3, 4, 18, device=device), [], torch.arange(300) % 7 > 0, bounds)


def test_wide_gradients_are_projected_first(device: str) -> None:
    """Beyond two tiles a side each module is projected first; then all share one launch."""
    xs, dys = modules(2, 1, 20, 30, device=device), modules(2, 1, 20, 190, device=device)
    check(xs, dys, modules(2, 10, 30, device=device), [])


def test_modules_of_other_strides_or_addresses_have_launches_of_their_own(device: str) -> None:
    xs, dys = modules(4, 2, 30, 32, device=device), modules(4, 2, 30, 16, device=device)
    xs[1] = torch.randn(2, 30, 48, device=device).half()[..., :32]
    xs[2] = torch.randn(2, 30, 49, device=device).half()[..., 1:33]
    check(xs, dys, [], [])
    with launch.recording("sm_90") as launches:
        projected_gradients_grouped(xs, dys, [], [])
    assert [one.arguments["modules"] for one in launches] == [1, 1, 1, 1]
    with launch.recording("sm_90") as launches:
        projected_gradients_grouped([xs[0], xs[3]], dys[:2], [], [])
    assert [one.arguments["modules"] for one in launches] == [2]


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_out_dtype(device: str, dtype: torch.dtype) -> None:
    xs, dys = modules(2, 2, 200, 18, device=device), modules(2, 2, 200, 20, device=device)
    check(xs, dys, [], [], out_dtype=dtype)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6)])
def test_empty(device: str, shape: tuple[int, int, int, int]) -> None:
    n, t, i, o = shape
    xs, dys = modules(2, n, t, i, device=device), modules(2, n, t, o, device=device)
    check(xs, dys, [], [])
