"""What `watch` says that it covers, and what the store keeps of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from store_samples import edit_manifest
from torch import Tensor, nn
from toy_models import Mlp, SmallCnn, tiny_gpt2, tiny_llama
from toy_run import RAW, Data, finished, log_all, make_run

import logra_kernels as logra
from logra_kernels.cli import main
from logra_kernels.run import Coverage, WatchedModule
from logra_kernels.run import coverage as reasons
from logra_kernels.store import Store, StoreWriter


def left_out(coverage: Coverage) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {part.reason: (part.parameters, part.names) for part in coverage.left_out}


def check_sums(coverage: Coverage, model: nn.Module) -> None:
    """Every parameter is counted once: it is watched, or left out for one reason."""
    assert coverage.parameters == sum(p.numel() for p in model.parameters())
    assert coverage.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    missing = sum(part.parameters for part in coverage.left_out)
    assert coverage.watched_parameters + missing == coverage.parameters


def test_watch_returns_what_it_covers() -> None:
    model = Mlp()
    coverage = logra.init("toy").watch(model, name_filter=["first", "head"])
    check_sums(coverage, model)
    assert coverage.watched == (
        WatchedModule("first", "Linear", (11, 7), 77),
        WatchedModule("head", "Linear", (4, 9), 36),
    )
    assert left_out(coverage) == {
        reasons.LEFT_BY_FILTERS: (99, ("second.weight",)),
        reasons.BIASES: (15, ("first.bias", "head.bias")),
    }
    assert coverage.share == 113 / 227
    assert str(coverage).splitlines() == [
        "watched: first: 1 x Linear [11, 7], 77",
        "watched: head: 1 x Linear [4, 9], 36",
        "watched parameters: 113 of 227 (49.8%)",
        "left out: 99 layers that the filters leave out: second.weight",
        "left out: 15 biases of watched layers, logged with bias=True: first.bias, head.bias",
    ]
    with_bias = logra.init("toy").watch(model, bias=True)
    check_sums(with_bias, model)
    assert with_bias.watched[0] == WatchedModule("first", "Linear", (11, 8), 88)
    assert with_bias.left_out == ()


def test_norms_embeddings_and_alike_layers() -> None:
    model = tiny_llama()
    coverage = logra.init("toy").watch(model, name_filter=["mlp"])
    check_sums(coverage, model)
    found = left_out(coverage)
    assert found[reasons.EMBEDDINGS] == (61 * 24, ("model.embed_tokens.weight",))
    assert found[reasons.NORMS][0] == 5 * 24
    assert "model.layers.*.self_attn.q_proj.weight" in found[reasons.LEFT_BY_FILTERS][1]
    assert "watched: model.layers.*.mlp.down_proj: 2 x Linear [24, 40], 1,920" in str(coverage)
    watched = logra.init("toy").watch(model, type_filter=[nn.Embedding])
    assert reasons.EMBEDDINGS not in left_out(watched)


def test_convolutions_that_are_not_chosen_and_those_without_a_kind() -> None:
    model = nn.Sequential(SmallCnn(), nn.Conv1d(2, 3, 2, bias=False))
    coverage = logra.init("toy").watch(model, type_filter=[nn.Linear])
    check_sums(coverage, model)
    found = left_out(coverage)
    assert "*.grouped.weight" in found[reasons.LEFT_BY_FILTERS][1]
    assert found[reasons.CONVOLUTIONS] == (12, ("*.weight",))


def test_fused_experts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.ones(4, 3, 5))
            self.scale = nn.Parameter(torch.ones(5))

    model = nn.Sequential(nn.Linear(5, 3), Experts())
    coverage = logra.init("toy").watch(model)
    check_sums(coverage, model)
    assert left_out(coverage)[reasons.STACKED] == (60, ("*.gate_up",))
    assert left_out(coverage)[reasons.OTHERS] == (5, ("*.scale",))


@pytest.mark.filterwarnings("ignore:watch. left out 1.out_proj")
def test_a_weight_that_is_used_without_its_layer() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.MultiheadAttention(4, 2)])
    coverage = logra.init("toy").watch(model)
    check_sums(coverage, model)
    assert left_out(coverage)[reasons.BYPASSED] == (
        20,
        ("*.out_proj.weight", "*.out_proj.bias"),
    )
    assert left_out(coverage)[reasons.OTHERS][1] == ("*.in_proj_weight", "*.in_proj_bias")


def test_a_tied_weight_counts_once() -> None:
    model = tiny_gpt2()
    run = logra.init("toy")
    coverage = run.watch(model, name_filter=["mlp"])
    check_sums(coverage, model)
    shared = "transformer.wte.weight = lm_head.weight"
    assert shared in left_out(coverage)[reasons.EMBEDDINGS][1]
    assert coverage.notes == ()
    with pytest.warns(UserWarning, match="its weight is also that of transformer.wte"):
        coverage = run.watch(model, type_filter=[nn.Linear])
    check_sums(coverage, model)
    assert coverage.watched_parameters == 61 * 24
    assert coverage.notes[0].startswith("module lm_head: its weight is also that of transformer")


class LoraLinear(nn.Module):
    """A linear layer as PEFT has it: the base frozen, B zero before training."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, outputs, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Any:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_frozen_bases_and_a_lora_factor_whose_partner_is_zero() -> None:
    model = nn.Sequential(LoraLinear(5, 4), nn.ReLU(), LoraLinear(4, 3))
    run = logra.init("toy")
    message = (
        "module 0.lora_A.default and 1 more: the rows are zero as long as lora_B is zero, as "
        "before training; train first, or leave lora_A out by name_filter"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        coverage = run.watch(model, name_filter=["lora"])
    assert [warning.filename for warning in caught] == [__file__]
    check_sums(coverage, model)
    assert left_out(coverage) == {
        reasons.FROZEN: (39, ("*.base_layer.weight", "*.base_layer.bias"))
    }
    assert coverage.share == 1.0
    assert "32 of 71 (45.1%); 32 of 32 (100.0%) that are trained" in str(coverage)
    with run(data_id=[0], save=False) as logged:
        model(torch.ones(1, 5)).sum().backward()
    assert not logged.gradients()["0.lora_A.default"].any()
    assert logged.gradients()["2.lora_B.default"].any()
    for part in model:
        if isinstance(part, LoraLinear):
            nn.init.ones_(part.lora_B["default"].weight)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.watch(model, name_filter=["lora"]).notes == ()


def test_the_store_keeps_it_and_info_shows_it(
    tmp_path: Path, model: nn.Module, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, model, data)
    store = Store.open(tmp_path / "toy")
    assert store.coverage == logra.init("other").watch(model).as_dict()
    assert main(["info", str(tmp_path / "toy")]) == 0
    shown = capsys.readouterr().out
    assert "coverage     watched parameters: 212 of 227 (93.4%)\n" in shown
    assert "             left out: 15 biases of watched layers" in shown


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": "x"},
        {"parameters": 10**400, "watched_parameters": 10**800},
        {"left_out": [{"reason": "r", "parameters": 1, "names": [3]}]},
        {"left_out": 5},
        {"notes": None},
    ],
)
def test_what_a_stranger_wrote_there_is_passed_over(
    tmp_path: Path, model: nn.Module, data: Data, capsys: Any, change: dict[str, Any]
) -> None:
    finished(tmp_path, model, data)
    edit_manifest(tmp_path / "toy", lambda manifest: manifest["coverage"].update(change))
    assert main(["info", str(tmp_path / "toy")]) == 0
    assert "coverage" not in capsys.readouterr().out


def test_a_store_without_it_is_resumed_as_it_is(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = make_run(tmp_path, model)
    run.setup(RAW)
    log_all(run, model, data)
    run.finalize()
    edit_manifest(tmp_path / "toy", lambda manifest: manifest.pop("coverage"))
    again = make_run(tmp_path, model, resume=True)
    again.setup(RAW)
    with again(data_id=["new"]):
        model(data[0][:1]).sum().backward()
    again.finalize()
    store = Store.open(tmp_path / "toy")
    assert (store.num_rows, store.coverage) == (13, None)


def test_a_coverage_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(logra.StoreError, match="coverage: cannot be written as JSON"):
        StoreWriter.create(tmp_path, modules=[logra.Module("a", 1, 1)], coverage=object())
