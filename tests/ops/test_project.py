import pytest
import torch
from op_cases import DTYPES, TAILS, assert_within, gamma, randn
from torch import Tensor

from logra_kernels.ops import project

pytestmark = pytest.mark.usefixtures("poison")


def check(x: Tensor, proj: Tensor) -> None:
    exact = x.double() @ proj.double().T
    size = x.double().abs() @ proj.double().abs().T
    assert_within(project(x, proj), exact, gamma(x.shape[-1] + 2) * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(isa: str, dtype: torch.dtype) -> None:
    sizes = [(7, n, 5) for n in TAILS] + [(m, 40, 3) for m in TAILS] + [(5, 40, k) for k in TAILS]
    for tokens, dim, rank in [*sizes, (49, 2055, 66), (100, 385, 150)]:
        x, proj = randn(tokens, dim, dtype=dtype), randn(rank, dim, seed=1)
        check(x, proj)
        check(x, proj.bfloat16().float())  # exact in bfloat16: its own kernel
        check(x, proj.bfloat16())
        check(x, proj.half())


@pytest.mark.parametrize("shape", [(33,), (4, 33), (2, 3, 33), (2, 2, 3, 33), (0, 33), (2, 0, 33)])
def test_any_leading_axes(isa: str, shape: tuple[int, ...]) -> None:
    x, proj = randn(*shape), randn(5, 33, seed=1)
    out = project(x, proj)
    assert out.shape == (*shape[:-1], 5)
    check(x, proj)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_spoils_no_other(isa: str, dtype: torch.dtype) -> None:
    x, proj = randn(50, 131, dtype=dtype), randn(33, 131, seed=1).bfloat16()
    expected = project(x, proj)
    x[47, 130] = torch.nan  # the odd last column: beside it nothing may be read
    out = project(x, proj)
    assert out[47].isnan().all()
    assert torch.equal(out[:47], expected[:47])
    assert torch.equal(out[48:], expected[48:])


@pytest.mark.usefixtures("native")
def test_a_projection_in_the_tokens_type_has_the_same_bits(isa: str) -> None:
    """What a capture does: P that is exact in bfloat16 meets bfloat16 tokens in their type."""
    x, proj = randn(50, 131).bfloat16(), randn(33, 131, seed=1).bfloat16()
    assert torch.equal(project(x, proj), project(x, proj.float()))


@pytest.mark.usefixtures("native")
def test_subnormal_values_of_a_projection_count(isa: str) -> None:
    """The CPU's own bfloat16 products take them for zero, so they are multiplied as float32."""
    x, proj = torch.full((5, 40), 2.0**100).bfloat16(), torch.full((3, 40), 2.0**-130)
    for given in (proj, proj.bfloat16()):
        assert torch.equal(project(x, given), torch.full((5, 3), 40 * 2.0**-30))
