"""Losses that are no sum: told from sums by the end of their graph, or scaled back by the user."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy_models import IGNORED, Mlp, autograd_rows, make_layers, ragged_batch, tiny_llama

from logra_kernels.capture import Capture

COUNT = 4
CLASSES = torch.tensor([0, 1, 2, 1])
TARGETS = torch.full((COUNT, 4), 0.25, dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

Loss = Callable[[Tensor], Tensor]  # of the model's output [N, 4]


def refuse(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mlp().double(), torch.randn(COUNT, 7, dtype=torch.float64)


def rows(model: nn.Module, x: Tensor, loss: Loss, **options: Any) -> Tensor:
    with Capture(model, make_layers(model), len(x), **options) as capture:
        loss(model(x)).backward()
    return capture.rows()


def summed(out: Tensor) -> Tensor:
    return functional.cross_entropy(out, CLASSES[: len(out)], reduction="sum")


class MeanOfItsOwn(torch.autograd.Function):
    """As fused losses are made: nothing shows what it does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        mean: Tensor = gradient * 2 * x / x.numel()
        return mean


def long_sum(out: Tensor) -> Tensor:
    """The mean is the last of a hundred terms."""
    total = out.square().mean()
    for _ in range(100):
        total = out[0, 0] + total
    return total


NOT_SUMMED: dict[str, tuple[Loss, str]] = {
    "a count": (lambda out: summed(out) / 7, "a sum divided by 7 (DivBackward0)"),
    "num_items_in_batch": (lambda out: summed(out) / torch.tensor(7), "a sum divided by 7"),
    "a scalar": (lambda out: torch.ops.aten.div.Scalar(summed(out), 7), "a sum divided by 7"),
    "in place": (lambda out: summed(out).div_(7), "a sum divided by 7"),
    "one over a count": (lambda out: summed(out) * (1 / 7), "a sum times 0.142857"),
    "reciprocal": (lambda out: summed(out) * torch.tensor(7.0).reciprocal(), "a sum times 0.14"),
    "half undone": (lambda out: functional.cross_entropy(out, CLASSES) * 2, "a mean (NllLoss"),
    "nanmean": (lambda out: out.square().nanmean(), "a sum divided by 16 (DivBackward0)"),
    "batchmean": (
        lambda out: functional.kl_div(out.log_softmax(1), TARGETS, reduction="batchmean"),
        "a sum divided by 4 (DivBackward0)",
    ),
    "grad scaler": (
        lambda out: torch.amp.GradScaler("cpu").scale(summed(out)),
        "a sum times 65536",
    ),
    "a Function": (MeanOfItsOwn.apply, "the result of MeanOfItsOwnBackward"),
    "compiled": (
        torch.compile(lambda out: out.square().mean(), backend="aot_eager"),
        "the result of CompiledFunctionBackward, which does not show whether it is a mean",
    ),
    "many terms": (long_sum, "a mean (MeanBackward0)"),
    "a norm": (lambda out: out.norm(), "a function of the sum that is not linear (LinalgVector"),
    "perplexity": (lambda out: summed(out).exp(), "a function of the sum that is not linear (Exp"),
    "the sum of a mean": (lambda out: out.square().mean().sum(), "a mean (MeanBackward0)"),
    "the mean of a quotient": (lambda out: (summed(out) / 7)[None].mean(0), "a sum divided by 7"),
    "means in a stack": (
        lambda out: torch.stack([out[:2].square().mean(), out[2:].square().mean()]).sum(),
        "a mean (MeanBackward0)",
    ),
    "the mean of a stack": (
        lambda out: torch.stack([summed(out), out.square().sum()]).mean(), "a mean (MeanBackward0)"
    ),
    "1 - mean": (lambda out: 1 - out.square().mean(), "a mean (MeanBackward0)"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*GradScaler")
@pytest.mark.parametrize("name", NOT_SUMMED)
def test_what_is_no_sum_is_refused(name: str) -> None:
    loss, said = NOT_SUMMED[name]
    model, x = small()
    with refuse(f"loss: expected a sum over examples and tokens, got {said}") as error:
        rows(model, x, loss)
    assert "run(..., loss_scale=)" in str(error.value)
    rows(model, x, loss, averaged_loss="allow")


@pytest.mark.parametrize(
    "begin",
    [
        lambda out: summed(out).backward(torch.tensor(0.25, dtype=torch.float64)),
        lambda out: out.square().sum(1).backward(torch.full((COUNT,), 0.25)),
        lambda out: torch.autograd.backward([out.square().sum(1)], [torch.full((COUNT,), 0.25)]),
        lambda out: torch.autograd.backward(
            [summed(out)], grad_tensors=[torch.tensor(0.25, dtype=torch.float64)]
        ),
    ],
)
def test_a_gradient_that_divides_is_refused(begin: Callable[[Tensor], None]) -> None:
    model, x = small()
    with refuse("got a sum times 0.25"), Capture(model, make_layers(model), COUNT):
        begin(model(x))


def mean_of(out: Tensor, y: Tensor, **options: Any) -> Tensor:
    return functional.cross_entropy(out, y, **options)


def sum_of(out: Tensor, y: Tensor, **options: Any) -> Tensor:
    return functional.cross_entropy(out, y, reduction="sum", **options)


def squares(out: Tensor, y: Tensor) -> Tensor:
    return out.square().sum()


PairLoss = Callable[[Tensor, Tensor], Tensor]  # of outputs [n, 4] and classes [n]
RIGHT: dict[str, tuple[PairLoss, PairLoss]] = {  # {name: (the batch's loss, a single example's)}
    "times n": (lambda out, y: mean_of(out, y) * COUNT, sum_of),
    "times a tensor": (lambda out, y: mean_of(out, y) * torch.tensor(COUNT), sum_of),
    "times what counts": (
        lambda out, y: mean_of(out, y, ignore_index=2) * (y != 2).sum(),
        lambda out, y: sum_of(out, y, ignore_index=2),
    ),
    "weights of classes": (
        lambda out, y: mean_of(out, y, weight=WEIGHT) * WEIGHT[y].sum(),
        lambda out, y: sum_of(out, y, weight=WEIGHT),
    ),
    "smoothed": (
        lambda out, y: mean_of(out, y, label_smoothing=0.1) * COUNT,
        lambda out, y: sum_of(out, y, label_smoothing=0.1),
    ),
    "mean over an axis": (lambda out, y: out.square().sum(1).mean(-1) * COUNT, squares),
    "over one over a count": (lambda out, y: out.square().mean() / (1 / out.numel()), squares),
    "there and back": (lambda out, y: 3 * (sum_of(out, y) / 3), sum_of),
    "scaled and unscaled": (
        lambda out, y: sum_of(out, y) * torch.tensor(1024.0) / torch.tensor(1024.0), sum_of
    ),
    "numbers": (
        lambda out, y: -0.3 * sum_of(out, y) * 2.0, lambda out, y: -0.6 * sum_of(out, y)
    ),
    "half a square": (
        lambda out, y: 0.5 * squares(out, y), lambda out, y: squares(out, y) / 2
    ),
    "a third of more than three": (
        lambda out, y: (1 / 3) * squares(out, y), lambda out, y: squares(out, y) / 3
    ),
    "a small term": (
        lambda out, y: sum_of(out, y) + 0.01 * squares(out, y),
        lambda out, y: sum_of(out, y) + 0.01 * squares(out, y),
    ),
    "norms, one by one": (
        lambda out, y: torch.stack([one.norm() for one in out]).sum(), lambda out, y: out.norm()
    ),
    "a stack of terms": (
        lambda out, y: torch.cat([sum_of(out, y)[None], squares(out, y)[None]]).sum(),
        lambda out, y: sum_of(out, y) + squares(out, y),
    ),
    "means of examples": (
        lambda out, y: torch.stack([one.square().mean() for one in out]).sum(),
        lambda out, y: out.square().mean(),
    ),
    "a loop": (
        lambda out, y: sum((one.norm() for one in out), torch.zeros(())),
        lambda out, y: out.norm(),
    ),
}  # fmt: skip


def single_rows(model: nn.Module, x: Tensor, loss: PairLoss) -> Tensor:
    singles = [lambda n=n: loss(model(x[n : n + 1]), CLASSES[n : n + 1]) for n in range(len(x))]
    return autograd_rows(model, make_layers(model), singles)


def assert_equal_rows(got: Tensor, want: Tensor, allowed: float = 1e-10) -> None:
    assert (got - want).abs().max() <= allowed * want.abs().max()


@pytest.mark.parametrize("name", RIGHT)
def test_a_sum_is_told_by_what_its_factors_come_to(name: str) -> None:
    batch, single = RIGHT[name]
    model, x = small()
    got = rows(model, x, lambda out: batch(out, CLASSES))
    assert_equal_rows(got, single_rows(model, x, single))


def test_one_example_s_loss_may_be_any_function() -> None:
    model, x = small()
    got = rows(model, x[:1], lambda out: (sum_of(out, CLASSES[:1]) / out.norm()).sqrt())
    want = single_rows(model, x[:1], lambda out, y: (sum_of(out, y) / out.norm()).sqrt())
    assert_equal_rows(got, want)


SCALED: dict[str, tuple[PairLoss, Any]] = {  # {name: (the batch's loss, its scale)}
    "mean": (mean_of, 1 / COUNT),
    "num_items_in_batch": (lambda out, y: sum_of(out, y) / torch.tensor(7), 1 / 7),
    "a tensor": (lambda out, y: sum_of(out, y) * 0.5, torch.tensor(0.5)),
    "grad scaler": (
        lambda out, y: torch.amp.GradScaler("cpu").scale(sum_of(out, y)),
        torch.amp.GradScaler("cpu").get_scale(),
    ),
    "compiled mean": (torch.compile(mean_of, backend="aot_eager"), 1 / COUNT),
    "compiled sum": (torch.compile(sum_of, backend="aot_eager"), 1),
}


@pytest.mark.filterwarnings("ignore:.*GradScaler")
@pytest.mark.parametrize("name", SCALED)
def test_loss_scale_gives_the_rows_of_the_sum(name: str) -> None:
    loss, scale = SCALED[name]
    model, x = small()
    got = rows(model, x, lambda out: loss(out, CLASSES), loss_scale=scale)
    assert_equal_rows(got, single_rows(model, x, sum_of))


def test_loss_scale_of_token_scores() -> None:
    model, x = small()
    layers = make_layers(model)
    queries = torch.randn(2, sum(layer.ko * layer.ki for layer in layers), dtype=torch.float64)
    with Capture(model, layers, COUNT, token_queries=queries, loss_scale=0.25) as capture:
        mean_of(model(x), CLASSES).backward()
    want = queries @ single_rows(model, x, sum_of).T
    assert_equal_rows(capture.token_scores().sum(2), want)


@pytest.mark.parametrize(
    "scale", [0, -1.0, float("nan"), float("inf"), True, "1", torch.ones(2), torch.tensor(0.0)]
)
def test_loss_scales_that_are_refused(scale: Any) -> None:
    model, _ = small()
    with refuse(
        "loss_scale: expected a finite number above 0 (what the summed loss was multiplied by), got"
    ):
        Capture(model, make_layers(model), COUNT, loss_scale=scale)


def language_model_rows(**call: Any) -> tuple[Tensor, Tensor]:
    """Rows of HF's own loss of `labels=`, and those of single examples' summed losses."""
    model = tiny_llama(torch.float64)
    layers = make_layers(model, rank=4)
    ids, mask = ragged_batch(61, [9, 4, 7], "right")
    labels = ids.masked_fill(mask == 0, IGNORED)
    count = int((labels[:, 1:] != IGNORED).sum())
    scale = call.pop("scale")(count)
    call = {name: value(count) for name, value in call.items()}
    with Capture(model, layers, 3, mask, loss_scale=scale) as capture:
        model(input_ids=ids, attention_mask=mask, labels=labels, **call).loss.backward()

    def single(n: int) -> Tensor:
        alone = ids[n : n + 1, : int(mask[n].sum())]
        loss: Tensor = model(input_ids=alone, labels=alone).loss * (alone.shape[1] - 1)
        return loss

    return capture.rows(), autograd_rows(model, layers, [partial(single, n) for n in range(3)])


@pytest.mark.parametrize(
    "call",
    [
        {"scale": lambda count: 1 / count},
        {"scale": lambda count: None, "num_items_in_batch": lambda count: 1},
        {"scale": lambda count: 1 / 50, "num_items_in_batch": lambda count: 50},
        {
            "scale": lambda count: 1 / torch.tensor(count),
            "num_items_in_batch": lambda count: torch.tensor(count),
        },
    ],
)
def test_losses_of_labels(call: dict[str, Any]) -> None:
    """HF's loss is computed in float32, whatever the model is in."""
    got, want = language_model_rows(**call)
    assert_equal_rows(got, want, 2**-20)


def test_num_items_in_batch_is_refused_without_a_scale() -> None:
    """What transformers' Trainer calls; its rows would shrink with the batch."""
    with refuse("loss: expected a sum over examples and tokens, got a sum divided by 17"):
        language_model_rows(scale=lambda count: None, num_items_in_batch=torch.tensor)
