"""Several dampings in one scan: each result is that of an Attributor with the damping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_influence import gradients, make_store
from summed_losses import gpt, log, watch

import logra_kernels as logra
from logra_kernels import Run
from logra_kernels.attribution import Attributor, InfluenceResult
from logra_kernels.attribution.reading import Reading
from logra_kernels.curvature import RawCurvature, curvature_of, kinds, preconditioner_of
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.store import Module, Store

SCALES = [0.01, 0.1, 3.0]
ONE_OF_THREE = "sweep: expected damping_scales, dampings or preconditioners, one of the three"


@pytest.fixture(scope="module", params=kinds())
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Nine rows of a GPT with a curvature of each kind, in three shards."""
    model, loss, mask = gpt()
    folder = str(tmp_path_factory.mktemp(request.param))
    run = Run("toy", logra.Config(root_dir=folder, shard_bytes=300))
    watch(run, model, "gpt", 3, True)
    run.setup({"save": "grad", "statistic": request.param})
    log(run, model, loss, mask, 4)
    run.finalize()
    return run.store


def same(got: InfluenceResult, want: InfluenceResult) -> None:
    assert (got.mode, got.query_ids, got.dampings) == (want.mode, want.query_ids, want.dampings)
    assert got.zero_rows == want.zero_rows
    for name in ("scores", "top_scores", "top_rows", "bottom_scores", "bottom_rows"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert got.groups.keys() == want.groups.keys()
    for key, group in got.groups.items():
        same(group, want.groups[key])


@pytest.mark.parametrize("mode", SCAN_MODES)
@pytest.mark.parametrize("k", [None, 4])
def test_each_result_is_that_of_a_scan_of_its_own(store: Store, mode: str, k: int | None) -> None:
    """Equal bits, for scores, top k and groups."""
    queries = torch.from_numpy(store.take(range(2)))
    options: dict[str, Any] = {"mode": mode, "groups": ["h.0", "c_proj"], "query_ids": ["a", "b"]}
    options["row_weights"] = torch.linspace(0, 1, store.num_rows)
    swept = Attributor(store).sweep(queries, damping_scales=SCALES, k=k, **options)
    for scale, got in zip(SCALES, swept, strict=True):
        alone = Attributor(store, damping_scale=scale)
        same(
            got,
            alone.scores(queries, **options) if k is None else alone.top_k(queries, k, **options),
        )
    curvature = curvature_of(store)
    made = [preconditioner_of(store, curvature, damping_scale=scale) for scale in SCALES]
    given = Attributor(store, made[0]).sweep(queries, preconditioners=made, k=k, **options)
    for got, want in zip(given, swept, strict=True):
        same(got, want)
    absolute = Attributor(store).sweep(queries, dampings=[0.5], k=k, **options)
    alone = Attributor(store, damping=0.5)
    same(
        absolute[0],
        alone.scores(queries, **options) if k is None else alone.top_k(queries, k, **options),
    )


@pytest.mark.parametrize("mode", ["dot", "l-relatif"])
@pytest.mark.parametrize("reading", ["mapped", "streamed", "resident"])
def test_the_rows_are_read_once(
    tmp_path: Path, mode: str, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "s", gradients(40), shard_rows=7)
    RawCurvature.rebuild(store).save(store)
    attributor = Attributor(Store.open(store.path), reading=reading)
    fed: list[int] = []
    feed = Reading.feed

    def counted(self: Reading, use: Any, *others: Any) -> None:
        def counting(index: int, start: int, rows: Any) -> None:
            fed.append(rows[0].shape[0])  # the first plane of the block
            use(index, start, rows)

        feed(self, counting, *others)

    monkeypatch.setattr(Reading, "feed", counted)
    seen: list[tuple[int, int]] = []
    results = attributor.sweep(
        gradients(3),
        damping_scales=[*SCALES, "auto"],
        mode=mode,
        progress=lambda *at: seen.append(at),
    )
    assert sum(fed) == 40
    assert seen[-1] == (40, 40)
    monkeypatch.undo()
    auto = Attributor(store, damping_scale="auto").scores(gradients(3), mode)
    same(results[3], auto)


def test_what_a_sweep_refuses(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", gradients(12))
    RawCurvature.rebuild(store).save(store)
    store = Store.open(store.path)
    attributor, queries = Attributor(store), gradients(2)
    with pytest.raises(ValueError, match=ONE_OF_THREE):
        attributor.sweep(queries)
    with pytest.raises(ValueError, match=ONE_OF_THREE):
        attributor.sweep(queries, damping_scales=[0.1], dampings=[1.0])
    with pytest.raises(ValueError, match=ONE_OF_THREE):
        attributor.sweep(queries, damping_scales=[])
    with pytest.raises(ValueError, match="damping_scale: expected a finite number >= 0 or 'auto'"):
        attributor.sweep(queries, damping_scales=[0.1, -1.0])
    with pytest.raises(ValueError, match="k: expected at most 12"):
        attributor.sweep(queries, damping_scales=[0.1], k=13)
    with pytest.raises(ValueError, match=ONE_OF_THREE):
        attributor.sweep(queries, dampings=[0.1], preconditioners=[attributor.preconditioner])
    other = make_store(
        tmp_path / "other", gradients(12), modules=[Module("x", 1, gradients(1).shape[1])]
    )
    with pytest.raises(ValueError, match="curvature: expected the store's modules"):
        attributor.sweep(queries, preconditioners=[Attributor(other, "none").preconditioner])
    for curvature in ("none", attributor.preconditioner):
        with pytest.raises(ValueError, match="sweep: expected an Attributor of a curvature, got"):
            Attributor(store, curvature).sweep(queries, dampings=[0.1])
