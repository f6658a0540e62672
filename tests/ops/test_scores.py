from functools import partial

import pytest
import torch
from op_cases import (
    DTYPES,
    TAILS,
    assert_same,
    assert_threads_do_not_matter,
    assert_within,
    gamma,
    randn,
)
from torch import Tensor

from logra_kernels.ops import scores

pytestmark = pytest.mark.usefixtures("poison")


def check(queries: Tensor, rows: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    """Against float64: gamma over D products and their sums, then a scale and a bias."""
    exact = queries.double() @ rows.double().T
    size = queries.double().abs() @ rows.double().abs().T
    if scale is not None:
        exact, size = exact * scale.double(), size * scale.double().abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert_within(scores(queries, rows, scale, bias), exact, gamma(rows.shape[1] + 4) * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(isa: str, dtype: torch.dtype) -> None:
    # 1024 is the block of D; 49 rows and 65 queries are a block and one more
    sizes = [(5, 7, d) for d in TAILS]
    sizes += [(q, 13, 40) for q in TAILS] + [(3, r, 40) for r in TAILS]
    sizes += [(65, 49, 1025), (4, 6, 1024), (33, 50, 2055)]
    for num_queries, num_rows, dim in sizes:
        queries, rows = randn(num_queries, dim), randn(num_rows, dim, dtype=dtype, seed=1)
        scale, bias = torch.rand(num_rows) + 0.1, randn(num_rows, seed=2)
        check(queries, rows, scale, bias)
        check(queries.bfloat16().float(), rows, None, None)  # exact in bfloat16: its own kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("native", "set_threads")
def test_few_queries_have_the_bits_of_many(isa: str, dtype: torch.dtype) -> None:
    """Up to four have a kernel of their own; 600 rows are several tasks of each thread."""
    for num_rows, dim in ((600, 70), (125, 2100), (13, 1024)):
        rows, queries = randn(num_rows, dim, dtype=dtype), randn(9, dim, seed=1)
        whole = scores(queries, rows)
        for count in (1, 2, 3, 4):
            assert torch.equal(scores(queries[:count], rows), whole[:count])
            assert_threads_do_not_matter(partial(scores, queries[:count], rows))


def test_every_half_is_read_exactly(isa: str) -> None:
    """Also the subnormals; times one, alone in its row."""
    for dtype in (torch.float16, torch.bfloat16):
        halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
        for num_queries in (1, 40):  # read in place, and widened first
            out = scores(torch.full((num_queries, 1), 1 + 2.0**-20), halves[:, None])
            exact = halves.float() * (1 + 2.0**-20)
            assert torch.equal(out.nan_to_num(), exact.expand(num_queries, -1).nan_to_num())
            assert torch.equal(out[0].isnan(), halves.isnan())


def test_rows_that_are_not_finite_stay_alone(isa: str) -> None:
    rows = randn(60, 50).half()
    rows[7, 3], rows[20, 40] = torch.nan, torch.inf
    queries = randn(6, 50, seed=1)
    out, clean = scores(queries, rows), scores(queries, rows.nan_to_num(0, 0, 0))
    bad = torch.zeros(60, dtype=torch.bool)
    bad[[7, 20]] = True
    assert not out[:, bad].isfinite().any()
    assert torch.equal(out[:, ~bad], clean[:, ~bad])


def test_large_queries_do_not_overflow() -> None:
    """torch's fp16 product would: its results are fp16 too."""
    out = scores(torch.full((1, 64), 1e6), torch.full((1, 64), 1e4).half())
    assert out.item() == pytest.approx(64e10, rel=gamma(66))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 5, 70])
def test_sums_of_large_queries_that_cancel_are_exact(
    isa: str, dtype: torch.dtype, num_queries: int
) -> None:
    """The sums pass through what float32 cannot hold, to scores that it can."""
    large = 1.5 * 2.0**127  # of few digits, so that multiples of it are exact; 3e38 is not
    query = torch.tensor([large] * 20 + [-large] * 20 + [2.0**120])
    queries = randn(num_queries, 41, seed=1)
    queries[num_queries // 2] = query
    rows = torch.tensor([[1.0] * 41, [2.0**15] * 40 + [128.0], [0.0] * 41], dtype=dtype)
    out = scores(queries, rows)
    assert out[num_queries // 2].tolist() == [2.0**120, 2.0**127, 0.0]
    others = torch.arange(num_queries) != num_queries // 2
    assert_same(out[others], scores(queries[others], rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_query_has_the_bits_of_a_small_one(isa: str, dtype: torch.dtype) -> None:
    """Times a power of two; a row's scale is applied before what would be infinite without it."""
    queries, rows = randn(6, 300), randn(50, 300, dtype=dtype, seed=1)
    scale, bias = torch.rand(50) * 2.0**-20, randn(50, seed=2)
    want = scores(queries, rows, scale, bias)
    powers = torch.tensor([0, 60, 62, 64, 100, 124])
    large = queries * torch.ldexp(torch.ones(6), powers)[:, None]
    for q, power in enumerate(powers.tolist()):
        factor = 2.0**power
        out = scores(large, rows, scale, bias * factor)
        assert torch.equal(out[q], want[q] * factor)
        assert torch.equal(scores(large, rows)[q], scores(queries, rows)[q] * factor)


def test_queries_that_are_not_finite_stay_alone(isa: str) -> None:
    queries, rows = randn(4, 50), randn(9, 50, seed=1).half()
    queries[1, 3], queries[2, 7], queries[3] = torch.nan, torch.inf, 3e38
    out = scores(queries, rows)
    assert not out[1:3].isfinite().any()
    assert_same(out[:1], scores(queries[:1], rows))


def test_float64_is_computed_in_float64() -> None:
    queries, rows = randn(3, 9).double(), randn(4, 9, seed=1)
    assert torch.equal(scores(queries, rows), queries @ rows.double().T)
