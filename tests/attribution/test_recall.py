"""The estimate of a recall, on scores whose errors are known."""

from __future__ import annotations

import pytest
import torch

from logra_kernels.attribution.recall import CoarseEnd, ErrorModel, poisson_interval

QUERIES, ROWS, LISTED, K = 40, 5_000, 200, 10


def scores(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coarse and exact scores [Q, N], and sizes [N] over two decades."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.pow(10, 2 * torch.rand(ROWS, generator=generator, dtype=torch.float64))
    coarse = sizes * torch.randn(QUERIES, ROWS, generator=generator, dtype=torch.float64)
    noise = torch.randn(QUERIES, ROWS, generator=generator, dtype=torch.float64)
    return coarse, 1.2 * coarse + 0.3 * sizes * noise, sizes


def end_of(coarse: torch.Tensor, sizes: torch.Tensor, known: int) -> CoarseEnd:
    """The list of the first rows, the first `known` of which were scored exactly."""
    best = coarse.topk(LISTED, dim=1)
    rows = torch.arange(0, ROWS, 5)
    seen = (torch.arange(LISTED) < known).expand(QUERIES, -1)
    sample = coarse[:, rows], sizes[rows], torch.zeros(len(rows), dtype=torch.bool)
    return CoarseEnd.of((best.values, sizes[best.indices], seen), sample, ROWS)


def test_the_fit_finds_slope_and_spread() -> None:
    coarse, exact, sizes = scores()
    model = ErrorModel.fit(coarse, exact, sizes.expand(coarse.shape))
    assert torch.allclose(model.slope, torch.tensor(1.2, dtype=torch.float64), atol=0.03)
    assert torch.allclose(model.spread, torch.tensor(0.3, dtype=torch.float64), rtol=0.06)
    low, high = model.stretches()
    assert 0.95 < low < 1 < high < 1.05


@pytest.mark.parametrize("candidates", [10, 20, 60])
def test_the_rows_that_are_lost_are_counted(candidates: int) -> None:
    coarse, exact, sizes = scores()
    model = ErrorModel.fit(coarse, exact, sizes.expand(coarse.shape))
    rows = coarse.topk(candidates, dim=1).indices
    kept = exact.gather(1, rows).topk(K, dim=1).values
    lost = int((kept < exact.topk(K, dim=1).values[:, -1:]).sum())
    expected = end_of(coarse, sizes, candidates).lost(model, kept)
    few, many = poisson_interval(expected, expected)
    assert few <= lost <= many


def test_rows_behind_the_list_are_those_of_the_sample() -> None:
    coarse, exact, sizes = scores()
    model = ErrorModel.fit(coarse, exact, sizes.expand(coarse.shape))
    last = exact.topk(400, dim=1).values[:, -1:]
    missed = end_of(coarse, sizes, 0).missed(model, last)
    assert missed.shape == (QUERIES, LISTED + 1)
    assert (missed.diff(dim=1) <= 1e-9).all()
    rest = coarse.topk(ROWS, dim=1).indices[:, LISTED:]
    true = (exact.gather(1, rest) > last).sum(dim=1).double()
    assert missed[:, -1].mean() == pytest.approx(float(true.mean()), rel=0.1)


def test_coarse_scores_that_say_nothing_give_no_confidence() -> None:
    coarse, exact, sizes = scores()
    model = ErrorModel.fit(-coarse, exact, sizes.expand(coarse.shape))
    end = end_of(coarse, sizes, 0)
    assert end.missed(model, exact[:, :1])[0, 0] == pytest.approx(ROWS)


def test_poisson_interval() -> None:
    assert poisson_interval(0.0, 0.0) == (0.0, 0.0)
    assert poisson_interval(10.0, 10.0) == (4.0, 17.0)  # of the usual tables
    low, high = poisson_interval(1000.0, 1000.0)
    assert low == pytest.approx(938, abs=1)
    assert high == pytest.approx(1062, abs=1)
