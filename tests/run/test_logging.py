"""What a run logs and stores, how it is resumed, and how bad input is met."""

from __future__ import annotations

import copy
import gc
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from toy_models import Mlp, autograd_rows, causal_loss, make_layers, ragged_batch, tiny_llama
from toy_run import (
    COUNT,
    RAW,
    Data,
    begun,
    finished,
    log_all,
    log_queries,
    loss_of,
    make_run,
    refuse,
    refused,
)

import logra_kernels as logix
from logra_kernels import Attributor, Covariance, RawCurvature, Store
from logra_kernels.integrations.logix.run import LogixRun
from logra_kernels.run import Config, CorrectedEigval, Run, check_ids


@pytest.mark.parametrize("rank", [None, 3])
def test_float32_store_holds_the_gradients(
    tmp_path: Path, model: nn.Module, data: Data, rank: int | None
) -> None:
    finished(tmp_path, model, data, rank=rank, dtype="float32")
    store = Store.open(tmp_path / "toy")
    layers = make_layers(model, rank=rank)
    want = autograd_rows(
        model, layers, [partial(loss_of, model, data, slice(n, n + 1)) for n in range(COUNT)]
    )
    got = torch.from_numpy(store.take(range(COUNT)))
    # the batch of five and the batch of one round a chain of some ten products differently
    assert (got - want).abs().max() <= 10 * 2**-23 * want.abs().max()
    assert store.ids.to_pylist() == [f"row{n}" for n in range(COUNT)]
    assert store.finalized
    assert store.verify() == []


def test_float16_store_loses_half_a_unit_in_the_last_place(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = begun(tmp_path, model)
    rows = []
    for n in range(COUNT):
        with run(data_id=[n], metadata=[{"number": n}]) as capture:
            loss_of(model, data, slice(n, n + 1)).backward()
        rows.append(capture.rows())
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert store.dtype == "float16"
    want = torch.cat(rows)
    got = torch.from_numpy(store.take(range(COUNT)))
    # 2**-11 relative, and fp16's subnormals 39 powers of two below the row's largest element
    allowed = 2**-11 * want.abs() + 2**-38 * want.abs().amax(dim=1, keepdim=True)
    assert ((got - want).abs() <= allowed).all()
    assert store.metadata([4]) == [{"number": 4}]


def test_exponents_come_from_the_first_row(tmp_path: Path, model: nn.Module, data: Data) -> None:
    """So that neither they nor the stored bits depend on the size of the first batch."""
    stores = []
    for size in (1, 5):
        finished(tmp_path / str(size), model, data, size=size)
        stores.append(Store.open(tmp_path / str(size) / "toy"))
    assert stores[0].module_exponents == stores[1].module_exponents
    first = torch.from_numpy(stores[0].take([0]))[0].split([m.size for m in stores[0].modules])
    sizes = [int(torch.frexp(part.abs().max()).exponent) for part in first]
    assert stores[0].module_exponents == [max(size - max(sizes), -14) for size in sizes]


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_module_that_is_zero_in_the_first_row_is_not_lost(tmp_path: Path, size: float) -> None:
    """Nor does it push the others out: an expert that the first example does not reach."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"often": torch.nn.Linear(4, 3), "seldom": torch.nn.Linear(3, 2)})
    x = torch.randn(4, 7)
    x[0, 4:] = 0
    run = logix.init("toy", root_dir=str(tmp_path))
    run.watch(model)
    run.setup({"save": "grad"})
    with run(data_id=[0, 1, 2, 3]) as logged:
        out = model["often"](x[:, :4]).square().sum() + model["seldom"](x[:, 4:]).square().sum()
        (size * out).backward()
    run.finalize()
    stored = torch.from_numpy(Store.open(tmp_path / "toy").take(range(4)))
    assert torch.allclose(stored / size, logged.rows() / size, rtol=1e-3, atol=1e-6)
    assert (stored[1:, -6:] != 0).all()


def test_gradients_beyond_fp16s_range_are_scaled_not_lost(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = begun(tmp_path, model)
    rows = []
    for n, scale in enumerate([1.0, 1e12, 1e-12, 1e20]):
        with run(data_id=[n]) as capture:
            (loss_of(model, data, slice(n, n + 1)) * scale).backward()
        rows.append(capture.rows())
    run.finalize()
    got = torch.from_numpy(Store.open(tmp_path / "toy").take(range(4)))
    for want, row in zip(rows, got, strict=True):
        assert (row - want).norm() <= 2**-10 * want.norm()


def test_start_and_end(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = make_run(tmp_path, model)
    run.setup({"grad": ["log", "covariance"]})
    run.start(data_id=["a", "b"])
    loss_of(model, data, slice(2)).backward()
    run.end(save=True)
    refused("end: no pass is open", run.end, error=RuntimeError)
    refused("log: the model is hooked only inside", run.log, ["a"], error=RuntimeError)
    run.finalize()
    assert Store.open(tmp_path / "toy").ids.to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "save", "covariance"),
    [
        (RAW, True, True),
        ({"log": ["grad"], "save": ["grad"], "statistic": {"grad": [Covariance]}}, True, True),
        ({"stat": "raw", "save": "grad"}, True, True),
        ({"statistic": {"grad": ["variance"]}}, False, False),
        ({"statistic": "covariance"}, False, True),
        ({"log": "grad"}, False, False),
        ({"save": "grad", "stat": "none"}, True, False),
        ({"grad": ["log", "covariance"]}, False, True),
        ({"grad": "log"}, False, False),
        ({"log": "grad", "save": []}, False, False),
        ({"grad": ["covariance"], "forward": [], "backward": []}, False, True),
        ({"statistic": {"grad": [Covariance], "forward": [], "backward": []}}, False, True),
    ],
)
def test_setup_forms(
    tmp_path: Path, model: nn.Module, data: Data, options: Any, save: bool, covariance: bool
) -> None:
    run = make_run(tmp_path, model)
    run.setup(options)
    log_all(run, model, data)
    run.finalize()
    kept = save or covariance or "variance" in str(options)
    assert (tmp_path / "toy").exists() == kept
    if kept:
        store = Store.open(tmp_path / "toy")
        assert store.num_rows == (COUNT if save else 0)
        assert ("raw" in store.curvatures) == covariance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": {"forward": Covariance}}, "expected forward and backward, got forward"),
        ({"statistic": {"forward": "kfac"}}, "statistic: forward: expected Covariance, got 'kfac'"),
        ({"statistic": ["raw", "ekfac"]}, "setup: expected one curvature, got ekfac and raw"),
        ({"statistic": {"grad": "median"}}, "statistic: no statistic 'median'; available"),
        ({"statistic": "raw", "factors": "offload"}, "factors: 'offload' is for a curvature of"),
        ({"statistic": "kfac", "factors": "gpu"}, "factors: expected one of cpu, device, offload"),
        ({"log": "backward"}, "log: 'backward' is not available, only 'grad'"),
        ({"forward": ["log"]}, "forward: forward: expected Covariance, got 'log'"),
        ({"save": "gradient"}, "save: expected 'grad', got 'gradient'"),
        ({"keep": "grad"}, "setup: no key 'keep'; there are log, save, statistic (stat), grad"),
        ({}, "setup: expected a dictionary such as"),
        (None, "setup: expected a dictionary such as"),
    ],
)  # fmt: skip
def test_setup_refuses(tmp_path: Path, model: nn.Module, options: Any, message: str) -> None:
    run = make_run(tmp_path, model)
    refused(message, run.setup, options)


def test_statistic_without_saving(tmp_path: Path, model: nn.Module, data: Data) -> None:
    """The curvature alone is kept, as it would have been with the rows."""
    run = make_run(tmp_path, model)
    run.setup({"statistic": {"grad": Covariance}})
    log_all(run, model, data)
    run.finalize()
    finished(tmp_path / "full", model, data)
    alone, full = (logix.RawCurvature.load(Store.open(tmp_path / p)) for p in ("toy", "full/toy"))
    assert alone.checksum == full.checksum
    reader = make_run(tmp_path, model, rank=None)
    reader.initialize_from_log()
    log_queries(reader, model, data, slice(2))
    assert reader.compute_self_influence()["influence"].shape == (2,)
    refused("the store holds no rows", reader.compute_influence_all)


def test_resume_refuses_other_weights_rank_or_modules(
    tmp_path: Path, model: Mlp, data: Data
) -> None:
    finished(tmp_path, model, data)

    def log(run: LogixRun) -> None:
        log_all(run, model, data)

    def resumed(rank: int = 3, **options: Any) -> LogixRun:
        return begun(tmp_path, model, rank=rank, resume=True, **options)

    with refuse("cannot resume: projection.seed: the store has 0, this run has 1") as caught:
        log(resumed(seed=1))
    assert isinstance(caught.value, logix.StoreError)
    refused("cannot resume: modules[0].ko: the store has 3, this run has 2", log, resumed(rank=2))
    refused("cannot resume: dtype", log, resumed(dtype="float32"))
    with torch.no_grad():
        model.first.weight += 1
    refused("cannot resume: fingerprints.weights", log, resumed())


def test_what_is_logged_is_known_after_a_resume(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    finished(tmp_path, model, data)
    run = begun(tmp_path, model, resume=True)
    assert run.logged_ids == {f"row{n}" for n in range(COUNT)}
    with run(data_id=["more"]):
        loss_of(model, data, slice(1)).backward()
    assert [run.is_logged(name) for name in ("row7", "more", "less")] == [True, True, False]
    run.finalize()


def test_a_store_is_not_overwritten(tmp_path: Path, model: nn.Module, data: Data) -> None:
    finished(tmp_path, model, data)
    run = begun(tmp_path, model)
    refused("there is a store already; resume=True goes on with it", log_all, run, model, data)
    assert Store.open(tmp_path / "toy").num_rows == COUNT


def test_saving_after_finalize(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = finished(tmp_path, model, data)
    with refuse("was finished; to log queries call eval() first, to add to it", RuntimeError):
        log_all(run, model, data)


def test_batch_normalisation_in_training_is_warned_of(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    run = make_run(tmp_path, model, rank=None)
    with pytest.warns(UserWarning, match="mixes the examples of a batch"), run(data_id=[0, 1]):
        model(torch.randn(2, 3)).square().sum().backward()
    model.eval()
    other = make_run(tmp_path, model, rank=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with other(data_id=[0, 1]):
            model(torch.randn(2, 3)).square().sum().backward()


def test_duplicate_ids(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = begun(tmp_path, model)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    refused("data_id: expected 3 different ids, got 'a' twice", run, data_id=["a", "b", "a"])
    with run(data_id=["a", "b"]):
        loss_of(model, data, slice(2)).backward()
    with refuse("data_id: expected new ids, got 'b', which was logged already"):  # noqa: SIM117
        with run(data_id=["c", "b"]):
            loss_of(model, data, slice(2)).backward()
    assert len(forwards) == 1  # refused before the work
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert store.ids.to_pylist() == ["a", "b"]
    assert logix.RawCurvature.load(store).count == 2


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["a", "b"], ["a", "b"]),
        ([1, 2], ["1", "2"]),
        ((3, "x"), ["3", "x"]),
        (torch.tensor([5, -6]), ["5", "-6"]),
        (np.array([5, 6], np.uint8), ["5", "6"]),
        (np.array(["p", "q"]), ["p", "q"]),
        ([torch.tensor(5), np.int64(6)], ["5", "6"]),
        (range(2), ["0", "1"]),
        ((str(n) for n in range(2)), ["0", "1"]),
    ],
)
def test_ids_come_in_many_forms(given: Any, want: list[str]) -> None:
    assert check_ids(given) == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("abc", "data_id: expected one id for each example, got the single 'abc'"),
        (7, "data_id: expected one id for each example, got the single 7"),
        ([1.5], "data_id: expected strings or integers, got 1.5"),
        ([True], "data_id: expected strings or integers, got True"),
        (["a", ""], "data_id: expected strings or integers, got an empty string"),
        ([None], "data_id: expected strings or integers, got None"),
        ([], "data_id: expected at least one id, got none"),
        (None, "data_id: expected one id for each example, got None"),
        (1.5, "data_id: expected one id for each example, got 1.5"),
        (torch.ones(2, 3, dtype=torch.int64), "got an array of shape [2, 3]"),
        (torch.tensor(3), "got an array of shape []"),
    ],
)
def test_ids_that_are_refused(given: Any, message: str) -> None:
    refused(message, check_ids, given)


def test_too_few_ids_or_metadata(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = begun(tmp_path, model)
    with refuse("with N = 2 (one per data_id), got [3, 7]"), run(data_id=["a", "b"]):
        loss_of(model, data, slice(3)).backward()
    refused("metadata: expected 2, one per data_id, got 1", run, data_id=["a", "b"], metadata=[{}])
    with refuse("mask: expected shape [N, T] with N = 2 (one row per data_id), got [3, 4]"):
        run(data_id=["a", "b"], mask=torch.ones(3, 4))


def test_averaged_loss_and_unused_modules(tmp_path: Path, data: Data) -> None:
    model = nn.ModuleDict({"used": nn.Linear(7, 4), "spare": nn.Linear(7, 4)})
    run = make_run(tmp_path, model, rank=None)

    def step(**options: Any) -> None:
        with run(data_id=[0, 1], **options):
            nn.functional.cross_entropy(model["used"](data[0][:2]), data[1][:2]).backward()

    refused("loss: expected a sum over examples and tokens, got a mean", step)
    refused("no gradient reached: spare", step, averaged_loss="allow", error=RuntimeError)
    step(averaged_loss="allow", allow_unused=True)
    assert run.get_log()[1]["spare"]["grad"].abs().max() == 0
    run = make_run(tmp_path, model, rank=None, averaged_loss="warn", allow_unused=True)
    with pytest.warns(UserWarning, match="got a mean"):
        step()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_gradients_raise(
    tmp_path: Path, model: nn.Module, data: Data, value: float
) -> None:
    run = begun(tmp_path, model)
    data[0][1, 2] = value
    with refuse("gradients: NaN or infinite in module first"), run(data_id=["a", "b", "c"]):
        loss_of(model, data, slice(3)).backward()
    with refuse("for data_id b; nothing of this batch was stored (on_nonfinite='skip'"):  # noqa: SIM117
        with run(data_id=["a", "b", "c"]):
            loss_of(model, data, slice(3)).backward()
    with run(data_id=["a", "c"]):
        loss_of(model, data, [0, 2]).backward()
    run.finalize()
    assert Store.open(tmp_path / "toy").ids.to_pylist() == ["a", "c"]


def test_nonfinite_gradients_are_skipped_on_request(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = begun(tmp_path, model, on_nonfinite="skip")
    data[0][1, 2] = torch.nan
    data[0][5, 2] = torch.inf
    with pytest.warns(UserWarning, match="for data_id row1: left out, as all later ones"):
        log_all(run, model, data, size=3, metadata=None)
    assert run.skipped_ids == ["row1", "row5"]
    run.finalize()
    store = Store.open(tmp_path / "toy")
    kept = [f"row{n}" for n in range(COUNT) if n not in (1, 5)]
    assert store.ids.to_pylist() == kept
    assert logix.RawCurvature.load(store).count == 10


def test_queries_of_a_finished_store_do_not_reach_its_curvature(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = finished(tmp_path, model, data)
    message = "statistic: " + str(tmp_path / "toy") + " was finished; to log queries call eval()"
    with refuse(message, RuntimeError), run(data_id=["query"], save=False):
        loss_of(model, data, slice(1)).backward()
    log_queries(run, model, data, slice(1))
    assert RawCurvature.load(Store.open(run.path)).count == COUNT


def test_an_error_in_the_users_code_leaves_the_store_good(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = begun(tmp_path, model)
    log_all(run, model, data, size=4)
    with pytest.raises(KeyError), run(data_id=["broken"]):
        raise KeyError
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert store.num_rows == COUNT
    assert store.verify() == []


def test_save_is_a_switch(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = make_run(tmp_path, model)
    run.setup({"grad": ["log"]})
    run.save(True)
    with run(data_id=["a"]):
        loss_of(model, data, slice(1)).backward()
    with run(data_id=["b"], save=False):
        loss_of(model, data, slice(1)).backward()
    run.save(False)
    with run(data_id=["c"]):
        loss_of(model, data, slice(1)).backward()
    with run(data_id=["d"], save=True):
        loss_of(model, data, slice(1)).backward()
    run.finalize()
    assert Store.open(tmp_path / "toy").ids.to_pylist() == ["a", "d"]


def test_weight_gradients_while_training(tmp_path: Path, model: Mlp, data: Data) -> None:
    run = begun(tmp_path, model, check_weights=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.first.weight.clone()
    for n in range(2):
        optimizer.zero_grad()
        with run(data_id=[f"step{n}"], weight_gradients=True):
            loss_of(model, data, slice(n, n + 1)).backward()
        optimizer.step()
    run.finalize()
    assert not torch.equal(before, model.first.weight)
    assert Store.open(tmp_path / "toy").num_rows == 2


def test_start_computes_weight_gradients_on_request(tmp_path: Path, model: Any, data: Data) -> None:
    run = make_run(tmp_path, model, check_weights=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.first.weight.clone()
    run.start(["a"], save=True, weight_gradients=True, metadata=[{"step": 1}])
    loss_of(model, data, slice(1)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        run.end()
    assert not torch.equal(before, model.first.weight)
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert (store.ids.to_pylist(), store.metadata([0])) == (["a"], [{"step": 1}])


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_step_without_gradients_is_warned_of(
    tmp_path: Path, model: Any, data: Data, inside: Any, closure: Any
) -> None:
    run = make_run(tmp_path, model)
    optimizer = torch.optim.AdamW(model.parameters())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)

    def backward() -> Tensor:
        loss = loss_of(model, data, slice(1))
        loss.backward()
        return loss

    def step() -> None:
        other.step()  # of another model
        with pytest.warns(UserWarning, match="AdamW stepped on parameters that have no grad") as w:
            optimizer.step(backward if closure and inside else None)
        assert [warning.filename for warning in w] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()  # one warning is enough

    run.start(["a"])
    if not (closure and inside):
        backward()
    if inside:
        step()
    run.end()
    if not inside:
        step()


def test_training_beside_logging_is_not_warned_of(tmp_path: Path, model: Any, data: Data) -> None:
    gc.collect()  # of earlier tests' runs
    run = Run("toy", Config(root_dir=str(tmp_path)))
    run.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = len(_global_optimizer_post_hooks)
    with run(["a"]):
        loss_of(model, data, slice(1)).backward()

    def closure() -> Tensor:
        loss = loss_of(model, data, slice(4))
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    assert len(_global_optimizer_post_hooks) == hooks + 1
    del run
    gc.collect()
    assert len(_global_optimizer_post_hooks) == hooks


def test_a_pass_inside_a_pass_of_the_same_model_is_refused(
    tmp_path: Path, model: Any, data: Data
) -> None:
    run = begun(tmp_path, model)
    nested = refuse("a pass on this model is open already, for data_id a, b; a", RuntimeError)
    with nested, run(["a", "b"]), run(["c", "d"]):
        loss_of(model, data, slice(2)).backward()
    run.start(["a", "b"])
    with refuse("run(data_id, mask): a pass on this model is open already", RuntimeError):
        run(["c", "d"]).__enter__()
    refused("start: a pass is open already", run.start, ["c", "d"], error=RuntimeError)
    loss_of(model, data, slice(2)).backward()
    run.end()
    run.finalize()
    assert Store.open(tmp_path / "toy").ids.to_pylist() == ["a", "b"]


def test_passes_of_two_models_may_be_open_together(tmp_path: Path, model: Any, data: Data) -> None:
    other = copy.deepcopy(model)
    runs = [make_run(tmp_path / str(n), m) for n, m in enumerate((model, other))]
    with runs[0](["a"]), runs[1](["b"]):
        loss = loss_of(model, data, slice(1)) + loss_of(other, data, slice(1))
        loss.backward()
    rows = [run.last_rows()[1] for run in runs]
    assert torch.equal(*rows)
    run = logix.init("one", root_dir=str(tmp_path))
    run.watch(model)
    with run(["a"]):
        run.watch(other)
        with run(["b"]):
            loss = loss_of(model, data, slice(1)) + loss_of(other, data, slice(1))
            loss.backward()
        run.watch(model.first)
        with refuse("a pass on this model is open already", RuntimeError), run(["c"]):
            pass


def test_token_scores(tmp_path: Path) -> None:
    model = tiny_llama()
    ids, mask = ragged_batch(61, [9, 4, 7], "right")
    run = logix.init("toy", root_dir=str(tmp_path))
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=3)
    run.setup(RAW)
    with run(data_id=range(3), mask=mask):
        causal_loss(model, ids, mask).backward()
    run.finalize()
    run.eval()
    queries = torch.cat([g["grad"].flatten(1) for g in run.get_log()[1].values()], dim=1)
    solved = run.attributor().precondition(queries)
    with run.token_scores(solved, 3, mask) as capture:
        causal_loss(model, ids, mask).backward()
    scores = capture.token_scores()
    want = run.compute_influence(run.get_log(), run.get_log())["influence"]
    assert scores.shape == (3, 3, 9)
    assert torch.allclose(scores.sum(2), want, rtol=1e-4, atol=1e-4 * want.abs().max())


BOTH_SIDES = {"forward": [Covariance], "backward": [Covariance]}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"save": "grad", "stat": "kfac"}, "kfac"),
        ({"save": "grad", "statistic": BOTH_SIDES}, "kfac"),
        ({"save": "grad", "statistic": {**BOTH_SIDES, "grad": CorrectedEigval}}, "ekfac"),
        ({"save": "grad", "statistic": {"grad": ["corrected_eigval"]}}, "ekfac"),
        ({"save": "grad", "statistic": "ec-shampoo"}, "ec-shampoo"),
    ],
)
def test_a_statistic_names_a_kind_of_curvature(
    tmp_path: Path, model: nn.Module, data: Data, options: Any, kind: str
) -> None:
    run = make_run(tmp_path, model)
    run.setup(options)
    log_all(run, model, data)
    run.finalize()
    assert run.curvature.kind == kind
    assert Attributor(tmp_path / "toy").preconditioner.kind == kind
