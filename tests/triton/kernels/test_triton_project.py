import pytest
import torch
from bounds import BRAIN, FULL, HALF, assert_near_reference

from logra_kernels.triton import project


def check(x: torch.Tensor, proj: torch.Tensor) -> None:
    assert_near_reference("project", x, proj, terms=x.shape[-1])


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (BRAIN, BRAIN), (FULL, FULL), (FULL, BRAIN)])
@pytest.mark.parametrize(("tokens", "width", "rank"), [(1, 1, 1), (65, 17, 3), (70, 130, 33)])
def test_equals_reference(
    dtypes: tuple[torch.dtype, torch.dtype], tokens: int, width: int, rank: int
) -> None:
    x = torch.randn(tokens, width).to(dtypes[0])
    check(x, torch.randn(rank, width).to(dtypes[1]))


@pytest.mark.parametrize("dtypes", [(HALF, FULL), (HALF, BRAIN), (BRAIN, FULL)])
def test_mixed_types(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x = torch.randn(20, 40).to(dtypes[0])
    check(x, torch.randn(5, 40).to(dtypes[1]))


def test_more_outputs_than_a_tile() -> None:
    check(torch.randn(3, 20).half(), torch.randn(200, 20).half())


def test_strides() -> None:
    base = torch.randn(4, 30, 50).half()
    proj = torch.randn(9, 60).half()[:, 10:50]
    check(base[:, ::3, 5:45], proj)  # two strides, unaligned
    check(base[:, :8].transpose(0, 1)[..., :40], proj)
    check(torch.randn(2, 2, 3, 40).half(), proj)
    check(torch.randn(7).half(), proj[:, :7])
    check(torch.randn(40, 6).half().T, proj)  # last axis not contiguous


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    got = project(x, torch.ones(4, shape[-1]))
    assert torch.equal(got, torch.zeros(*shape[:-1], 4))
    assert project(x, torch.ones(0, shape[-1])).shape == (*shape[:-1], 0)


def test_extremes() -> None:
    """fp16's largest and smallest: sums beyond 65504 do not overflow, subnormals count."""
    x = torch.tensor([[65504.0] * 40, [2.0**-24] * 40]).half()
    got = project(x, torch.ones(1, 40).half())
    assert got.flatten().tolist() == [65504.0 * 40, 40 * 2.0**-24]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Split at a tile, because the interpreter's BLAS sums by position within a tile."""
    x = torch.randn(100, 90)
    proj = torch.randn(7, 90)
    assert torch.equal(project(x, proj)[64:], project(x[64:], proj))


def test_precision_is_checked() -> None:
    x = torch.randn(2, 40)
    for precision in ("tf32", "bf16x6"):
        got = project(x, x, input_precision=precision)
        torch.testing.assert_close(got, x @ x.T, rtol=1e-2, atol=1e-2)  # tf32 keeps 10 bits
    with pytest.raises(ValueError, match=r"input_precision: expected one of ieee, .*, got 'fp8'"):
        project(x, x, input_precision="fp8")
