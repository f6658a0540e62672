import pytest
import torch
from op_cases import DTYPES, assert_within, gamma, mask_of, randn
from torch import Tensor

from logra_kernels.ops import per_sample_gradients, project, projected_gradients

pytestmark = pytest.mark.usefixtures("poison")


def project_or_not(x: Tensor, proj: Tensor | None) -> Tensor:
    return x if proj is None else project(x, proj)


def check(
    x: Tensor, dy: Tensor, proj_in: Tensor | None, proj_out: Tensor | None, mask: Tensor
) -> None:
    """Two products of lengths I and O, then one of length T: gamma adds up."""
    p_in = torch.eye(x.shape[-1]).double() if proj_in is None else proj_in.double()
    p_out = torch.eye(dy.shape[-1]).double() if proj_out is None else proj_out.double()
    wide, left = x.double(), dy.double() * mask.double()[..., None]
    exact = torch.einsum("nto,nti->noi", left @ p_out.T, wide @ p_in.T)
    size = torch.einsum("nto,nti->noi", left.abs() @ p_out.abs().T, wide.abs() @ p_in.abs().T)
    terms = x.shape[-1] + dy.shape[-1] + x.shape[1] + 6
    assert_within(projected_gradients(x, dy, proj_in, proj_out, mask), exact, gamma(terms) * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(isa: str, dtype: torch.dtype) -> None:
    for n, t, i, o, ki, ko in (
        (2, 5, 7, 9, 3, 2),
        (3, 50, 40, 33, 8, 17),
        (1, 130, 65, 70, 64, 66),
        (1, 3, 1030, 16, 4, 4),
        (90, 1, 12, 12, 5, 6),
    ):
        x, dy = randn(n, t, i, dtype=dtype), randn(n, t, o, dtype=dtype, seed=1)
        proj_in, proj_out = randn(ki, i, seed=2), randn(ko, o, seed=3).bfloat16().float()
        mask = mask_of(n, t)
        check(x, dy, proj_in, proj_out, mask)
        check(x, dy, proj_in, None, mask)
        check(x, dy, None, proj_out, mask)
        check(x, dy, None, None, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("native")
def test_same_bits_as_its_parts(isa: str, dtype: torch.dtype) -> None:
    x, dy = randn(3, 130, 100, dtype=dtype), randn(3, 130, 90, seed=1)
    mask = mask_of(3, 130)
    for p_in in (randn(70, 100, seed=2), randn(70, 100, seed=2).bfloat16(), None):
        for p_out in (randn(9, 90, seed=3), None):
            fused = projected_gradients(x, dy, p_in, p_out, mask)
            parts = per_sample_gradients(project_or_not(x, p_in), project_or_not(dy, p_out), mask)
            assert torch.equal(fused, parts)


@pytest.mark.usefixtures("native")
def test_packed_tokens_have_the_bits_of_dense_ones(isa: str) -> None:
    x, dy, mask = randn(5, 900, 64), randn(5, 900, 48, seed=1), mask_of(5, 900)
    projections = randn(70, 64, seed=2), randn(33, 48, seed=3)
    packed = projected_gradients(
        *(x.flatten(0, 1), dy.flatten(0, 1), *projections, mask.flatten()),
        cu_seqlens=torch.arange(6) * 900,
    )
    assert torch.equal(packed, projected_gradients(x, dy, *projections, mask))


def test_segment_ids(isa: str) -> None:
    x, dy = randn(2, 6, 5), randn(2, 6, 3, seed=1)
    proj_in, proj_out = randn(4, 5, seed=2), randn(2, 3, seed=3)
    ids = torch.tensor([[0, 0, 1, -1, -1, -1], [2, 2, 2, 3, 3, -1]])
    out = projected_gradients(x, dy, proj_in, proj_out, segment_ids=ids)
    for s in range(4):
        keep = (ids == s).flatten()
        alone = projected_gradients(
            x.flatten(0, 1)[None], dy.flatten(0, 1)[None], proj_in, proj_out, keep[None]
        )
        torch.testing.assert_close(out[s], alone[0], rtol=1e-5, atol=1e-5)
