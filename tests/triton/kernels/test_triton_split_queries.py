"""How many bits of every element the pieces of a query keep."""

import pytest
import torch

from logra_kernels.triton.split_queries import split_queries


@pytest.mark.parametrize("dim", [1, 7, 16, 1000, 2049])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_two_float16_pieces_keep_22_bits(dim: int, size: float) -> None:
    queries = (torch.rand(5, dim) * 2 - 1) * size
    queries[2] = 0
    pieces, scale = split_queries(queries, torch.float16)
    assert pieces.shape == (2, 5, dim)
    assert scale is not None
    assert bool((torch.frexp(scale).mantissa == 0.5).all())
    got = pieces.double().sum(0) * scale.double()[:, None]
    largest = queries.double().abs().amax(1, keepdim=True)
    # Half a unit of the second piece: 2**-22 of the element, or half of fp16's smallest number,
    # 2**-24, with the query's largest element scaled to 2**14. Scales are 2**-126 or more.
    bound = queries.double().abs() * 2.0**-22 + largest.clamp_min(2.0**-112) * 2.0**-39
    assert bool(((got - queries.double()).abs() <= bound).all())


def test_three_bfloat16_pieces_are_exact() -> None:
    queries = torch.randn(4, 300) * 10.0 ** torch.arange(-9, 11, 5)[:4, None]
    pieces, scale = split_queries(queries, torch.bfloat16)
    assert scale is None
    assert torch.equal(pieces.double().sum(0), queries.double())


def test_what_is_not_finite_is_not_scaled() -> None:
    queries = torch.ones(3, 20)
    queries[0, 3], queries[1, 4] = torch.inf, torch.nan
    pieces, scale = split_queries(queries, torch.float16)
    assert scale is not None
    assert scale.tolist() == [1.0, 1.0, 2.0**-14]
    assert pieces[:, 0, 3].tolist() == [torch.inf, 0.0]
    assert bool(pieces[0, 1, 4].isnan())
    assert pieces[0, 0, 0] == 1


def test_strided_queries_and_none() -> None:
    wide = torch.randn(6, 40)
    for queries in (wide[::2, :33], wide.T):
        pieces, scale = split_queries(queries, torch.float16)
        assert scale is not None
        wanted = split_queries(queries.contiguous(), torch.float16)[0]
        assert torch.equal(pieces, wanted)
    assert split_queries(wide[:0], torch.float16)[0].shape == (1, 0, 40)
    assert split_queries(wide, torch.float32)[0].data_ptr() == wide.data_ptr()
