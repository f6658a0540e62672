import pytest
import torch
from op_cases import DTYPES, TAILS, assert_within, gamma, randn
from torch import Tensor

from logra_kernels.ops import covariance_update_

COVARIANCES = [torch.float32, torch.float64]


@pytest.mark.parametrize("cov_dtype", COVARIANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(isa: str, dtype: torch.dtype, cov_dtype: torch.dtype) -> None:
    for num_rows, size in [(5, k) for k in TAILS] + [(r, 20) for r in TAILS] + [(300, 130)]:
        rows = randn(num_rows, size, dtype=dtype)
        before = randn(size, size, seed=5).to(cov_dtype)
        cov = before.clone()
        assert covariance_update_(cov, rows) is cov
        wide = rows.double()
        exact = before.double() + wide.T @ wide
        bound = (before.double().abs() + wide.abs().T @ wide.abs()) * gamma(num_rows + 1)
        if cov_dtype == torch.float64 and isa != "reference":
            # float64's unit roundoff over float32's; the reference sums in float32
            bound *= 2.0**-29
        assert_within(cov.tril(), exact.tril(), bound.tril())
        assert torch.equal(cov.triu(1), before.triu(1))


@pytest.mark.parametrize("cov_dtype", COVARIANCES)
@pytest.mark.usefixtures("native")
def test_splits_do_not_change_bits(isa: str, cov_dtype: torch.dtype) -> None:
    rows = randn(600, 150)

    def run(*cuts: int) -> Tensor:
        cov = torch.zeros(150, 150, dtype=cov_dtype)
        for a, b in zip((0, *cuts), (*cuts, 600), strict=True):
            covariance_update_(cov, rows[a:b])
        return cov

    assert torch.equal(run(1, 7, 300), run())


def test_no_row_changes_nothing(isa: str) -> None:
    cov = randn(4, 4)
    assert torch.equal(covariance_update_(cov.clone(), randn(0, 4)), cov)


def test_float64_rows(isa: str) -> None:
    rows = randn(30, 9).double()
    cov = covariance_update_(torch.zeros(9, 9, dtype=torch.float64), rows)
    torch.testing.assert_close(cov, (rows.T @ rows).tril(), rtol=1e-14, atol=1e-14)
