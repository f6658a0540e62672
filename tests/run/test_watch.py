"""Which layers a run watches, and stores of other layers or projections."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_models import Mlp, ragged_batch, tiny_gpt2
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
from logra_kernels import Store
from logra_kernels.integrations.logix.run import LogixRun
from logra_kernels.run import WatchedLayers


def test_watch_filters() -> None:
    model = tiny_gpt2()
    run = logix.init("toy")
    run.watch(model, name_filter=["mlp"])
    assert [m.name for m in run.modules] == [
        f"transformer.h.{block}.mlp.{name}" for block in (0, 1) for name in ("c_fc", "c_proj")
    ]
    run.watch(model, type_filter=[nn.Linear])
    assert [m.name for m in run.modules] == ["lm_head"]
    run.add_lora(rank=(2, 4), name_filter=["c_attn"], type_filter=[nn.Module])
    assert [(m.ko, m.ki) for m in run.modules] == [(2, 4), (2, 4)]
    run.watch(model, type_filter=[nn.Linear, nn.Embedding])
    run.add_lora(rank=2, name_filter=["wte", "mlp"])  # watch's type_filter stays
    assert [m.name for m in run.modules] == ["transformer.wte"]
    run.watch(model, name_filter=["h.0.mlp", "wpe"])
    assert [m.name[-6:] for m in run.modules] == ["p.c_fc", "c_proj"]
    with refuse(
        "transformer.h.0.mlp.c_proj, …; nn.Embedding is watched where type_filter names it"
    ):
        run.watch(model, name_filter=["wpe"])
    with refuse("watch: the default matches none of the layers 0; nn.Embedding is watched where"):
        run.watch(nn.Sequential(nn.Embedding(5, 3)))
    with refuse("watch: name_filter=['feed_forward'] matches none of the layers transformer.wte, "):
        run.watch(model, name_filter=["feed_forward"])
    with refuse("watch: type_filter=[LayerNorm] matches none of the layers"):
        run.watch(model, type_filter=[nn.LayerNorm])
    with refuse("(matched: LayerNorm, which are no layers)"):
        run.watch(model, type_filter=[nn.LayerNorm])
    with refuse("watch: the model has no nn.Linear, nn.Conv2d, Conv1D or nn.Embedding"):
        run.watch(nn.Sequential(nn.ReLU()))
    refused("name_filter: expected a list, got 'mlp'", run.watch, model, name_filter="mlp")
    with refuse("type_filter: expected a list, got <class"):
        run.watch(model, type_filter=nn.Linear)  # type: ignore[arg-type]
    with refuse("type_filter: expected a list of classes, got Linear(in_features=2, "):
        run.watch(model, type_filter=[nn.Linear(2, 2)])  # type: ignore[list-item]
    with refuse("name_filter: expected a list of parts of names, got 5 in it"):
        run.watch(model, name_filter=[5])  # type: ignore[list-item]
    with refuse("name_filter: expected a list, got <generator"):
        run.watch(model, name_filter=(part for part in ["mlp"]))  # type: ignore[arg-type]
    with refuse("model: expected an nn.Module, got 'gpt2'"):
        run.watch("gpt2")  # type: ignore[arg-type]


def test_a_whole_model_is_watched_without_filters(tmp_path: Path) -> None:
    """As in LogIX's examples: the embedding of positions, [1, T], does not get in the way."""
    model = tiny_gpt2()
    ids, mask = ragged_batch(61, [5, 3, 4, 5], "right")
    run = logix.init("toy", root_dir=str(tmp_path))
    run.watch(model)
    run.add_lora(rank=2)
    with run(data_id=range(4), mask=mask):
        model(input_ids=ids, attention_mask=mask).logits.square().sum().backward()
    names = list(run.get_log()[1])
    assert len(names) == 9  # two blocks of four, and the head
    assert names[-1] == "lm_head"


def test_a_layer_by_itself_is_a_model(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    run = make_run(tmp_path, model, rank=None)
    with run(data_id=[0]):
        model(torch.ones(1, 3)).sum().backward()
    assert list(run.get_log()[1]) == ["model"]


def test_model_that_differs_from_the_store(tmp_path: Path, model: nn.Module, data: Data) -> None:
    finished(tmp_path, model, data)

    def opened(other: nn.Module, **filters: Any) -> LogixRun:
        run = logix.init("toy", root_dir=str(tmp_path))
        run.watch(other, **filters)
        run.initialize_from_log()
        return run

    assert [m.ko for m in opened(model).modules] == [3, 3, 3]
    with refuse("modules: the store's module 0 is first, the watched one is second"):
        opened(model, name_filter=["second", "head"])
    with refuse("modules: the store has 3, 2 are watched; the first that only one of them has is "
                "head"):  # fmt: skip
        opened(model, name_filter=["first", "second"])
    with refuse("modules: first: expected the store's widths (I, O) = (7, 11) (without bias), got "
                "(8, 11) (with bias)"):  # fmt: skip
        opened(model, bias=True)
    wider = Mlp()
    wider.head = nn.Linear(9, 5)
    refused("modules: head: expected the store's widths (I, O) = (9, 4)", opened, wider)
    extra = Mlp()
    extra.more = nn.Linear(2, 2)
    with refuse("modules: the store has 3, 4 are watched; the first that only one of them has is "
                "more"):  # fmt: skip
        opened(extra)
    with pytest.warns(UserWarning, match="was logged with other weights"):
        opened(Mlp())


def test_add_lora_that_differs_from_the_store(tmp_path: Path, model: nn.Module, data: Data) -> None:
    finished(tmp_path, model, data)
    for options, message in (
        ({"rank": 2}, "projection.rank[0]: the store has 3, this run has 2"),
        ({"rank": 3, "seed": 5}, "projection.seed: the store has 0, this run has 5"),
        ({"rank": 3, "init": "rademacher"}, 'projection.kind: the store has "normal", this run'),
    ):
        run = make_run(tmp_path, model, rank=None)
        run.add_lora(**options)
        refused(f"add_lora: {message}", run.initialize_from_log)
    run = make_run(tmp_path, model, rank=3)
    run.initialize_from_log()
    log_queries(run, model, data, slice(1))
    # LogIX's older spelling
    assert run.influence.compute_influence_all(run.get_log())["influence"].shape == (1, COUNT)


def test_watch_after_initialize_from_log(tmp_path: Path, model: nn.Module, data: Data) -> None:
    finished(tmp_path, model, data)
    run = logix.init("toy", root_dir=str(tmp_path))
    run.initialize_from_log()
    assert [m.name for m in run.modules] == ["first", "second", "head"]
    refused("modules: the store's module 0 is first", run.watch, model, name_filter=["head"])
    run.watch(model)
    refused("add_lora: the projection is the store's", run.add_lora, error=RuntimeError)
    log_queries(run, model, data, slice(1))
    assert run.compute_influence_all()["influence"].shape == (1, COUNT)


def test_bias_and_identity_stores_open_again(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = logix.init("toy", root_dir=str(tmp_path))
    run.watch(model, bias=True)
    run.setup(RAW)
    log_all(run, model, data)
    run.finalize()
    reader = logix.init("toy", root_dir=str(tmp_path))
    reader.watch(model, bias=True)
    reader.initialize_from_log()
    log_queries(reader, model, data, slice(1))
    assert [(m.ko, m.ki) for m in reader.modules] == [(11, 8), (9, 11), (4, 10)]
    assert reader.compute_influence_all().scores.shape == (1, COUNT)


def test_order_of_calls(tmp_path: Path, model: nn.Module, data: Data) -> None:
    run = logix.init("toy", root_dir=str(tmp_path))
    for call in (run.add_lora, lambda: run(data_id=["a"])):
        refused("no model is watched; call watch(model, ...) first", call, error=RuntimeError)
    with refuse("no store is open; call initialize_from_log() first", RuntimeError):
        run.build_log_dataloader()
    refused(f"{tmp_path / 'toy'}", run.initialize_from_log)
    run.finalize()  # nothing was begun, nothing is to be done
    run.watch(model)
    run.setup(RAW)
    context = run(data_id=["a", "b"])
    with context:
        loss_of(model, data, slice(2)).backward()
    with refuse("a context is for one pass", RuntimeError), context:
        pass
    calls: list[Any] = [partial(run.watch, model), run.initialize_from_log, run.add_lora]
    for call in calls:
        refused("rows are being logged already; call finalize() first", call, error=RuntimeError)
    with refuse("rows are still being logged; call finalize() first", RuntimeError):
        run.compute_influence_all(run.get_log())
    logix.finalize()
    assert Store.open(tmp_path / "toy").num_rows == 2


def test_wrapped_models_have_the_names_of_what_they_wrap(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = finished(tmp_path, model, data)
    inner = copy.deepcopy(model)
    compile: Any = partial(
        torch.compile, backend="eager"
    )  # to mypy, a compiled module is a function
    inner.second = compile(inner.second)
    for wrapped in (compile(model), nn.DataParallel(model), inner):
        reader = logix.init("toy", root_dir=str(tmp_path))
        reader.watch(wrapped)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # neither other modules nor other weights
            reader.initialize_from_log()
        assert [m.name for m in reader.modules] == [m.name for m in run.modules]
    with reader(data_id=["query"]):
        loss_of(inner, data, slice(1)).backward()
    scores = reader.compute_influence_all().scores
    log_queries(run, model, data, slice(1))
    torch.testing.assert_close(scores, run.compute_influence_all().scores, rtol=1e-5, atol=0)


def test_a_module_with_a_forward_of_its_own_is_refused_by_name(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    model.second = Doubled(11, 9)
    run = logix.init("toy")
    refused("module second: its class Doubled has a forward of its own", run.watch, model)
    run.watch(model, name_filter=["first", "head"])
    with refuse("module second: its class Doubled has a forward of its own"):
        WatchedLayers.named(model, ["second"])


def test_shared_weights_are_warned_of(model: Any) -> None:
    run = logix.init("toy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.watch(model)
        run.watch(model.first)
        run.watch(nn.ModuleDict({"one": model, "again": model}))  # one module of two names
    gpt2 = tiny_gpt2()
    text = (
        "module lm_head: its weight is also that of transformer.wte; a row holds only the part of "
        "the weight's gradient that passes through lm_head"
    )
    with pytest.warns(UserWarning, match=text) as caught:
        run.watch(gpt2, name_filter=["mlp", "lm_head"])
    assert [warning.filename for warning in caught] == [__file__]
    model.second.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.warns(UserWarning, match="module second: its weight has a gradient hook, which ch"):
        run.watch(model)
