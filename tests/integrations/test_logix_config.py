"""LogIX's configuration file, and the options of init."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_models import Mlp, causal_loss, ragged_batch, tiny_gpt2
from toy_run import RAW, Data, log_all, log_queries, loss_of, make_run, refused

import logra_kernels as logix
from logra_kernels import Store


def write_config(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_config_file(tmp_path: Path, model: nn.Module, data: Data) -> None:
    path = write_config(
        tmp_path,
        f"""
        root_dir: {tmp_path}/from_file
        logging:
          flush_threshold: 200
          num_workers: 1
          cpu_offload: true
          log_dtype: float32
        lora:
          init: rademacher
          rank: [2, 3]
          parameter_sharing: false
        influence:
          damping: 0.25
          relative_damping: true
          mode: l-relatif
          flatten: false
        """,
    )
    run = logix.init(project="llm", config=path)
    run.watch(model)
    run.add_lora()
    run.setup(RAW)
    log_all(run, model, data)
    run.finalize()
    store = Store.open(tmp_path / "from_file" / "llm")
    assert store.dtype == "float32"
    assert len(store.shards) == 6  # 18 float32 columns a row, two rows in 200 bytes
    assert [(m.ko, m.ki) for m in store.modules] == [(2, 3)] * 3
    assert store.projection["kind"] == "rademacher"
    run.eval()
    log_queries(run, model, data, slice(1))
    result = run.compute_influence_all()
    assert result.mode == "l-relatif"
    explicit = run.compute_influence_all(damping_scale=0.25, mode="l-relatif")
    assert torch.equal(result.scores, explicit.scores)


def test_keywords_win_over_the_file(tmp_path: Path) -> None:
    path = write_config(tmp_path, "lora: {rank: 8}\ninfluence: {damping: 1.0e-3}\n")
    config = logix.init("a", path, rank=4, damping_scale=0.2).config
    assert (config.rank, config.damping, config.damping_scale) == (4, None, 0.2)
    config = logix.init("a", path).config
    assert (config.rank, config.damping, config.damping_scale) == (8, 1e-3, None)
    path = write_config(tmp_path, "influence: {damping_scale: auto}\n")
    assert logix.init("a", path).config.damping_scale == "auto"
    assert config.root_dir == "./logra"
    assert logix.init("a", {"lora": {"rank": 5}}).config.rank == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logging: {num_workers: 4}", "logging.num_workers: expected 1, got 4: one background"),
        ("logging: {cpu_offload: false}", "logging.cpu_offload: expected True, got False: the cov"),
        ("logging: {log_dtype: int3}", "logging.log_dtype: expected none (float32), float16"),
        ("logging: {flush_threshold: 0}", "logging.flush_threshold: expected a number of bytes"),
        ("lora: {parameter_sharing: true}", "lora.parameter_sharing: expected False, got True"),
        ("lora: {parameter_sharing_groups: [q]}", "lora.parameter_sharing_groups: expected None"),
        ("lora: {init: eigen}", "coordinates: expected a number with init 'eigen', and none with"),
        ("lora: {coordinates: 9}", "coordinates: expected a number with init 'eigen', and none"),
        ("lora: {rank: -1}", "rank: expected an integer >= 1"),
        ("lora: {alpha: 1}", "no key lora.alpha; there are init, rank, coordinates, seed"),
        ("influence: {flatten: true}", "influence.flatten: expected False, got True"),
        ("influence: {relative_damping: 1}", "influence.relative_damping: expected true or false"),
        ("influence: {damping: high}", "damping: expected a finite number >= 0, got 'high'"),
        ("storage: {type: lmdb}", "no key 'storage'; there are root_dir, project, logging"),
        ("project: other", "project is 'other', init was given 'llm'"),
        ("logging: 3", "logging: expected keys and values, got 3"),
        ("- a", "expected keys and values, got list"),
        ("a: [", "not a YAML file"),
    ],
)
def test_config_refuses(tmp_path: Path, text: str, message: str) -> None:
    refused(message, logix.init, "llm", write_config(tmp_path, text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, "init: no option 'ranks'; there are root_dir, rank, init"),
        (
            {"dtype": "bfloat16"},
            "dtype: expected one of float16, float32, int8, int4, int2, sign, got 'bfloat16'",
        ),
        ({"init": "orthogonal"}, "init: expected one of random, normal, rademacher"),
        ({"on_nonfinite": "drop"}, "on_nonfinite: expected one of raise, skip, got 'drop'"),
        ({"averaged_loss": "no"}, "averaged_loss: expected one of raise, warn, allow"),
        ({"damping": 1.0, "damping_scale": 1.0}, "damping: expected damping or damping_scale"),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1, got 0"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"allow_unused": 1}, "allow_unused: expected True or False, got 1"),
        ({"config": "nowhere.yaml"}, "config: no file nowhere.yaml"),
        ({"config": 5}, "config: expected a file's path or a dictionary, got 5"),
        ({"mode": "ratio"}, "mode: expected one of dot, l-relatif, l2, theta-relatif"),
        ({"damping": -1}, "damping: expected a finite number >= 0, got -1"),
        (
            {"damping_scale": True},
            "damping_scale: expected a finite number >= 0 or 'auto', got True",
        ),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    refused(message, logix.init, "llm", **options)


@pytest.mark.parametrize("project", ["", "a/b", "..", 3])
def test_project_is_a_folder_name(project: Any) -> None:
    refused("project: expected the name of a folder", logix.init, project)


def test_the_advice_for_a_trainer_trains(tmp_path: Path) -> None:
    """What is said of LogIX's huggingface, followed to the letter."""
    from transformers import Trainer, TrainingArguments

    model: Any = tiny_gpt2()
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    run = logix.init("trained", root_dir=str(tmp_path), check_weights=False)
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=2)
    run.setup({"save": "grad"})
    with pytest.raises(
        AttributeError, match=r"with run\(data_id, mask, weight_gradients=True\): re"
    ):
        _ = run.huggingface  # type: ignore[attr-defined]

    class Logged(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return causal_loss(model, inputs["input_ids"], inputs["attention_mask"])

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            data_id, mask = inputs.pop("number"), inputs["attention_mask"]
            with run(data_id, mask, weight_gradients=True):
                return super().training_step(model, inputs, num_items_in_batch)

    ids, mask = ragged_batch(61, [9, 4, 7, 5], "right")
    examples = [
        {"input_ids": ids[n], "attention_mask": mask[n], "number": torch.tensor(n)}
        for n in range(4)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=1, per_device_train_batch_size=2,
        learning_rate=1e-2, report_to=[], save_strategy="no", remove_unused_columns=False,
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stepped on parameters")
        Logged(model, arguments, train_dataset=examples).train()
    run.finalize()
    assert sorted(Store.open(tmp_path / "trained").ids.to_pylist()) == ["0", "1", "2", "3"]
    assert (model.transformer.h[0].mlp.c_fc.weight - before).abs().max() > 1e-3


def test_the_advice_for_lightning_trains(tmp_path: Path) -> None:
    """Lightning's order of calls: its hooks stand around an optimizer step with a closure."""
    model, data = Mlp(), (torch.randn(2, 7), torch.tensor([0, 3]))
    before = model.first.weight.detach().clone()
    run = make_run(tmp_path, model, check_weights=False)
    with pytest.raises(
        AttributeError, match=r"run.start\(data_id, mask, weight_gradients=True\) in"
    ):
        _ = run.lightning  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, data, slice(2))
        loss.backward()
        return loss

    run.start(["a", "b"], weight_gradients=True)  # on_train_batch_start
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    run.end()  # on_train_batch_end
    assert not torch.equal(before, model.first.weight)
    assert run.last_rows()[0] == ["a", "b"]
