"""Rows that are logged while Hugging Face's Trainer trains, whose loss is divided by a count."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import IGNORED, autograd_rows, make_layers, tiny_llama

import logra_kernels as logra
from logra_kernels import Store


def test_rows_of_trainer_are_those_of_summed_losses(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_llama()
    run = logra.init("trained", root_dir=str(tmp_path), dtype="float32", check_weights=False)
    run.watch(model, name_filter=["mlp"])
    run.setup({"save": "grad"})
    lengths = [9, 4, 7, 5]
    examples = [torch.randint(1, 61, (length,)) for length in lengths]

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens = [one["tokens"] for one in chosen]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
        labels = ids.masked_fill(mask == 0, IGNORED)
        number = torch.tensor([one["number"] for one in chosen])
        return {"number": number, "input_ids": ids, "attention_mask": mask, "labels": labels}

    class LoggingTrainer(transformers.Trainer):  # type: ignore[name-defined]
        def training_step(
            self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
        ) -> Tensor:
            number = inputs.pop("number")
            with run(
                number,
                inputs["attention_mask"],
                loss_scale=1 / num_items_in_batch,
                weight_gradients=True,
            ):
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss

    # One step over two batches of two: the count is that of all four examples.
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=1,
        gradient_accumulation_steps=2, remove_unused_columns=False, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=0.0,
    )  # fmt: skip
    data: Any = [{"tokens": tokens, "number": n} for n, tokens in enumerate(examples)]
    LoggingTrainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train()
    run.finalize()

    layers = make_layers(model, [module.name for module in run.modules])

    def single(n: int) -> Tensor:
        alone = examples[n][None]
        loss: Tensor = model(input_ids=alone, labels=alone).loss * (lengths[n] - 1)
        return loss

    want = autograd_rows(model, layers, [partial(single, n) for n in range(4)])
    store = Store.open(run.path)
    assert sorted(store.ids.to_pylist()) == ["0", "1", "2", "3"]
    order = [int(name) for name in store.ids.to_pylist()]
    got = torch.from_numpy(store.take(range(4)))
    # float32: a chain of some thirty products, and the sums over tokens in another order
    assert (got - want[order]).abs().max() <= 30 * 2**-23 * want.abs().max()
