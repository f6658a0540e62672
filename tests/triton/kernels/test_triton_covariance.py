import importlib

import pytest
import torch
from bounds import BRAIN, FULL, HALF, assert_near_reference

from logra_kernels.triton import covariance_update_

module = importlib.import_module("logra_kernels.triton.covariance_update")


def check(rows: torch.Tensor, kind: torch.dtype) -> None:
    start = torch.randn(rows.shape[1], rows.shape[1], dtype=kind)
    got = assert_near_reference("covariance_update_", start, rows, terms=rows.shape[0] + 1)
    assert torch.equal(got.triu(1), start.triu(1))


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "size"), [(1, 1), (33, 17), (40, 300)])
def test_equals_reference(dtype: torch.dtype, kind: torch.dtype, count: int, size: int) -> None:
    check(torch.randn(count, size).to(dtype), kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_spans_give_the_same_bits_either_way(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All spans at once, some at a time, in one program a tile, and split into several calls."""
    monkeypatch.setattr(module, "_SPAN", 32)
    rows = torch.randn(150, 20).half()
    start = torch.randn(20, 20, dtype=kind)
    results = []
    for tiles, workspace in ((256, 1 << 30), (256, 2 * 32 * 32 * 4), (0, 1 << 30)):
        monkeypatch.setattr(module, "_ENOUGH_TILES", tiles)
        monkeypatch.setattr(module, "_WORKSPACE_BYTES", workspace)
        cov = start.clone()
        covariance_update_(cov, rows)
        results.append(cov)
    cov = start.clone()
    covariance_update_(cov, rows[:64])
    covariance_update_(cov, rows[64:])
    results.append(cov)
    assert all(torch.equal(result, results[0]) for result in results)
    want = start.double() + (rows.double().T @ rows.double()).tril()
    torch.testing.assert_close(results[0].double(), want, rtol=1e-5, atol=1e-4)


def test_every_tile_of_the_triangle() -> None:
    """15 tiles of 128, most of them off the diagonal."""
    check(torch.randn(3, 600).half(), torch.float32)


def test_strides() -> None:
    rows = torch.randn(60, 90).half()
    check(rows[::2, 7:50], torch.float32)
    check(rows.T, torch.float32)
    cov = torch.zeros(2, 60, 2, 60)[0, :, 1]
    covariance_update_(cov, rows[:, :60])
    torch.testing.assert_close(cov, (rows[:, :60].float().T @ rows[:, :60].float()).tril())


def test_empty() -> None:
    cov = torch.ones(5, 5)
    covariance_update_(cov, torch.ones(0, 5))
    assert torch.equal(cov, torch.ones(5, 5))
    covariance_update_(cov[:0, :0], torch.ones(3, 0))


def test_extremes() -> None:
    cov = torch.zeros(2, 2)
    covariance_update_(cov, torch.tensor([[65504.0, 2.0**-24]] * 2).half())
    assert cov.tolist() == [[2 * 65504.0**2, 0.0], [2 * 65504.0 * 2.0**-24, 2 * 2.0**-48]]


def test_type_of_cov_is_checked() -> None:
    rows = torch.ones(3, 5)
    with pytest.raises(TypeError, match="cov: expected float32 or float64, got float16"):
        covariance_update_(torch.zeros(5, 5).half(), rows)
    with pytest.raises(TypeError, match="rows: expected float16, bfloat16 or float32, got float64"):
        covariance_update_(torch.zeros(5, 5), rows.double())
