import pytest
import torch
from bounds import BRAIN, FULL, HALF, assert_near_reference
from torch import Tensor

from logra_kernels import reference
from logra_kernels.triton import scores, self_influence


def check(
    queries: Tensor, rows: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> None:
    # Each column is added once for every piece of the query.
    assert_near_reference("scores", queries, rows, scale, bias, terms=3 * rows.shape[1] + 2)


def uneven(*shape: int) -> Tensor:
    """float32 over 26 powers of two, as preconditioned queries are."""
    return torch.randn(shape) * torch.exp2(torch.randint(-13, 13, shape))


@pytest.mark.parametrize("dtypes", [(FULL, HALF), (FULL, BRAIN), (FULL, FULL), (HALF, HALF)])
@pytest.mark.parametrize(("q", "r", "d"), [(1, 1, 1), (17, 65, 33), (70, 130, 70)])
def test_equals_reference(dtypes: tuple[torch.dtype, torch.dtype], q: int, r: int, d: int) -> None:
    queries = torch.randn(q, d).to(dtypes[0])
    rows = torch.randn(r, d).to(dtypes[1])
    scale = torch.rand(r)
    check(queries, rows)
    check(queries, rows, scale)
    check(queries, rows, None, scale)
    check(queries, rows, scale, torch.randn(r))


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_uneven_queries(dtype: torch.dtype) -> None:
    queries = uneven(5, 60)
    queries[0] *= 2.0**90
    queries[1] *= 2.0**-90
    queries[2] = 0
    check(queries, torch.randn(9, 60).to(dtype))


@pytest.mark.parametrize("dtypes", [(BRAIN, HALF), (HALF, BRAIN), (HALF, FULL), (BRAIN, BRAIN)])
def test_mixed_types(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    queries = torch.randn(3, 50).to(dtypes[0])
    check(queries, torch.randn(8, 50).to(dtypes[1]))


def test_strides() -> None:
    """A module's columns of every other row, a query's columns, scales with a stride."""
    queries = torch.randn(6, 90)[::2, 11:54]
    rows = torch.randn(80, 90).half()[::2, 11:54]
    scale = torch.rand(80)[::2]
    check(queries, rows, scale, scale)
    check(torch.randn(43, 3).T, torch.randn(43, 8).half().T)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_empty(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    q, r, d = shape
    queries, rows = torch.ones(q, d), torch.ones(r, d).to(dtype)
    scale = torch.ones(r)
    got = scores(queries, rows, scale, scale)
    assert torch.equal(got, reference.scores(queries, rows, scale, scale))


def test_extremes() -> None:
    rows = torch.tensor([[65504.0] * 3, [2.0**-24] * 3]).half()
    queries = torch.tensor([[1e30] * 3, [1e-30] * 3])
    check(queries, rows)
    assert scores(rows[:, :1], rows[:, :1]).tolist() == [
        [65504.0**2, 65504 * 2.0**-24],
        [65504 * 2.0**-24, 2.0**-48],
    ]


def test_a_row_that_is_not_finite_stays_alone() -> None:
    rows = torch.randn(70, 40).half()
    queries = torch.randn(2, 40)
    want = scores(queries, rows)
    rows[5, 3], rows[66, 2] = torch.nan, torch.inf
    got = scores(queries, rows)
    assert not got[:, [5, 66]].isfinite().any()
    keep = [r for r in range(70) if r not in (5, 66)]
    # The interpreter's BLAS may take another path for a tile with NaN.
    torch.testing.assert_close(got[:, keep], want[:, keep], rtol=1e-5, atol=1e-4)


def test_a_score_does_not_depend_on_the_other_rows() -> None:
    """Split at a tile, because the interpreter's BLAS sums by position within a tile."""
    rows = torch.randn(300, 90).half()
    for count in (10, 40):  # a rule of the table each
        queries = torch.randn(count, 90)
        assert torch.equal(scores(queries, rows)[:, 128:], scores(queries, rows[128:]))


@pytest.mark.parametrize("dtypes", [(HALF, FULL), (BRAIN, FULL), (FULL, FULL), (HALF, HALF)])
@pytest.mark.parametrize(
    ("r", "k", "m"), [(1, 1, 1), (65, 33, 17), (70, 90, 140), (3, 0, 4), (3, 5, 0)]
)
def test_self_influence(dtypes: tuple[torch.dtype, torch.dtype], r: int, k: int, m: int) -> None:
    rows = torch.randn(2 * r, k + 7).to(dtypes[0])[::2, 7:]
    factor = torch.randn(m, k + 3).to(dtypes[1])[:, 3:]
    # |(Wg + e)^2 - (Wg)^2| <= 2 |Wg| e + e^2, both within the sum of absolute values.
    assert_near_reference("self_influence", rows, factor, terms=3 * k + m, factor=3)


def test_self_influence_of_no_rows() -> None:
    got = self_influence(torch.ones(0, 3), torch.ones(2, 3))
    assert got.shape == (0,)


def test_self_influence_extremes() -> None:
    rows = torch.tensor([[65504.0], [2.0**-24], [0.0]]).half()
    got = self_influence(rows, torch.full((1, 1), 2.0**20))
    assert got.tolist() == [(65504 * 2.0**20) ** 2, 2.0**-8, 0.0]
