"""Weights of rows in a scan, and the ratio of norms from which a filter is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_influence import gradients, make_store, unpacked

from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.store import Store

QUERIES = gradients(3, seed=7)


@pytest.mark.parametrize("mode", SCAN_MODES)
@pytest.mark.parametrize("curvature", ["none", "raw"])
def test_weights_multiply_scores(store: Store, mode: str, curvature: str) -> None:
    kept = RawCurvature.rebuild(store) if curvature == "raw" else "none"
    attributor = Attributor(store, kept, block_rows=16)
    # Powers of two: no product is rounded.
    weights = 2.0 ** -(torch.arange(store.num_rows) % 4)
    weights[5::7] = 0.0
    plain = attributor.scores(QUERIES, mode)
    weighted = attributor.scores(QUERIES, mode, row_weights=weights)
    assert torch.equal(weighted.scores, plain.scores * weights)
    assert weighted.zero_rows == plain.zero_rows
    top = attributor.top_k(QUERIES, 10, mode, row_weights=weights)
    best = weighted.scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(top.top_rows, best.indices[:, :10])
    assert torch.equal(top.top_scores, best.values[:, :10])


def test_a_mask_of_rows_is_a_weight(store: Store) -> None:
    attributor = Attributor(store, "none")
    keep = torch.arange(store.num_rows) % 2 == 0
    top = attributor.top_k(QUERIES, 5, row_weights=keep)
    assert (top.top_rows % 2 == 0).all()


def test_concentration_is_the_ratio_of_the_norms_of_the_rows_as_stored(tmp_path: Path) -> None:
    rows = gradients(40)
    rows[3] = 0.0
    rows[4] = 0.0
    rows[4, 7] = -2.5
    store = make_store(tmp_path / "s", rows, shard_rows=16)
    stored = unpacked(store).double()
    wanted = stored.norm(dim=1) / stored.abs().sum(dim=1)
    wanted[3] = 0.0
    found = Attributor(store, "none", block_rows=16).concentration()
    # Sums of some hundred float64 numbers, in another order.
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
    assert found[4] == 1.0


def test_wrong_weights_are_refused(store: Store) -> None:
    attributor = Attributor(store, "none")
    with pytest.raises(ValueError, match=rf"row_weights: expected \[N={store.num_rows}\], got"):
        attributor.scores(QUERIES, row_weights=torch.ones(store.num_rows + 1))
    for value in (-0.5, 1.5, float("nan")):
        weights = torch.full((store.num_rows,), value)
        with pytest.raises(ValueError, match="row_weights: expected numbers from 0 to 1"):
            attributor.top_k(QUERIES, 2, row_weights=weights)
