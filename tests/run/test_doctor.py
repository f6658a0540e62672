"""`Run.doctor`: each defect planted is found, a healthy loop has none, and nothing is changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.utils.data import DataLoader, TensorDataset
from toy_models import Mlp, causal_loss, ragged_batch, tiny_gpt2, tiny_llama
from toy_run import COUNT, RAW, Data, log_all, loss_of, make_run, refuse

import logra_kernels as logra
from logra_kernels.run import Diagnosis
from logra_kernels.run.user_batches import example_alone

Batch = Any


def batches_of(data: Data, size: int = 4) -> list[Batch]:
    x, y = data
    return [(x[n : n + size], y[n : n + size]) for n in range(0, len(x), size)]


def summed(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: cross_entropy(model(batch[0]), batch[1], reduction="sum")


def look(model: nn.Module, data: Data, loss: Any = None, **options: Any) -> Diagnosis:
    """The diagnosis of a loop over `data`, projected to 2 x 2."""
    run = logra.init("toy", dtype=options.pop("dtype", "float16"))
    run.watch(model, name_filter=options.pop("name_filter", None))
    run.add_lora(rank=options.pop("rank", 2))
    return run.doctor(loss or summed(model), batches_of(data), **options)


def names(diagnosis: Diagnosis) -> list[str]:
    assert diagnosis.healthy == (not diagnosis.findings)
    for found in diagnosis.findings:
        assert found.severity in ("error", "warning")
        assert f"{found.severity}: {found.name}: {found.seen}\n  {found.advice}" in str(diagnosis)
    return [found.name for found in diagnosis.findings]


# --- healthy


def test_a_healthy_loop_has_no_finding(model: nn.Module, data: Data) -> None:
    diagnosis = look(model, data)
    assert names(diagnosis) == []
    assert (diagnosis.examples, diagnosis.read, diagnosis.dtype) == (8, 12, "float32")
    assert str(diagnosis).endswith("nothing found")
    assert dict(diagnosis.unchecked) == {"masked-tokens": "there are no mask and no labels [N, T]"}
    assert [module.module for module in diagnosis.gradients] == ["first", "second", "head"]
    assert all(0 < module.smallest <= module.largest for module in diagnosis.gradients)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_padded_language_models_are_healthy(make: Any, side: str, dtype: torch.dtype) -> None:
    """Rows alone are without the padding: with its positions told, either side is right."""
    model = make(dtype)
    run = logra.init("toy")
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=2)
    batches = []
    for n in range(2):
        ids, mask = ragged_batch(61, (5, 9, 2, 7), side, n)
        batches.append({"input_ids": ids, "attention_mask": mask})

    def loss(batch: Batch) -> Tensor:
        return causal_loss(model, batch["input_ids"], batch["attention_mask"])

    diagnosis = run.doctor(loss, batches, mask="attention_mask", bos_token_id=0)
    assert names(diagnosis) == []
    assert dict(diagnosis.unchecked) == {}


def test_a_loader_says_how_many_rows_there_will_be(model: nn.Module, data: Data) -> None:
    run = logra.init("toy")
    run.watch(model)
    run.add_lora(rank=2)
    loader = DataLoader(TensorDataset(*data), batch_size=3, shuffle=True)
    diagnosis = run.doctor(summed(model), loader, examples=2, read=5)
    assert (names(diagnosis), diagnosis.examples, diagnosis.read) == ([], 2, 6)
    assert "more-columns-than-rows" not in diagnosis.unchecked
    listed = run.doctor(summed(model), list(loader), examples=2, read=5)
    assert listed.unchecked["more-columns-than-rows"] == "give num_rows="


def test_batches_of_one_example_leave_some_unchecked(model: nn.Module, data: Data) -> None:
    run = logra.init("toy")
    run.watch(model)
    run.add_lora(rank=2)
    diagnosis = run.doctor(summed(model), batches_of(data, 1))
    assert names(diagnosis) == []
    for name in ("averaged-loss", "batch-dependence", "padding"):
        assert diagnosis.unchecked[name] == "every batch has one example"
    mean = run.doctor(lambda batch: model(batch[0]).square().mean(), batches_of(data, 1))
    assert names(mean) == ["averaged-loss"]


# --- one defect each


def test_averaged_losses(model: nn.Module, data: Data) -> None:
    diagnosis = look(model, data, lambda batch: cross_entropy(model(batch[0]), batch[1]))
    assert names(diagnosis) == ["averaged-loss"]
    (found,) = diagnosis.findings
    start = "rows in a batch are 0.25 to 0.25 times those alone: the loss is a mean "
    assert found.seen.startswith(start)
    assert "NllLossBackward0 with reduction='mean'" in found.seen
    hidden = look(model, data, lambda batch: summed(model)(batch) / len(batch[0]))
    assert names(hidden) == ["averaged-loss"]
    assert hidden.findings[0].numbers["factors"] == pytest.approx([0.25, 0.25])


def test_a_mean_over_tokens_that_a_model_makes() -> None:
    """A model that is given labels divides by the tokens of the whole batch."""
    model = tiny_llama()
    run = logra.init("toy")
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=2)
    ids, mask = ragged_batch(61, (5, 9, 3, 7), "right")
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    diagnosis = run.doctor(lambda batch: model(**batch).loss, [batch], mask="attention_mask")
    assert names(diagnosis) == ["averaged-loss"]
    low, high = diagnosis.findings[0].numbers["factors"]
    assert (low, high) == pytest.approx((2 / 20, 8 / 20), rel=1e-3)


def test_examples_that_mix(data: Data) -> None:
    class Centred(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(dim=0) / 10)

    torch.manual_seed(0)
    model = Centred()
    assert names(look(model, data)) == ["batch-dependence"]


def test_attention_without_positions_of_padding() -> None:
    model = tiny_gpt2()
    run = logra.init("toy")
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=2)
    ids, mask = ragged_batch(61, (5, 9, 7, 9), "left")

    def loss(batch: Batch) -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        kept = batch["attention_mask"]
        labels = batch["input_ids"].masked_fill(kept == 0, -100)[:, 1:]
        labels = labels.masked_fill(kept[:, :-1] == 0, -100)
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")

    batch = {"input_ids": ids, "attention_mask": mask}
    diagnosis = run.doctor(loss, [batch], mask="attention_mask")
    assert names(diagnosis) == ["padding"]
    assert diagnosis.findings[0].numbers["padded"] == 2


def test_batch_norm_in_training_mode(data: Data) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    assert names(look(model, data)) == ["batch-norm"]
    assert names(look(model.eval(), data)) == []


def test_dropout_in_training_mode(data: Data) -> None:
    drop = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(7, 5), drop, nn.Linear(5, 4))
    diagnosis = look(model, data)
    assert names(diagnosis) == ["dropout"]
    assert diagnosis.findings[0].seen == "dropout is in training mode: module 1"
    drop.p = 0.0
    assert names(look(model, data)) == []


def test_chance_that_no_module_shows(model: nn.Module, data: Data) -> None:
    def loss(batch: Batch, training: bool = True) -> Tensor:
        return summed(model)((dropout(batch[0], 0.5, training), batch[1]))

    diagnosis = look(model, data, loss)
    assert names(diagnosis) == ["chance"]
    assert diagnosis.unchecked["batch-dependence"] == "rows depend on chance"
    in_training = look(model, data, lambda batch: loss(batch, model.training))
    assert names(in_training) == ["chance"]
    assert "batch-dependence" not in in_training.unchecked, "it was looked for in evaluation mode"


def test_examples_that_no_loss_bears(model: nn.Module, data: Data) -> None:
    def loss(batch: Batch) -> Tensor:
        losses = cross_entropy(model(batch[0]), batch[1], reduction="none")
        bears: Tensor = batch[0][:, 0] != data[0][2, 0]
        return (losses * bears).sum()

    diagnosis = look(model, data, loss)
    assert names(diagnosis) == ["zero-rows"]
    assert diagnosis.findings[0].seen == "1 of 8 examples have a zero row: nothing bears loss"


def test_a_module_without_gradient(data: Data) -> None:
    class TwoHeads(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(7, 4)

    diagnosis = look(TwoHeads(), data)
    assert names(diagnosis) == ["zero-modules"]
    assert diagnosis.findings[0].numbers["modules"] == ["other"]


def test_gradients_that_are_not_finite(model: nn.Module, data: Data) -> None:
    data[0][1, 0] = float("inf")
    diagnosis = look(model, data)
    assert names(diagnosis) == ["not-finite"]
    assert diagnosis.findings[0].numbers["examples"] == 1


@pytest.mark.parametrize(("scale", "name"), [(1e-6, "underflow"), (3e3, "overflow")])
def test_gradients_at_the_ends_of_float16(
    model: nn.Module, data: Data, scale: float, name: str
) -> None:
    """Gradients of activations near 1e-7 are float16's subnormals; 256 times 3e3 is beyond it."""
    half = model.half()

    def loss(batch: Batch) -> Tensor:
        logits = half(batch[0].half()).float()
        return scale * cross_entropy(logits, batch[1], reduction="sum")

    assert names(look(half, data, loss)) == [name]
    assert names(look(half, data, lambda batch: loss(batch) / scale)) == []


def test_rows_beyond_the_store(model: nn.Module, data: Data) -> None:
    """1e-43 is a subnormal of float32, in which rows are packed: it has five bits."""
    wide, double = model.double(), (data[0].double(), data[1])
    tiny = look(wide, double, lambda batch: 1e-43 * summed(wide)(batch), dtype="float32")
    assert names(tiny) == ["stored-range"]
    huge = look(wide, double, lambda batch: 1e40 * summed(wide)(batch))
    assert names(huge) == ["not-finite"]
    assert names(look(wide, double)) == []


def test_few_parameters(data: Data) -> None:
    model = nn.Sequential(nn.Linear(7, 300), nn.ReLU(), nn.Linear(300, 4, bias=False))
    assert names(look(model, data, name_filter=["2"])) == []
    model[0].requires_grad_(False)
    assert names(look(model, data, name_filter=["0"])) == ["few-parameters"]
    wide = nn.Sequential(nn.Linear(7, 300), nn.ReLU(), nn.Linear(300, 300), nn.Linear(300, 4))
    diagnosis = look(wide, data, name_filter=["3"])
    assert names(diagnosis) == ["few-parameters"]
    assert diagnosis.findings[0].seen == "1,200 of 93,904 parameters are watched (1.3%)"


@pytest.mark.filterwarnings("ignore:module lm_head")
def test_tied_weights() -> None:
    model = tiny_gpt2()
    run = logra.init("toy")
    run.watch(model, name_filter=["lm_head"])
    run.add_lora(rank=1)
    ids, mask = ragged_batch(61, (5, 5, 5), "right")

    def loss(batch: Batch) -> Tensor:
        return causal_loss(model, batch[0], torch.ones_like(batch[0]))

    diagnosis = run.doctor(loss, [(ids, mask)])
    assert names(diagnosis) == ["few-parameters", "tied-weights"]
    assert diagnosis.findings[1].numbers["modules"] == ["lm_head"]


def test_copies(model: nn.Module, data: Data) -> None:
    data[0][7], data[1][7] = data[0][2], data[1][2]
    diagnosis = look(model, data)
    assert names(diagnosis) == ["duplicates"]
    assert diagnosis.findings[0].seen == (
        "1 of 12 examples are copies of earlier ones (example 7 of example 2)"
    )


def test_more_columns_than_rows(model: nn.Module, data: Data) -> None:
    diagnosis = look(model, data, rank=4)
    assert names(diagnosis) == ["more-columns-than-rows"]
    assert diagnosis.findings[0].severity == "warning"
    assert diagnosis.findings[0].numbers == {"modules": 3, "columns": 16, "rows": COUNT}
    assert names(look(model, data, rank=4, num_rows=16)) == []
    run = logra.init("toy", damping=0)
    run.watch(model)
    run.add_lora(rank=4)
    (found,) = run.doctor(summed(model), batches_of(data)).findings
    assert found.severity == "error"
    run.setup({"statistic": "diagonal"})
    assert names(run.doctor(summed(model), batches_of(data))) == []


def token_batch(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    ids, mask = ragged_batch(61, lengths, "right")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def look_at_tokens(batch: dict[str, Tensor], **options: Any) -> Diagnosis:
    model = tiny_llama()
    run = logra.init("toy")
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=1)

    def loss(batch: Batch) -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:].flatten()
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")

    return run.doctor(loss, [batch], mask="attention_mask", **options)


def test_tokens_that_do_not_count() -> None:
    batch = token_batch((31, 31, 28))
    assert names(look_at_tokens(batch, bos_token_id=0)) == []
    batch["labels"][:, :-4] = -100
    batch["labels"][0] = -100
    diagnosis = look_at_tokens(batch, bos_token_id=0)
    assert names(diagnosis) == ["zero-rows"]
    assert diagnosis.findings[0].seen == "no token of 1 of 3 examples counts (example 0)"
    batch["labels"][0, 30] = 5
    batch["labels"][1:, :-4] = -100
    batch["labels"][1, 28:] = -100
    assert names(look_at_tokens(batch, bos_token_id=0)) == ["masked-tokens"]


def test_two_bos_tokens() -> None:
    batch = token_batch((5, 7, 7))
    batch["input_ids"][:2, :2] = 3
    batch["input_ids"][2, 0] = 3
    diagnosis = look_at_tokens(batch, bos_token_id=3)
    assert names(diagnosis) == ["doubled-bos"]
    assert diagnosis.findings[0].seen == "2 of 3 examples begin with two BOS tokens"
    assert names(look_at_tokens(batch)) == []  # the model's configuration says 1


# --- nothing is changed


def test_nothing_is_changed(tmp_path: Path, data: Data) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4), nn.Flatten()
    )
    head = nn.Linear(4, 4)  # no part of the watched model
    model[4].eval()
    model[0].weight.requires_grad_(False)
    summed(model)(batches_of(data)[0]).backward()
    run = make_run(tmp_path, model, rank=2)
    run.setup(RAW)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*data), batch_size=4, shuffle=True, generator=generator)

    def loss(batch: Batch) -> Tensor:
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return cross_entropy(head(model(batch[0])), batch[1], reduction="sum") * (1 + noise)

    def state() -> Iterator[Any]:
        yield [module.training for module in model.modules()]
        yield [parameter.requires_grad for parameter in model.parameters()]
        yield [parameter.grad for parameter in (*model.parameters(), *head.parameters())]
        yield [tensor.tolist() for tensor in model.state_dict().values()]
        yield [p.grad.tolist() for p in model.parameters() if p.grad is not None]
        yield [dict(m._forward_hooks) | dict(m._backward_hooks) for m in model.modules()]
        yield random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        yield torch.get_rng_state().tolist(), generator.get_state().tolist()
        yield torch.is_grad_enabled(), list(tmp_path.iterdir())

    before = list(state())
    diagnosis = run.doctor(loss, loader)
    assert list(state()) == before
    assert "batch-norm" in names(diagnosis)
    assert "chance" in names(diagnosis)
    with refuse("nothing was logged yet", RuntimeError):
        run.last_rows()


def test_a_store_that_is_being_written_goes_on(
    tmp_path: Path, model: nn.Module, data: Data
) -> None:
    run = make_run(tmp_path, model, rank=2)
    run.setup(RAW)
    log_all(run, model, data)
    ids, rows = run.last_rows()
    assert names(run.doctor(summed(model), batches_of(data))) == []
    assert run.last_rows()[0] == ids
    torch.testing.assert_close(run.last_rows()[1], rows, rtol=0, atol=0)
    run.finalize()
    assert run.store.num_rows == COUNT


# --- batches of many kinds, and errors


@pytest.mark.parametrize("kind", ["dictionary", "list", "names"])
def test_kinds_of_batches(model: nn.Module, data: Data, kind: str) -> None:
    run = logra.init("toy")
    run.watch(model)
    run.add_lora(rank=2)
    x, y = data
    labels = [f"class {n}" for n in y.tolist()]
    batches: dict[str, Batch] = {
        "dictionary": {
            "x": x,
            "inner": {"y": y},
            "id": list(range(COUNT)),
            "scale": torch.tensor(1),
        },
        "list": [x, y],
        "names": (x, labels),
    }

    def loss(batch: Batch) -> Tensor:
        if kind == "dictionary":
            batch = batch["x"], batch["inner"]["y"]
        elif kind == "names":
            batch = batch[0], torch.tensor([int(label[6:]) for label in batch[1]])
        return summed(model)(batch)

    diagnosis = run.doctor(loss, [batches[kind]], examples=3)
    assert (names(diagnosis), diagnosis.examples) == ([], 3)


def test_texts_and_a_function_that_takes_one(model: nn.Module, data: Data) -> None:
    run = logra.init("toy")
    run.watch(model)
    run.add_lora(rank=2)

    def rows(batch: Batch) -> list[int]:
        return [int(text) for text in batch]

    diagnosis = run.doctor(
        lambda batch: loss_of(model, data, rows(batch)), [[str(n) for n in range(COUNT)]]
    )
    assert (names(diagnosis), diagnosis.read) == ([], COUNT)
    taken = []

    def one(batch: Batch, n: int) -> Batch:
        taken.append(n)
        return batch[n : n + 1]

    run.doctor(lambda batch: loss_of(model, data, rows(batch)), [["0", "1", "2"]], one=one)
    assert set(taken) == {0, 1, 2}


def test_an_example_alone_is_without_its_padding() -> None:
    batch = token_batch((3, 5))
    inner = {"wide": torch.arange(20).reshape(2, 5, 2), "other": torch.ones(2, 4)}
    alone = example_alone({**batch, "inner": inner, "all": torch.ones(3)}, 0)
    assert alone["input_ids"].tolist() == [batch["input_ids"][0, :3].tolist()]
    assert alone["inner"]["wide"].tolist() == [[[0, 1], [2, 3], [4, 5]]]
    assert (alone["inner"]["other"].shape, alone["all"].shape) == ((1, 4), (3,))
    assert example_alone(batch, 0, trim=False)["input_ids"].shape == (1, 5)
    batch["attention_mask"][0] = 0
    assert example_alone(batch, 0)["input_ids"].shape == (1, 5)
    encoding = transformers.BatchEncoding(batch)
    assert type(example_alone(encoding, 1)) is type(encoding)
    pair = Pair(torch.arange(2), ["a", "b"])
    assert example_alone(pair, 1) == Pair(torch.tensor([1]), ["b"])


class Pair(NamedTuple):
    number: Tensor
    text: list[str]


def test_what_is_refused(model: nn.Module, data: Data) -> None:
    run = logra.init("toy")
    with refuse("doctor: no model is watched; call watch(model, ...) first", RuntimeError):
        run.doctor(summed(model), batches_of(data))
    run.watch(model)
    with refuse("batches: expected a loader or a list, got an iterator"):
        run.doctor(summed(model), iter(batches_of(data)))
    with refuse("batches: expected at least one batch, got none"):
        run.doctor(summed(model), [])
    with refuse("batches: expected tensors whose first axis is the examples, or lists of them, g"):
        run.doctor(summed(model), [5])
    with refuse("mask: the batch, a tuple, has no 'attention_mask'"):
        run.doctor(summed(model), batches_of(data), mask="attention_mask")
    with refuse("mask: expected the batch's key, or a function of a batch, got tensor"):
        run.doctor(summed(model), batches_of(data), mask=torch.ones(4, 1))  # type: ignore[arg-type]
    with refuse("one: expected a batch of one example, got 4"):
        run.doctor(summed(model), batches_of(data), one=lambda batch, n: batch)
    with refuse("loss_of: expected a loss of one number, got [4, 4]"):
        run.doctor(lambda batch: model(batch[0]), batches_of(data))
    with refuse("examples: expected a whole number of at least 1, got 0"):
        run.doctor(summed(model), batches_of(data), examples=0)
    with refuse("read: expected a whole number of at least 1, got 1.5"):
        run.doctor(summed(model), batches_of(data), read=1.5)  # type: ignore[arg-type]
    with refuse("no gradient reached a watched module", RuntimeError):
        run.doctor(lambda batch: batch[0].sum().requires_grad_(), batches_of(data))
    with run(data_id=[0], save=False):
        loss_of(model, data, slice(1)).backward()
        with refuse("doctor: a pass is open", RuntimeError):
            run.doctor(summed(model), batches_of(data))
    with run.pilot("pca", rank=2):
        with refuse("doctor: a pass is open, or a pilot", RuntimeError):
            run.doctor(summed(model), batches_of(data))
        with run(data_id=[0]):
            loss_of(model, data, slice(1)).backward()
