import pytest
import torch
from op_cases import DTYPES, TAILS, mask_of, randn
from torch import Tensor

from logra_kernels import _native
from logra_kernels.ops import projected_coordinates, projected_gradients
from logra_kernels.ops._pointers import view

pytestmark = pytest.mark.usefixtures("poison")


def staircase(ko: int, ki: int) -> Tensor:
    """Places below a line from one corner to the other with gaps, and one far above it."""
    rows, columns = torch.arange(ko)[:, None], torch.arange(ki)
    below = (rows / ko + columns / ki < 1) & ((3 * rows + columns) % 4 != 1)
    below[ko // 3, ki - 1] = True
    return below.flatten().nonzero()[:, 0]


def check(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """The bits of the whole gradient, a gather and a product."""
    tokens = x, dy, proj_in, proj_out
    whole = projected_gradients(*tokens, mask, cu_seqlens=cu_seqlens)
    places = staircase(*whole.shape[1:])
    scale = torch.rand(len(places)) + 0.1
    want = whole.flatten(1)[:, places]
    got = projected_coordinates(*tokens, places, None, mask, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    got = projected_coordinates(*tokens, places, scale, mask, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got, want * scale, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_whole_gradient(isa: str, dtype: torch.dtype) -> None:
    for size in TAILS:
        for ki, ko in ((size, 5), (21, size)):
            x, dy = randn(3, 70, 40, dtype=dtype), randn(3, 70, 33, dtype=dtype, seed=1)
            proj_in, proj_out = randn(ki, 40, seed=2), randn(ko, 33, seed=3)
            check(x, dy, proj_in, proj_out, mask=mask_of(3, 70))
            check(randn(3, 70, ki, dtype=dtype), dy, None, proj_out)
            check(x, randn(3, 70, ko, dtype=dtype), proj_in, None)


@pytest.mark.usefixtures("set_threads")
def test_long_examples_and_packed_ones_on_threads(isa: str) -> None:
    """Several groups of tokens, and tasks of several bands, one example at a time or many."""
    x, dy = randn(1, 9000, 24), randn(1, 9000, 40, seed=1)
    projections = randn(70, 24, seed=2), randn(150, 40, seed=3)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        check(x, dy, *projections)
        bounds = torch.tensor([0, 0, 17, 4000, 8990])
        check(x[0], dy[0], *projections, mask=mask_of(9000), cu_seqlens=bounds)


def test_segments_tokens_and_types() -> None:
    x, dy, places = randn(4, 8), randn(4, 3, seed=1), torch.tensor([0, 5, 23])
    got = projected_coordinates(x, dy, None, None, places, segment_ids=torch.tensor([0, 1, 1, 0]))
    want = torch.stack([dy[[0, 3]].T @ x[[0, 3]], dy[1:3].T @ x[1:3]]).flatten(1)[:, places]
    torch.testing.assert_close(got, want)
    one = projected_coordinates(x, dy, None, None, places, out_dtype=torch.float16)
    assert one.dtype == torch.float16
    wide = projected_coordinates(x.double(), dy, None, None, places, torch.ones(3))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(one.double(), wide, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("native")
def test_the_core_refuses_places_outside() -> None:
    """The core checks what its memory accesses depend on, whoever calls it."""
    core = _native.C
    assert core is not None
    x, out = randn(1, 2, 4), torch.zeros(1, 1)
    for place in (-1, 16):
        places = torch.tensor([place])
        with pytest.raises(ValueError, match="coordinates: expected places in the gradient"):
            core.projected_coordinates(
                *(view(x), view(x), None, None), places.data_ptr(), 0, 0, 0, view(out)
            )
