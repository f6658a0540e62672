import pytest
import torch
from op_cases import DTYPES, TAILS, assert_within, gamma, randn
from torch import Tensor

from logra_kernels.ops import self_influence

pytestmark = pytest.mark.usefixtures("poison")


def check(rows: Tensor, factor: Tensor) -> None:
    """w = W g is off by d = gamma_K |W||g|, so w^2 by 2 |w| d + d^2; then M squares are summed."""
    wide, left = rows.double(), factor.double()
    w = wide @ left.T
    off = gamma(rows.shape[1] + 2) * (wide.abs() @ left.abs().T)
    bound = (2 * w.abs() * off + off**2).sum(1)
    exact = w.square().sum(1)
    bound = bound + gamma(factor.shape[0] + 3) * (exact + bound)
    assert_within(self_influence(rows, factor), exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(isa: str, dtype: torch.dtype) -> None:
    sizes = [(5, 6, k) for k in TAILS] + [(r, 6, 20) for r in TAILS] + [(5, m, 20) for m in TAILS]
    for num_rows, m, size in [*sizes, (50, 130, 130), (3, 70, 1100), (210, 9, 513)]:
        rows, factor = randn(num_rows, size, dtype=dtype), randn(m, size, seed=1)
        check(rows, factor)
        check(rows, factor.tril())
        check(rows, factor.triu())
    check(randn(20, 33, dtype=dtype), torch.zeros(12, 33))


def test_zero_rows_and_bad_values(isa: str) -> None:
    rows = randn(5, 20).half()
    rows[1], rows[2, 19], rows[3, 0] = 0, torch.nan, torch.inf
    out = self_influence(rows, randn(20, 20, seed=1).tril())
    assert out[1] == 0
    assert out[2].isnan()
    assert not out[3].isfinite()
    assert out[[0, 4]].isfinite().all()
