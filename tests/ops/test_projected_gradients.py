import pytest
import torch
from op_cases import (
    DTYPES,
    assert_same,
    assert_threads_do_not_matter,
    assert_within,
    gamma,
    layouts,
    randn,
)
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
        mask = torch.rand(n, t, generator=torch.Generator().manual_seed(4)) > 0.3
        check(x, dy, proj_in, proj_out, mask)
        check(x, dy, proj_in, None, mask)
        check(x, dy, None, proj_out, mask)
        check(x, dy, None, None, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("native")
def test_same_bits_as_its_parts(isa: str, dtype: torch.dtype) -> None:
    x, dy = randn(3, 130, 100, dtype=dtype), randn(3, 130, 90, seed=1)
    mask = torch.rand(3, 130, generator=torch.Generator().manual_seed(4)) > 0.3
    for p_in in (randn(70, 100, seed=2), randn(70, 100, seed=2).bfloat16(), None):
        for p_out in (randn(9, 90, seed=3), None):
            fused = projected_gradients(x, dy, p_in, p_out, mask)
            parts = per_sample_gradients(project_or_not(x, p_in), project_or_not(dy, p_out), mask)
            assert torch.equal(fused, parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("native", "set_threads")
def test_threads_and_splits_do_not_change_bits(isa: str, dtype: torch.dtype) -> None:
    # more tokens than go through at a time: 2 MiB of projections are 2,976 here, with AVX-512
    x, dy = randn(5, 900, 64, dtype=dtype), randn(5, 900, 48, dtype=dtype, seed=1)
    proj_in, proj_out = randn(70, 64, seed=2), randn(33, 48, seed=3)
    mask = torch.rand(5, 900, generator=torch.Generator().manual_seed(4)) > 0.1
    assert_threads_do_not_matter(lambda: projected_gradients(x, dy, proj_in, proj_out, mask))
    whole = projected_gradients(x, dy, proj_in, proj_out, mask)
    parts = [
        projected_gradients(x[a:b], dy[a:b], proj_in, proj_out, mask[a:b])
        for a, b in ((0, 1), (1, 4), (4, 5))
    ]
    assert torch.equal(torch.cat(parts), whole)
    bounds = torch.arange(6) * 900
    packed = projected_gradients(
        x.flatten(0, 1), dy.flatten(0, 1), proj_in, proj_out, mask.flatten(), cu_seqlens=bounds
    )
    assert torch.equal(packed, whole)


def test_layout_does_not_change_bits(isa: str) -> None:
    x, dy = randn(3, 9, 70), randn(3, 9, 33, seed=1)
    proj_in, proj_out = randn(8, 70, seed=2), randn(8, 33, seed=3)
    expected = projected_gradients(x, dy, proj_in, proj_out)
    for view in layouts(x):
        assert_same(projected_gradients(view, dy, proj_in, proj_out), expected)
    for view in layouts(proj_in):
        assert_same(projected_gradients(x, dy, view, proj_out), expected)


def test_the_full_gradient_projected(isa: str) -> None:
    """P_o (sum_t dy x^T) P_i^T: what Eq. 6 saves."""
    x, dy = randn(4, 30, 20), randn(4, 30, 16, seed=1)
    proj_in, proj_out = randn(6, 20, seed=2), randn(5, 16, seed=3)
    full = torch.einsum("nto,nti->noi", dy.double(), x.double())
    expected = proj_out.double() @ full @ proj_in.double().T
    out = projected_gradients(x, dy, proj_in, proj_out).double()
    # relative to the largest element: the bound of check() is tested above
    assert float((out - expected).abs().max() / expected.abs().max()) < 1e-5


def test_empty(isa: str) -> None:
    proj_in, proj_out = randn(6, 5), randn(2, 3)
    none = projected_gradients(randn(0, 4, 5), randn(0, 4, 3), proj_in, proj_out)
    assert none.shape == (0, 2, 6)
    zero = projected_gradients(randn(2, 0, 5), randn(2, 0, 3), proj_in, proj_out)
    assert zero.equal(torch.zeros(2, 2, 6))


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


@pytest.mark.parametrize(
    ("proj_in", "proj_out", "error", "message"),
    [
        (randn(4, 6), None, ValueError, "proj_in: expected [Ki, I=5], got [4, 6]"),
        (None, randn(3), ValueError, "proj_out: expected [Ko, O=3], got [3]"),
        (
            None,
            randn(2, 3).long(),
            TypeError,
            "proj_out: expected float16 or bfloat16 or float32 or float64, got int64",
        ),
    ],
)
def test_bad_input(
    proj_in: Tensor | None, proj_out: Tensor | None, error: type, message: str
) -> None:
    with pytest.raises(error) as caught:
        projected_gradients(randn(2, 6, 5), randn(2, 6, 3), proj_in, proj_out)
    assert str(caught.value) == message
