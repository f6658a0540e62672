from typing import Any

import pytest
import torch
from op_cases import DTYPES, assert_same, misaligned, randn, strided

from logra_kernels import ops, reference


def modules(count: int, *shape: int, **kwargs: Any) -> list[torch.Tensor]:
    return [randn(*shape, seed=hash(shape) + m, **kwargs) for m in range(count)]


XS, DYS = modules(3, 2, 70, 20), modules(3, 2, 70, 12)
PROJS_IN, PROJS_OUT = modules(3, 5, 20), modules(3, 4, 12)
MASK = torch.arange(140).reshape(2, 70) % 3 > 0


def single(m: int, *args: Any, **kwargs: Any) -> torch.Tensor:
    xs, dys, projs_in, projs_out, mask = args
    p_in, p_out = (projs[m] if projs else None for projs in (projs_in, projs_out))
    return ops.projected_gradients(xs[m], dys[m], p_in, p_out, mask, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projs_in", [PROJS_IN, None])
@pytest.mark.parametrize("projs_out", [PROJS_OUT, None])
@pytest.mark.parametrize("mask", [None, MASK, MASK.float()])
def test_bits_of_single_calls(
    isa: str, dtype: torch.dtype, projs_in: Any, projs_out: Any, mask: Any
) -> None:
    xs = [x.to(dtype) for x in XS]
    arguments = xs, DYS, projs_in, projs_out, mask
    got = ops.projected_gradients_grouped(*arguments)
    assert got.dtype == torch.float32
    for m in range(3):
        assert torch.equal(got[m], single(m, *arguments))
    want = reference.projected_gradients_grouped(
        [x.double() for x in xs], DYS, projs_in or [], projs_out or [], mask
    )
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)


def test_each_module_may_lie_in_memory_as_it_likes() -> None:
    xs = [XS[0], strided(XS[1]), misaligned(XS[2])]
    got = ops.projected_gradients_grouped(xs, DYS, PROJS_IN, PROJS_OUT, MASK)
    assert_same(got, ops.projected_gradients_grouped(XS, DYS, PROJS_IN, PROJS_OUT, MASK))


def test_packed_and_one_token_an_example_and_out_dtype() -> None:
    bounds = torch.tensor([0, 30, 30, 70])
    packed = [x[0] for x in XS], [dy[0] for dy in DYS], None, PROJS_OUT, MASK[0]
    got = ops.projected_gradients_grouped(*packed, cu_seqlens=bounds)
    assert all(torch.equal(got[m], single(m, *packed, cu_seqlens=bounds)) for m in range(3))
    short = [x[:, 0] for x in XS], [dy[:, 0] for dy in DYS], None, None, None
    got = ops.projected_gradients_grouped(*short, out_dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert all(torch.equal(got[m], single(m, *short, out_dtype=torch.bfloat16)) for m in range(3))


def test_float64() -> None:
    xs = [x.double() for x in XS]
    got = ops.projected_gradients_grouped(xs, DYS, None, None)
    assert got.dtype == torch.float64
    assert torch.equal(got, reference.projected_gradients_grouped(xs, DYS, [], []))
