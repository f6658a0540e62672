"""From gradients through the store to influence, against Eq. 3 in dense float64."""

from __future__ import annotations

import pytest
import torch
from dense_influence import (
    MODULES,
    Dense,
    dense,
    gradients,
    make_store,
    unpacked,
)
from toy_models import autograd_rows, causal_loss, make_layers, ragged_batch, tiny_gpt2

from logra_kernels.attribution import MODES, Attributor
from logra_kernels.capture import Capture
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Module

QUERIES = gradients(6, seed=11)
COUNT = 333


def assert_influence(result, truth: Dense, mode: str, order=None):
    """|error| <= 1e-5 |u||g| over the mode's normaliser, u the preconditioned query.

    The scan adds D = 44 float32 products of a rounded u and an exact g: D 2**-24 |u||g| = 3e-6
    |u||g| at the most. The normaliser, a norm of K <= 25 sums of K products, adds its relative
    error, 2e-6 for |W||g| = |W g|.
    """
    want, allowed = truth.scores(mode), 1e-5 * truth.allowance(mode)
    if order is not None:
        want, allowed = want[:, order], allowed[:, order]
    assert ((result.scores.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shard_rows", [1, 17, 1000])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_influence_is_eq_3_for_any_shard_size(tmp_path, mode, shard_rows, dtype):
    count = 30 if shard_rows == 1 else COUNT
    store = make_store(tmp_path / "s", gradients(count), dtype, shard_rows)
    RawCurvature.rebuild(store).save(store)
    result = Attributor(store).scores(QUERIES, mode)
    assert_influence(result, dense(QUERIES, unpacked(store)), mode)


@pytest.mark.parametrize("mode", ["dot", "l-relatif"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_influence_does_not_depend_on_the_order_of_the_rows(tmp_path, mode, dtype):
    rows = gradients(COUNT)
    first = make_store(tmp_path / "first", rows, dtype, 50)
    truth = dense(QUERIES, unpacked(first))
    for seed in range(3):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed))
        store = make_store(tmp_path / str(seed), rows[order], dtype, 50, ids=order.tolist())
        result = Attributor(store, RawCurvature.rebuild(store)).scores(QUERIES, mode)
        assert result["tgt_ids"] == [str(i) for i in order.tolist()]
        assert_influence(result, truth, mode, order)


@pytest.mark.parametrize("kwargs", [{"damping_scale": 1e-3}, {"damping": 1e-2}, {"damping": 5.0}])
@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
def test_influence_is_eq_3_for_any_damping(tmp_path, kwargs, solver):
    store = make_store(tmp_path / "s", gradients(COUNT), "float32", 100)
    attributor = Attributor(store, RawCurvature.rebuild(store), solver=solver, **kwargs)
    truth = dense(QUERIES, unpacked(store), **{"damping_scale": None, **kwargs})
    for mode in ("dot", "l-relatif"):
        assert_influence(attributor.scores(QUERIES, mode), truth, mode)


def test_float16_against_the_gradients_themselves(tmp_path):
    """What packing costs, with H held fixed.

    An element loses 2**-11 of itself, or 2**-25 of the unit its row is packed in, whose largest
    element is above 2**14: |dg| <= 2**-11 |g| + 2**-39 sqrt(D) max|g|, module exponents aside,
    which differ by less than 2**8 here. The score loses |u||dg|, and the norm |W g| at most
    |W||dg|.
    """
    rows = gradients(COUNT)
    curvature = RawCurvature(MODULES)
    curvature.update(rows)
    store = make_store(tmp_path / "s", rows, "float16", 50)
    attributor, truth = Attributor(store, curvature), dense(QUERIES, rows)
    norm = rows.double().norm(dim=1)
    lost = (2.0**-11 + 2.0**-31 * len(rows[0]) ** 0.5) * norm  # |dg|, [N]
    query = truth.preconditioned.norm(dim=1)[:, None]
    dot = attributor.scores(QUERIES, "dot").scores
    rounding = 1e-5 * truth.allowance("dot")
    assert ((dot - truth.dot).abs() <= query * lost + rounding).all()
    # the bound is tight enough to notice a tenth of it missing
    assert (dot - truth.dot).abs().max() > 1e-2 * (query * lost).min()
    spread = max(float(torch.linalg.matrix_norm(inverse, 2)) for inverse in truth.inverses) ** 0.5
    relative = spread * lost / truth.sigma.sqrt()  # of the norm, [N]
    relatif = attributor.scores(QUERIES, "l-relatif").scores
    allowed = (query * lost + rounding) / truth.sigma.sqrt() + truth.scores(
        "l-relatif"
    ).abs() * 2 * relative
    assert (relative < 0.1).all()
    assert ((relatif - truth.scores("l-relatif")).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tiny_gpt2_from_text_to_influence(tmp_path, dtype):
    """Ragged masks, hooks, projection, store, curvature, scores; truth is a loop of autograd."""
    model = tiny_gpt2(torch.float64)
    layers = make_layers(model, ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"], rank=3)
    modules = [Module(layer.name, 3, 3) for layer in layers]
    batches = [ragged_batch(61, [12, 3, 7, 9, 5], side, s) for s in range(8) for side in ("right",)]
    batches += [ragged_batch(61, [4, 10, 6], "left", 50)]
    logged, truth = [], []
    for ids, mask in batches:
        with Capture(model, layers, len(ids), mask) as capture:
            causal_loss(model, ids, mask).backward()
        logged.append(capture.rows())
        losses = [
            lambda i=ids[n : n + 1], m=mask[n : n + 1]: causal_loss(model, i, m)
            for n in range(len(ids))
        ]
        truth.append(autograd_rows(model, layers, losses))
    rows, truth_rows = torch.cat(logged).float(), torch.cat(truth)
    train, query = slice(0, 40), slice(40, 43)
    store = make_store(tmp_path / "s", rows[train], dtype, shard_rows=16, modules=modules)
    RawCurvature.rebuild(store).save(store)
    attributor = Attributor(store)
    sizes = [module.size for module in modules]
    for mode in ("dot", "l-relatif"):
        result = attributor.scores(rows[query], mode)
        assert_influence(result, dense(rows[query], unpacked(store), sizes), mode)
        if dtype == "float32":
            # from the loop's gradients: rows are rounded to 2**-24, which (H + lambda I)^-1, of
            # condition K / 0.1 = 90 at the most, makes 1e-5
            assert_influence(result, dense(truth_rows[query], truth_rows[train], sizes), mode)
