"""LogIX's names, logs and calls, and the influence that they give."""

from __future__ import annotations

import builtins
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_influence import dense
from torch import nn
from toy_models import autograd_rows, make_layers
from toy_run import (
    COUNT,
    RAW,
    Data,
    finished,
    log_all,
    log_queries,
    loss_of,
    make_run,
    refuse,
    refused,
)

import logra_kernels as logix
from logra_kernels import Covariance, Store


def test_get_log(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = make_run(tmp_path, model)
    with refuse("nothing was logged yet; run a pass inside `with run(...)`", RuntimeError):
        run.get_log()
    with run(data_id=torch.tensor([7, 9])) as capture:
        loss_of(model, data, slice(2)).backward()
    ids, log = run.get_log()
    assert ids == ["7", "9"]
    assert list(log) == ["first", "second", "head"]
    assert log["first"]["grad"].shape == (2, 3, 3)
    for name, gradient in capture.gradients().items():
        assert torch.equal(log[name]["grad"], gradient)
    run.get_log(copy=True)[1]["head"]["grad"].zero_()
    assert torch.equal(run.get_log()[1]["head"]["grad"], capture.gradients()["head"])
    assert not (tmp_path / "toy").exists()  # nothing was to be saved


def test_get_log_inside_a_pass_is_that_pass(tmp_path: Path, model: nn.Module, data: Data) -> None:
    """LogIX's examples take the log inside the `with`; an older batch's would be a wrong answer."""
    run = make_run(tmp_path, model)
    with run(data_id=["a"]):
        loss_of(model, data, slice(1)).backward()
    with run(data_id=["b", "c"]) as inside:
        with refuse("no gradient reached a watched module: call loss.backward()", RuntimeError):
            run.get_log()
        loss_of(model, data, slice(1, 3)).backward()
        logs = [run.get_log(), inside.get_log()]
        assert torch.equal(inside.rows(), inside.capture.rows())
    logs.append(run.get_log())
    for ids, parts in logs:
        assert ids == ["b", "c"]
        for name, part in inside.gradients().items():
            assert torch.equal(parts[name]["grad"], part)
    with pytest.raises(ZeroDivisionError), run(data_id=["d"]):
        raise ZeroDivisionError
    with refuse("nothing was logged yet; run a pass inside `with run(...)`", RuntimeError):
        run.get_log()


@pytest.mark.parametrize("shard_rows", [None, 1, 5])
@pytest.mark.parametrize("size", [12, 5])
def test_influence_equals_the_dense_computation(
    tmp_path: Path, model: nn.Module, data: Data, shard_rows: int | None, size: int
) -> None:
    """From gradients of a batch-of-one loop, through the store, in any order and shard size."""
    model = model.double()
    data = (data[0].double(), data[1])
    layers = make_layers(model, rank=3)
    singles = [partial(loss_of, model, data, slice(n, n + 1)) for n in range(COUNT)]
    rows = autograd_rows(model, layers, singles)  # [N, D]
    sizes = [layer.ko * layer.ki for layer in layers]
    truth = dense(rows[:3], rows, sizes)

    shard_bytes = None if shard_rows is None else shard_rows * 4 * rows.shape[1]
    run = make_run(tmp_path, model, dtype="float32", shard_bytes=shard_bytes)
    run.setup(RAW)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2)).tolist()
    log_all(run, model, data, size, order)
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert len(store.shards) == {None: 1, 1: 12, 5: 3}[shard_rows]

    reader = make_run(tmp_path, model, rank=None)
    reader.initialize_from_log()
    log_queries(reader, model, data, slice(3))
    for mode in ("dot", "l-relatif"):
        want = truth.scores(mode)
        for loader in (None, reader.build_log_dataloader(batch_size=4)):
            result = reader.compute_influence_all(reader.get_log(), loader, mode=mode)
            got = torch.empty(3, COUNT, dtype=torch.float64)
            got[:, order] = result["influence"].double()
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
            assert result["src_ids"] == ["query0", "query1", "query2"]
            assert result["tgt_ids"] == [f"row{n}" for n in order]
    own = reader.compute_self_influence()
    assert own["src_ids"] == ["query0", "query1", "query2"]
    assert torch.allclose(own["influence"], truth.sigma[:3], rtol=1e-5)
    assert torch.allclose(
        reader.attributor().self_influence()[torch.tensor(order).argsort()], truth.sigma, rtol=1e-5
    )


def test_top_k_and_groups(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = finished(tmp_path, model, data)
    log_queries(run, model, data, slice(2))
    full = run.compute_influence_all(mode="l-relatif", influence_groups=["first", "e"])
    assert list(full["influence"]) == ["total", "first", "e"]
    top = run.compute_influence_all(mode="l-relatif", top_k=4)
    order = full["influence"]["total"].argsort(dim=1, descending=True)
    assert top["tgt_ids"] == [[f"row{n}" for n in line] for line in order[:, :4].tolist()]
    assert torch.equal(top["influence"], full["influence"]["total"].gather(1, order[:, :4]))
    own = run.compute_self_influence(influence_groups=["first", "second", "head"])["influence"]
    assert torch.allclose(own["total"], own["first"] + own["second"] + own["head"])
    with refuse("k: expected at most 12, the rows in the store, got 13"):
        run.compute_influence_all(top_k=13)
    refused("mode: expected one of dot", run.compute_influence_all, mode="manhattan")
    with refuse("hessian: expected auto or the store's, raw, got 'kfac'"):
        run.compute_influence_all(hessian="kfac")
    with refuse("top_k: only over the store itself"):
        run.compute_influence_all(loader=[run.get_log()], top_k=1)


def test_damping_goes_in_and_the_result_comes_out(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = finished(tmp_path, model, data, dtype="float32", damping_scale=0.5)
    log_queries(run, model, data, slice(2))
    rows = torch.from_numpy(Store.open(tmp_path / "toy").take(range(COUNT))).double()
    sizes = [9, 9, 9]
    queries = torch.cat([g["grad"].flatten(1) for g in run.get_log()[1].values()], 1).double()
    for scale in (0.5, 3.0, 1e-3, 0.5):
        want = dense(queries, rows, sizes, scale).dot
        asked = None if scale == 0.5 else scale
        got = run.compute_influence_all(damping_scale=asked)["influence"]
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()  # 1e-3: worse conditioned
    run.config = replace(run.config, damping_scale="auto")  # 9 columns of each module, 12 rows
    want = dense(queries, rows, sizes, 0.1 + 9 / COUNT).dot
    for got in (
        run.compute_influence_all()["influence"],
        run.compute_influence_all(damping_scale="auto")["influence"],
    ):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    absolute = run.compute_influence_all(damping=1e9)["influence"].double()
    plain = run.compute_influence_all(precondition=False)["influence"].double()
    assert torch.allclose(plain, queries @ rows.T, rtol=1e-5, atol=1e-5)
    assert torch.allclose(absolute * 1e9, plain, rtol=1e-4, atol=1e-4 * plain.abs().max())
    refused("damping", run.compute_influence_all, damping=0.1, damping_scale=0.1)


def test_logs_in_memory_and_foreign_loaders(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = finished(tmp_path, model, data)
    log_queries(run, model, data, slice(2))
    source = run.get_log()
    dataset = run.build_log_dataset()
    assert len(dataset) == COUNT
    name, log = dataset[3]
    assert name == "row3"
    assert log["head"]["grad"].shape == (3, 3)
    (batch, *rest) = list(run.build_log_dataloader(batch_size=COUNT))
    assert not rest
    (flat_ids, flat), = list(run.build_log_dataloader(batch_size=COUNT, flatten=True))  # fmt: skip
    assert flat.shape == (COUNT, 27)
    assert flat_ids == batch[0]
    with pytest.warns(UserWarning, match="'cosine' is LogIX's name for l-RelatIF"):
        want = run.compute_influence_all(source, mode="cosine")
    assert want.mode == "l-relatif"
    shuffled = torch.utils.data.DataLoader(
        dataset, batch_size=5, shuffle=True, collate_fn=run.build_log_dataloader().collate_fn,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for got in (
        run.compute_influence(source, batch, mode="l-relatif"),
        run.compute_influence(source, (flat_ids, flat), mode="l-relatif"),
        run.compute_influence_all(source, shuffled, mode="l-relatif"),
        run.compute_influence_all(source, [batch], mode="l-relatif"),
    ):
        place = {name: n for n, name in enumerate(got["tgt_ids"])}
        order = [place[f"row{n}"] for n in range(COUNT)]
        assert torch.allclose(got["influence"][:, order], want["influence"], rtol=1e-4, atol=1e-4)
    with refuse("src_log: module head is missing"):
        run.compute_influence(
            (source[0], {k: v for k, v in source[1].items() if k != "head"}), batch
        )
    with refuse("tgt_log: module extra is not one of the store's"):
        run.compute_influence(source, (batch[0], {**batch[1], "extra": batch[1]["head"]}))
    with refuse("src_log: expected (ids, {module: {'grad': tensor}}), got str"):
        run.compute_influence_all("log")


def test_covariance_state(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = finished(tmp_path, model, data)
    rows = torch.from_numpy(Store.open(tmp_path / "toy").take(range(COUNT))).double()
    state = run.get_covariance_state()
    for name, part in zip(["first", "second", "head"], rows.split(9, 1), strict=True):
        want = part.T @ part / COUNT
        assert torch.allclose(state[name]["grad"], want, rtol=1e-12, atol=1e-14 * want.max())


def test_curvature_is_computed_from_the_rows_where_it_was_not_asked_for(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = make_run(tmp_path, model)
    run.setup({"save": "grad"})
    log_all(run, model, data)
    run.finalize()
    log_queries(run, model, data, slice(2))
    plain = run.compute_influence_all(precondition=False)
    assert plain["influence"].shape == (2, COUNT)
    with pytest.warns(UserWarning, match="holds no curvature of its 12 rows"):
        run.compute_influence_all()
    full = finished(tmp_path / "full", model, data)
    assert full.get_covariance_state().keys() == run.get_covariance_state().keys()
    assert Store.open(tmp_path / "toy").curvatures["raw"]["rows"] == COUNT


def test_functions_of_the_module_are_those_of_the_last_run(
    tmp_path: Path, model: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LogIX's examples call logix.watch, logix.setup, …."""
    run = logix.init("toy", root_dir=str(tmp_path))
    logix.watch(model)
    logix.add_lora(rank=3)
    logix.setup(RAW)
    log_all(run, model, data)
    logix.finalize()
    logix.eval()
    with run(data_id=["query"]):
        loss_of(model, data, slice(1)).backward()
    result = run.compute_influence_all(logix.get_log(), logix.build_log_dataloader())
    assert result.scores.shape == (1, COUNT)
    logix.init("toy", root_dir=str(tmp_path))
    logix.initialize_from_log()
    logs: Any = logix.build_log_dataloader().dataset
    assert len(logs) == COUNT
    refused("log: the model is hooked only inside", logix.log, ["a"], error=RuntimeError)
    monkeypatch.setattr("logra_kernels.integrations.logix.current._current", None)
    for name in ("finalize", "setup", "get_log"):
        with refuse(f"{name}: there is no run; call init(project=...) first", RuntimeError):
            getattr(logix, name)()


def test_a_star_import_leaves_pythons_names_alone() -> None:
    assert not set(logix.__all__) & set(dir(builtins))


def test_names_of_logix_that_are_not_here() -> None:
    run = logix.init("toy")
    with refuse("LogIX's LogIXScheduler is not here: one pass over the data", AttributeError):
        logix.LogIXScheduler  # type: ignore[attr-defined] # noqa: B018
    for name in ("add_analysis", "clear", "watch_activation"):
        for owner in (logix, run):
            refused(f"LogIX's {name} is not here: ", getattr, owner, name, error=AttributeError)
    with refuse("a run has no attribute 'watsch'", AttributeError):
        run.watsch  # type: ignore[attr-defined] # noqa: B018
    with refuse("module 'logra_kernels' has no attribute 'watsch'", AttributeError):
        logix.watsch  # type: ignore[attr-defined] # noqa: B018


def test_add_lora_takes_what_logix_gives_it(tmp_path: Path, model: nn.Module) -> None:
    run = logix.init("toy", root_dir=str(tmp_path), rank=2)
    run.add_lora(model, parameter_sharing=False, watch=True, clear=True)
    assert [(m.ko, m.ki) for m in run.modules] == [(2, 2)] * 3
    run.add_lora(model=model, lora_path=None)
    others: list[tuple[str, Any, str]] = [
        ("parameter_sharing", True, "expected False, got True: every module has a projection"),
        ("watch", False, "expected True, got False"),
        ("lora_path", "there", "expected None, got 'there': initialize_from_log takes"),
    ]
    for name, value, message in others:
        refused(f"add_lora: {name}: {message}", run.add_lora, **{name: value})
    refused("add_lora: no argument 'ranks'", run.add_lora, ranks=3, error=TypeError)


def test_precondition_gives_a_log(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = finished(tmp_path, model, data, dtype="float32")
    log_queries(run, model, data, slice(2))
    ids, parts = run.influence.precondition(run.get_log(), damping=0.01)
    assert ids == ["query0", "query1"]
    covariance = run.get_covariance_state()
    for name, part in run.get_log()[1].items():
        h = covariance[name]["grad"]
        rows = part["grad"].reshape(2, -1).double()
        want = torch.linalg.solve(h + 0.01 * torch.eye(len(h)), rows.T).T
        got = parts[name]["grad"].reshape(2, -1).double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_logs_that_do_not_fit(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = finished(tmp_path, model, data)
    log_queries(run, model, data, slice(2))
    ids, parts = run.get_log()
    first, *others = parts
    rest = {name: parts[name] for name in others}
    with refuse(f"src_log: module {first}: expected the key 'grad'"):
        run.compute_influence_all((ids, {first: {"x": parts[first]["grad"]}, **rest}))
    with refuse(f"src_log: module {first}: expected [2, 3, 3], got [1, 3, 3]"):
        run.compute_influence_all((ids, {first: {"grad": parts[first]["grad"][:1]}, **rest}))
    nobody = {name: {"grad": part["grad"][:0]} for name, part in parts.items()}
    assert run.compute_influence_all(([], nobody)).scores.shape == (0, COUNT)
    values: list[Any] = ["0.1", True]
    for value in values:
        with refuse(f"damping: expected a finite number >= 0, got {value!r}"):
            run.compute_influence_all(damping=value)


def test_pca_from_statistics_in_two_passes(tmp_path: Path, model: nn.Module, data: Data) -> None:
    """LogIX's form: statistics of both sides, then add_lora; with and without finalize between."""
    projections, stores = [], []
    for number in range(3):
        run = logix.init(
            "toy", {"lora": {"init": "pca", "rank": 3}}, root_dir=str(tmp_path / str(number))
        )
        run.watch(model)
        if number == 2:  # the pilot's pass
            with run.pilot("pca", rank=3):
                log_all(run, model, data)
        else:
            run.setup({"statistic": {"forward": Covariance, "backward": Covariance}})
            log_all(run, model, data)
            if number:
                run.finalize()
            run.add_lora()
        assert [module.ki for module in run.modules] == [3, 3, 3]
        run.setup({"log": "grad", "save": "grad", "statistic": {"grad": Covariance}})
        log_all(run, model, data)
        run.finalize()
        projections.append(run.store.projection)
        stores.append(run.store.take(range(COUNT)))
        assert not run.store.verify()
    assert projections[0] == projections[1] == projections[2]
    assert (stores[0] == stores[1]).all()
    assert (stores[0] == stores[2]).all()
    reader = make_run(tmp_path / "0", model, rank=None)
    reader.initialize_from_log()
    log_queries(reader, model, data, slice(2))
    assert reader.compute_influence_all()["influence"].shape == (2, COUNT)


def test_eigen_from_statistics_in_a_file_of_settings(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    lora = {"init": "eigen", "coordinates": 40}
    run = logix.init("toy", {"lora": lora}, root_dir=str(tmp_path))
    run.watch(model)
    run.setup({"forward": ["covariance"], "backward": ["covariance"]})
    log_all(run, model, data)
    run.add_lora()
    run.setup({"save": "grad", "statistic": "diagonal"})
    log_all(run, model, data)
    run.finalize()
    assert run.store.layout.dim == 40
    assert run.store.projection["kind"] == "eigen"
    run.setup({"log": "grad"})
    log_queries(run, model, data, slice(2))
    assert run.compute_influence_all()["influence"].shape == (2, COUNT)


def test_pca_without_statistics_is_refused(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = make_run(tmp_path, model, rank=None)
    with refuse("init: 'pca' is made from a pilot: pass some examples inside `with "):
        run.add_lora(rank=3, init="pca")
    run.setup({"save": "grad", "statistic": {"forward": Covariance, "backward": Covariance}})
    log_all(run, model, data)
    for _ in range(2):
        with refuse("init: 'pca' is made from a pilot: pass some examples inside `with "):
            run.add_lora(rank=3, init="pca")
        run.finalize()
    assert Store.open(tmp_path / "toy").num_rows == COUNT


def test_the_papers_figure_3(tmp_path: Path, model: nn.Module, data: Data) -> None:
    """Its words: setup with "stat", a loop, then influence from the store."""
    run = logix.init("toy", root_dir=str(tmp_path))
    run.watch(model, type_filter=[nn.Linear], name_filter=["first", "head"])
    run.add_lora(rank=3)
    run.setup({"log": "grad", "save": "grad", "stat": "kfac"})
    log_all(run, model, data)
    run.finalize()
    run.setup({"log": "grad"})
    with run(data_id=["query"]):
        loss_of(model, data, slice(1)).backward()
    result = run.compute_influence_all(run.get_log(), run.build_log_dataloader(), hessian="kfac")
    assert result["influence"].shape == (1, COUNT)
