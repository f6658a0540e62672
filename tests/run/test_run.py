"""Run in this package's own words, without LogIX's; and the recorder it shares with lm/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_run import COUNT, RAW, Data, log_all, loss_of, refuse, refused

from logra_kernels import Config, Covariance, Run, Store, curvature
from logra_kernels.curvature import RawCurvature, register_curvature
from logra_kernels.projection import ProjectionSpec
from logra_kernels.run import FinitePolicy, LoggedRows, Recorder, Setup, WatchedLayers
from logra_kernels.store import DuplicateIdError


@pytest.fixture
def run(tmp_path: Path, model: nn.Module) -> Run:
    run = Run("toy", Config(root_dir=str(tmp_path)))
    run.watch(model)
    run.add_lora(rank=3)
    return run


def test_from_logging_to_influence(run: Run, model: nn.Module, data: Data) -> None:
    run.setup(RAW)
    log_all(run, model, data)
    run.finalize()
    run.eval()
    with run(data_id=["query"]) as inside:
        loss_of(model, data, slice(1)).backward()
        ids, rows = run.last_rows()
        assert torch.equal(rows, inside.rows())
    assert run.last_rows()[0] == ids == ["query"]
    assert torch.equal(run.last_rows()[1], rows)
    result = run.attributor().top_k(rows, 3)
    assert result.mode == "l-relatif"
    assert result.top_ids[0][0] == "row0"  # an example is most influential for itself
    solved = run.preconditioner(damping=0.5).precondition(rows)
    assert torch.equal(solved, run.curvature.damped(damping=0.5).precondition(rows))
    assert torch.equal(run.preconditioner(precondition=False).precondition(rows), rows)
    assert run.layout.dim == run.store.dim == 27
    for name in ("get_log", "influence", "compute_influence_all", "log"):
        assert not hasattr(run, name), "LogIX's words are LogixRun's"


def test_modes_by_default(tmp_path: Path) -> None:
    """A matrix is added up, a ranking is read; what the configuration says holds for both."""
    assert (Config().mode_for(None), Config().mode_for(5)) == ("dot", "l-relatif")
    assert Config(mode="l2").mode_for(None) == Config(mode="l2").mode_for(5) == "l2"


def recorder_of(folder: Path, model: nn.Module, setup: Setup) -> Recorder:
    watched = WatchedLayers.matching(model)
    watched.project(ProjectionSpec(rank=3))
    return Recorder(folder / "store", watched, {}, setup, dtype="float16")


def logged(*ids: str) -> LoggedRows:
    generator = torch.Generator().manual_seed(len(ids))
    return LoggedRows(list(ids), torch.randn(len(ids), 27, generator=generator))


def test_a_check_changes_nothing(tmp_path: Path, model: nn.Module) -> None:
    recorder = recorder_of(tmp_path, model, Setup(save=True))
    recorder.check(["a"], Setup(save=True, curvature="raw"))
    assert recorder.curvature is None
    recorder.add(logged("a", "b"), Setup(save=True))
    with refuse("statistic: rows were saved before it was asked for", RuntimeError):
        recorder.check(["c"], Setup(curvature="raw"))
    with refuse("data_id: expected new ids, got 'b', which was logged already", DuplicateIdError):
        recorder.add(logged("b"), Setup(save=True))
    assert recorder.finish().ids.to_pylist() == ["a", "b"]


def test_rows_may_be_saved_after_some_were_only_accumulated(
    tmp_path: Path, model: nn.Module
) -> None:
    """The exponents come from the first row, whether it was written or not."""
    both = Setup(save=True, curvature="raw")
    recorder = recorder_of(tmp_path, model, Setup(curvature="raw"))
    recorder.add(logged("a", "b"), Setup(curvature="raw"))
    recorder.add(logged("c"), both)
    store = recorder.finish()
    assert store.ids.to_pylist() == ["c"]
    assert RawCurvature.load(store).count == 3
    assert torch.allclose(torch.from_numpy(store.take([0])), logged("c").rows, rtol=2**-10)


def test_a_second_kind_of_curvature_is_logged_by_its_name(
    run: Run, model: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = curvature.base._KINDS
    monkeypatch.setattr(curvature.base, "_KINDS", dict(kinds))

    @register_curvature
    class Doubled(RawCurvature):
        kind = "doubled"

        def update_finite(self, rows: Tensor) -> None:
            super().update_finite(rows * 2)

    with refuse("setup: expected one curvature, got doubled and raw"):
        run.setup({"statistic": {"grad": [Covariance, "doubled"]}})
    run.setup({"save": "grad", "statistic": "doubled"})
    log_all(run, model, data)
    run.finalize()
    store = Store.open(run.path)
    assert list(store.curvatures) == ["doubled"]
    raw = RawCurvature.rebuild(store)
    assert isinstance(run.curvature, Doubled)
    for name, covariance in run.curvature.covariances.items():
        assert torch.allclose(covariance, raw.covariances[name] * 4)


@pytest.mark.parametrize("count", [1, 9])
def test_examples_that_are_not_finite(run: Run, count: int) -> None:
    rows = torch.ones(COUNT, run.layout.dim)
    rows[:count, 10] = torch.inf
    batch = LoggedRows([str(n) for n in range(COUNT)], rows)
    shown = "0" if count == 1 else "0, 1, 2, 3, 4, 5, 6, 7, …"
    message = f"gradients: NaN or infinite in module second, for data_id {shown}"
    with refuse(f"{message}; nothing of this batch was stored"):
        FinitePolicy("raise").check(batch, run.layout)
    policy = FinitePolicy("skip")
    with pytest.warns(UserWarning, match=f"{message}: left out, as all later ones will be"):
        kept = policy.check(batch, run.layout)
    assert kept.ids == batch.ids[count:]
    assert kept.rows.isfinite().all()
    assert policy.skipped == batch.ids[:count]
    refused("on_nonfinite: expected one of raise, skip, got 'drop'", FinitePolicy, "drop")
