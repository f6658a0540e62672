import pytest
import torch
from bounds import BRAIN, FULL, HALF, assert_near_reference
from torch import Tensor

from logra_kernels import reference
from logra_kernels.triton import per_sample_gradients, projected_gradients


def check(x: Tensor, dy: Tensor, *others: Tensor | None) -> Tensor:
    terms = x.shape[-1] + dy.shape[-1] + x.shape[-2]
    return assert_near_reference("projected_gradients", x, dy, *others, terms=terms)


def tokens(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (BRAIN, BRAIN), (FULL, FULL), (FULL, BRAIN)])
@pytest.mark.parametrize(
    ("n", "t", "i", "o", "ki", "ko"),
    [(2, 1, 1, 1, 1, 1), (3, 70, 33, 65, 17, 5), (1, 300, 20, 70, 16, 33)],
)
def test_equals_reference(
    dtypes: tuple[torch.dtype, torch.dtype], n: int, t: int, i: int, o: int,
    ki: int, ko: int,
) -> None:  # fmt: skip
    x = tokens(n, t, i, dtype=dtypes[0])
    dy = tokens(n, t, o, dtype=dtypes[1])
    proj_in = tokens(ki, i, dtype=dtypes[0])
    check(x, dy, proj_in, tokens(ko, o, dtype=dtypes[1]))


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (FULL, BRAIN), (HALF, FULL), (BRAIN, HALF)])
@pytest.mark.parametrize("sides", ["in", "out", "neither"])
def test_identity(dtypes: tuple[torch.dtype, torch.dtype], sides: str) -> None:
    x, dy = (
        tokens(2, 40, 21, dtype=dtypes[0]),
        tokens(2, 40, 70, dtype=dtypes[1]),
    )
    proj_in = tokens(9, 21, dtype=dtypes[0]) if sides == "in" else None
    proj_out = tokens(9, 70, dtype=dtypes[1]) if sides == "out" else None
    got = check(x, dy, proj_in, proj_out)
    if sides == "neither":
        assert torch.equal(got, per_sample_gradients(x, dy))


def test_projects_once_where_the_gradient_has_many_tiles() -> None:
    """Three tiles of 64 on the other side: the launcher projects first."""
    x, dy = tokens(1, 20, 30), tokens(1, 20, 190)
    check(x, dy, tokens(10, 30), None)
    check(dy, x, None, tokens(10, 30))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_a_masked_token_may_hold_nan(kind: torch.dtype) -> None:
    x, dy = tokens(2, 150, 20), tokens(2, 150, 18)
    proj = tokens(6, 20)
    mask = torch.rand(2, 300)[:, ::2] > 0.4  # strided
    mask[0, :80] = False
    x[~mask], dy[~mask] = torch.nan, torch.inf
    got = projected_gradients(x, dy, proj, None, mask.to(kind))
    clean = x.masked_fill(~mask[..., None], 0), dy.masked_fill(~mask[..., None], 0)
    assert torch.equal(got, projected_gradients(*clean, proj, None))
    check(*clean, proj, None)
    assert torch.equal(per_sample_gradients(x, dy, mask.to(kind)), per_sample_gradients(*clean))


def test_nan_in_a_token_that_counts_is_not_hidden() -> None:
    x, dy = tokens(2, 40, 20), tokens(2, 40, 20)
    x[1, 3, 4] = torch.nan
    got = projected_gradients(x, dy, None, None)
    assert got[1, :, 4].isnan().all()
    assert got[0].isfinite().all()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_segments(kind: torch.dtype) -> None:
    """Segments within, across and beyond a chunk of 128 tokens; empty ones; tokens in none."""
    x, dy = tokens(520, 20), tokens(520, 18)
    bounds = torch.tensor([3, 3, 10, 138, 139, 500, 500], dtype=kind)
    mask = torch.rand(520) > 0.2
    x[:3] = torch.nan
    for m in (None, mask):
        check(x, dy, tokens(5, 20), tokens(7, 18), m, bounds)
    assert (per_sample_gradients(x, dy, None, bounds)[[0, 5]] == 0).all()


def test_packed_equals_padded_bit_for_bit() -> None:
    lengths = [130, 1, 257, 64]
    x, dy = tokens(4, 257, 20), tokens(4, 257, 18)
    proj = tokens(5, 20)
    mask = torch.arange(257) < torch.tensor(lengths)[:, None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    padded = projected_gradients(x, dy, proj, None, mask)
    assert torch.equal(projected_gradients(x[mask], dy[mask], proj, None, None, bounds), padded)


def test_an_example_does_not_depend_on_its_batch() -> None:
    # Four chunks, because the order of two does not change their sum.
    x, dy = tokens(5, 400, 20), tokens(5, 400, 18)
    proj = tokens(5, 20)
    whole = projected_gradients(x, dy, proj, None)
    assert torch.equal(whole[3:], projected_gradients(x[3:], dy[3:], proj, None))


def test_strides() -> None:
    x = tokens(6, 90, 50)[::2, ::3, 7:40]
    dy = tokens(30, 3, 20).transpose(0, 1)
    check(x, dy, tokens(5, 60)[:, 9:42], None)
    check(x, tokens(3, 20, 30).transpose(1, 2), None, None)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    n, t, i, o = shape
    x, dy = torch.ones(n, t, i), torch.ones(n, t, o)
    got = projected_gradients(x, dy, torch.ones(3, i), None)
    assert torch.equal(got, reference.projected_gradients(x, dy, x.new_ones(3, i), None))
    assert torch.equal(per_sample_gradients(x, dy), reference.per_sample_gradients(x, dy))
    none = torch.zeros(1, dtype=torch.int64)
    packed = projected_gradients(x.flatten(0, 1), dy.flatten(0, 1), None, None, None, none)
    assert packed.shape == (0, o, i)


def test_extremes() -> None:
    """Products of fp16's largest, and of its smallest with the largest, in float32."""
    x = torch.tensor([65504.0, 2.0**-24]).half().expand(1, 3, 2)
    dy = torch.full((1, 3, 1), 65504.0).half()
    want = [3 * 65504.0**2, 3 * 65504.0 * 2.0**-24]
    assert per_sample_gradients(x, dy).flatten().tolist() == pytest.approx(want, rel=3 * 2.0**-23)
    eye = torch.eye(2).half()
    got = projected_gradients(x, dy, eye, eye[:1, :1])
    assert got.flatten().tolist() == pytest.approx(want, rel=3 * 2.0**-23 + 2.0**-19)


def test_pieces_hold_24_bits() -> None:
    """float32 times a bfloat16 1.0: a sum of one product loses only what the pieces lose."""
    values = torch.randn(3, 1, 20)
    ones = torch.ones(3, 1, 1).bfloat16()
    for got in (per_sample_gradients(ones, values), per_sample_gradients(values, ones)):
        torch.testing.assert_close(got.flatten(1), values[:, 0], rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("t", [10, 200])
def test_out_dtype(dtype: torch.dtype, t: int) -> None:
    x, dy = tokens(2, t, 20), tokens(2, t, 18)
    got = per_sample_gradients(x, dy, out_dtype=dtype)
    assert got.dtype == dtype
    # The bound is one unit in the last place, because the interpreter truncates to bfloat16.
    unit = 2.0**-10 if dtype == HALF else 2.0**-7
    torch.testing.assert_close(got.float(), per_sample_gradients(x, dy), rtol=unit, atol=1e-5)
