"""From gradients through the store to influence, against Eq. 3 in dense float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_influence import (
    MODULES,
    assert_influence,
    dense,
    gradients,
    make_store,
    unpacked,
)
from torch import Tensor, nn
from toy_models import autograd_rows, causal_loss, make_layers, ragged_batch, tiny_gpt2

import logra_kernels as logra
from logra_kernels.attribution import Attributor
from logra_kernels.capture.layers import Layer
from logra_kernels.curvature import RawCurvature
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.projection import stored_projections
from logra_kernels.store import Store

QUERIES = gradients(6, seed=11)
COUNT = 333
Batch = tuple[Tensor, Tensor]  # tokens, mask


@pytest.mark.parametrize("mode", SCAN_MODES)
@pytest.mark.parametrize("shard_rows", [1, 17, 1000])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_influence_is_eq_3_for_any_shard_size(
    tmp_path: Path, mode: str, shard_rows: int, dtype: str
) -> None:
    count = 30 if shard_rows == 1 else COUNT
    store = make_store(tmp_path / "s", gradients(count), dtype, shard_rows)
    RawCurvature.rebuild(store).save(store)
    scores = Attributor(store).scores(QUERIES, mode).scores
    assert_influence(scores, dense(QUERIES, unpacked(store)), mode, dtype=dtype)


@pytest.mark.parametrize("kwargs", [{"damping_scale": 1e-3}, {"damping": 1e-2}, {"damping": 5.0}])
@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
def test_influence_is_eq_3_for_any_damping(
    tmp_path: Path, kwargs: dict[str, Any], solver: str
) -> None:
    store = make_store(tmp_path / "s", gradients(COUNT), "float32", 100)
    attributor = Attributor(store, RawCurvature.rebuild(store), solver=solver, **kwargs)
    truth = dense(QUERIES, unpacked(store), **{"damping_scale": None, **kwargs})
    for mode in ("dot", "l-relatif"):
        assert_influence(attributor.scores(QUERIES, mode).scores, truth, mode)


def test_float16_against_the_gradients_themselves(tmp_path: Path) -> None:
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


def gpt2_batches() -> tuple[list[Batch], Batch]:
    """Ragged batches, padded on the right and on the left: 46 examples, then the queries' batch."""
    logged = [ragged_batch(61, [12, 3, 7, 9, 5], "right", seed) for seed in range(8)]
    logged.append(ragged_batch(61, [4, 10, 6, 2, 11, 8], "left", 50))
    return logged, ragged_batch(61, [9, 4, 6], "right", 60)


def gpt2_truth(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> Tensor:
    """Every example's projected gradients by autograd, [N, D] float64."""
    losses = [
        partial(causal_loss, model, ids[n : n + 1], mask[n : n + 1])
        for ids, mask in batches
        for n in range(len(ids))
    ]
    return autograd_rows(model, layers, losses)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_tiny_gpt2_from_text_to_influence(tmp_path: Path, dtype: str) -> None:
    """A run over ragged batches, then its influence on a query batch; truth is autograd's loop."""
    model = tiny_gpt2(torch.float64)
    run = logra.init(project="gpt2", root_dir=str(tmp_path), dtype=dtype, seed=5)
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=3, init="normal")
    run.setup({"log": "grad", "save": "grad", "statistic": {"grad": logra.Covariance}})
    batches, asked = gpt2_batches()
    first = 0
    for ids, mask in batches:
        with run(data_id=range(first, first + len(ids)), mask=mask):
            causal_loss(model, ids, mask).backward()
        first += len(ids)
    run.finalize()

    again = logra.init(project="gpt2", root_dir=str(tmp_path))
    again.watch(model, name_filter=["mlp"])
    again.initialize_from_log()
    ids, mask = asked
    with again(data_id=["q0", "q1", "q2"], mask=mask):
        causal_loss(model, ids, mask).backward()

    layers = make_layers(model, [module.name for module in again.modules])
    projections = stored_projections(Store.open(tmp_path / "gpt2"))
    for layer in layers:
        layer.projection = projections[layer.name]
    sizes = [module.size for module in again.modules]
    held = unpacked(Store.open(tmp_path / "gpt2"))
    train, queries = gpt2_truth(model, layers, batches), gpt2_truth(model, layers, [asked])
    # fp16 rows lose 2**-11 of their largest elements at the most; int8 rows half of their scale,
    # 1/254 of the largest element divided by its module's power of two, in each of D elements
    lost = {"float16": 2.0**-11, "float32": 2.0**-23, "int8": 2.0**-5}[dtype]
    assert (held - train).norm() <= lost * train.norm()
    for mode in ("dot", "l-relatif"):
        result = again.compute_influence_all(again.get_log(), mode=mode)
        assert result["src_ids"] == ["q0", "q1", "q2"]
        assert result["tgt_ids"] == [str(i) for i in range(46)]
        # the queries are autograd's too: a float32 copy is 2**-24 away
        assert_influence(result.scores, dense(queries, held, sizes), mode, dtype=dtype)
        if dtype == "float32":
            # from autograd alone: H's rows are rounded to 2**-24, which (H + lambda I)^-1, of
            # condition K / 0.1 = 90 at the most, makes 1e-5
            assert_influence(result.scores, dense(queries, train, sizes), mode)
        top = again.compute_influence_all(again.get_log(), mode=mode, top_k=5)
        best = result.scores.sort(dim=1, descending=True, stable=True)
        assert torch.equal(top.top_rows, best.indices[:, :5])
        assert torch.equal(top.top_scores, best.values[:, :5])
