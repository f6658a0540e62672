import pytest
import torch
from bounds import BRAIN, FULL, HALF, assert_near_reference
from torch import Tensor

from logra_kernels.triton import projected_coordinates, projected_gradients


def tokens(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape).to(dtype)


def corner(ko: int, ki: int) -> Tensor:
    """Places below a diagonal, of which tiles above it have none."""
    below = torch.arange(ko)[:, None] / ko + torch.arange(ki) / ki < 0.8
    return below.flatten().nonzero()[:, 0]


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (FULL, BRAIN), (FULL, FULL)])
@pytest.mark.parametrize(
    ("n", "t", "ki", "ko"), [(2, 1, 1, 1), (3, 70, 17, 5), (2, 300, 90, 70), (1, 140, 16, 160)]
)
def test_equals_reference(
    dtypes: tuple[torch.dtype, torch.dtype], n: int, t: int, ki: int, ko: int
) -> None:
    x, dy = tokens(n, t, 33, dtype=dtypes[0]), tokens(n, t, 40, dtype=dtypes[1])
    projs = tokens(ki, 33, dtype=dtypes[0]), tokens(ko, 40, dtype=dtypes[1])
    places = corner(ko, ki)
    scale = torch.rand(len(places)) + 0.5
    mask = torch.rand(n, t) > 0.3
    arguments = (x, dy, *projs, places, scale, mask)
    assert_near_reference("projected_coordinates", *arguments, terms=73 + t)
    whole = projected_gradients(x, dy, *projs, mask).flatten(1)[:, places]
    got = projected_coordinates(x, dy, *projs, places, None, mask)
    assert torch.equal(got, whole)


def test_packed_segments_and_out_dtype() -> None:
    """Segments within, across and beyond a chunk of 128 tokens; empty ones; tokens in none."""
    x, dy = tokens(520, 20), tokens(520, 18)
    places = corner(18, 20)
    bounds = torch.tensor([3, 3, 10, 200, 501])
    arguments = x, dy, None, None, places, torch.rand(len(places)), None, bounds
    assert_near_reference("projected_coordinates", *arguments, terms=400)
    assert projected_coordinates(*arguments, HALF).dtype == HALF
