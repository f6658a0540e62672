"""What a capture does to the model (nothing that stays), and what it refuses."""

from __future__ import annotations

import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from refusals import refuse, refused
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointFunction,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from toy_models import (
    Mlp,
    Recurrent,
    SmallCnn,
    capture_rows,
    causal_loss,
    make_layers,
    ragged_batch,
    square_sum,
    tiny_gpt2,
    tiny_llama,
)

from logra_kernels.capture import Capture


def mlp_batch(count: int = 4) -> tuple[Mlp, Tensor]:
    torch.manual_seed(0)
    return Mlp(), torch.randn(count, 7)


@pytest.fixture
def model() -> Mlp:
    return mlp_batch()[0]


@pytest.fixture
def x() -> Tensor:
    return mlp_batch()[1]


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a capture could leave behind."""
    return {
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "backward": torch.autograd.backward,
        "checkpoint": (CheckpointFunction.__dict__.get("apply"), CheckpointFunction.apply),
    }


def same_traces(one: dict[str, Any], other: dict[str, Any]) -> bool:
    grads = zip(one.pop("grad"), other.pop("grad"), strict=True)
    return one == other and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in grads
    )


@pytest.mark.parametrize("fails_at", [None, "forward", "backward", "body", "never"])
def test_model_is_left_as_found(fails_at: str | None, model: Mlp, x: Tensor) -> None:
    model.second.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.second.eval()
    layers = make_layers(model, rank=3)
    before = traces(model)

    class Boom(Exception):
        pass

    def boom(*_: object) -> None:
        raise Boom

    try:
        with Capture(model, layers, 4):
            assert not any(p.requires_grad for p in model.parameters())
            out = model(x[:2] if fails_at == "forward" else x)
            if fails_at == "backward":
                out.register_hook(boom)
            if fails_at == "body":
                raise Boom
            if fails_at != "never":
                out.square().sum().backward()
    except (Boom, ValueError, RuntimeError) as error:
        expected: dict[str | None, type[Exception]] = {
            "forward": ValueError,
            "backward": Boom,
            "body": Boom,
            "never": RuntimeError,
        }
        assert type(error) is expected[fails_at]  # noqa: PT017
    else:
        assert fails_at is None
    assert same_traces(before, traces(model))


def test_no_weight_gradient_is_computed(model: Mlp, x: Tensor) -> None:
    capture_rows(model, make_layers(model), 4, lambda: model(x).square().sum())
    assert all(p.grad is None for p in model.parameters())


def test_the_pass_stops_at_the_lowest_watched_module(model: Mlp, x: Tensor) -> None:
    """Nothing below it is in the autograd graph, so that nothing there costs a backward pass."""
    layers = make_layers(model, ["head"])
    below: list[bool] = []
    with Capture(model, layers, 4):
        model.second.register_forward_hook(lambda m, a, out: below.append(out.requires_grad))
        model(x).square().sum().backward()
    assert below == [False]


def test_weight_gradients_on_request(model: Mlp, x: Tensor) -> None:
    layers = make_layers(model, bias=True)
    loss = lambda: model(x).square().sum()  # noqa: E731
    rows = capture_rows(model, layers, 4, loss)
    while_training = capture_rows(model, layers, 4, loss, weight_gradients=True)
    assert torch.allclose(rows, while_training, rtol=1e-6)
    weight, bias = model.head.weight.grad, model.head.bias.grad
    assert weight is not None
    assert bias is not None
    want = torch.cat([weight, bias[:, None]], dim=1)
    got = rows.sum(0)[-want.numel() :].reshape(want.shape)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_activations_are_let_go_with_the_pass(model: Mlp, x: Tensor) -> None:
    """A loss that the user keeps keeps its graph alive, and with it the hooks."""
    layers = make_layers(model, rank=3)
    seen: list[Any] = []

    def spy(call: Callable[..., Any], *arguments: Any) -> Any:
        seen.append(call(*arguments))
        return seen[-1]

    for layer in layers:
        layer.call = partial(spy, layer.call)  # type: ignore[method-assign]
    with Capture(model, layers, 4):
        loss = model(x).square().sum()
        assert [call.projected is None for call in seen] == [False] * 3
        loss.backward()
    assert [call.projected is None for call in seen] == [True] * 3


def test_zero_grad_inside_is_harmless(model: Mlp, x: Tensor) -> None:
    layers = make_layers(model)
    want = capture_rows(model, layers, 4, lambda: model(x).square().sum())
    with Capture(model, layers, 4) as capture:
        model.zero_grad()
        model(x).square().sum().backward()
        model.zero_grad(set_to_none=False)
    assert torch.equal(capture.rows(), want)


@pytest.mark.parametrize("inplace", [False, True])
def test_root_module_followed_by_an_inplace_activation(inplace: bool) -> None:
    """All weights frozen: the output that is made to require grad may be changed in place."""
    torch.manual_seed(0)
    first = nn.Linear(5, 6)
    model = nn.Sequential(first, nn.ReLU(inplace=inplace), nn.Linear(6, 3)).requires_grad_(False)
    x = torch.randn(4, 5)
    got = capture_rows(model, make_layers(model), 4, lambda: model(x).square().sum())
    out = functional.relu(first(x))
    dy = 2 * (model[2](out) @ model[2].weight) * (out > 0)
    want = torch.einsum("no,ni->noi", dy, x).flatten(1)
    assert torch.allclose(got[:, :30], want, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_gradients", [True, False])
def test_token_layer_followed_by_an_inplace_activation(bias: bool, weight_gradients: bool) -> None:
    """On tokens a linear layer's output is a view, which an in-place activation rebases."""
    torch.manual_seed(0)
    rows = []
    x = torch.randn(2, 3, 5)
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6, bias), nn.ReLU(inplace), nn.Linear(6, 3)
        )
        loss = partial(square_sum, model, x)
        rows.append(
            capture_rows(model, make_layers(model), 2, loss, weight_gradients=weight_gradients)
        )
    assert torch.equal(rows[0], rows[1])


def test_input_that_requires_grad_keeps_its_gradient(model: Mlp, x: Tensor) -> None:
    x.requires_grad_()
    capture_rows(model, make_layers(model), 4, lambda: model(x).square().sum())
    assert x.grad is not None
    inside = x.grad.clone()
    x.grad.zero_()
    model(x).square().sum().backward()
    assert torch.allclose(inside, x.grad, rtol=1e-5, atol=1e-6)


def test_autograd_grad_in_place_of_backward(model: Mlp, x: Tensor) -> None:
    layers = make_layers(model)
    want = capture_rows(model, layers, 4, lambda: model(x).square().sum())
    x.requires_grad_()
    with Capture(model, layers, 4) as capture:
        torch.autograd.grad(model(x).square().sum(), [x])
    assert torch.equal(capture.rows(), want)


# checkpointing


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rank", [None, 4])
def test_hf_gradient_checkpointing(
    make: Callable[[], Any], reentrant: bool, rank: int | None
) -> None:
    model = make()
    model.train()
    watched = [n for n, _ in model.named_modules() if re.search(r"mlp\.", n)]
    layers = make_layers(model, watched, rank=rank)
    ids, mask = ragged_batch(61, [9, 4, 7, 2], "right")
    want = capture_rows(model, layers, 4, lambda: causal_loss(model, ids, mask), mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 renames it
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = capture_rows(model, layers, 4, lambda: causal_loss(model, ids, mask), mask)
    assert torch.equal(got, want)
    assert all(p.grad is None for p in model.parameters())


class Segments(nn.Module):
    """Two checkpointed segments; the second one calls its linear layer twice."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6))
        self.second = nn.Linear(6, 6)

    def twice(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.second(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        for segment in (self.first, self.twice):
            if self.reentrant is None:
                x = segment(x)
            else:
                x = checkpoint(segment, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rank", [None, 4])
def test_checkpointing_by_hand(reentrant: bool, frozen: bool, rank: int | None) -> None:
    rows = []
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    for way in (None, reentrant):
        torch.manual_seed(0)
        model = Segments(way).requires_grad_(not frozen)
        layers = make_layers(model, rank=rank, bias=True)
        rows.append(capture_rows(model, layers, 3, partial(square_sum, model, x)))
    assert torch.equal(rows[0], rows[1])


def test_selective_checkpointing() -> None:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    model, x = mlp_batch()
    layers = make_layers(model, rank=3)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    want = capture_rows(model, layers, 4, lambda: model(x).square().sum())
    got = capture_rows(
        model, layers, 4,
        lambda: checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum(),
    )  # fmt: skip
    assert torch.equal(got, want)


# 2.6 does not see them (autograd then refuses the loss), 2.13 does; between them nobody looked
OLD_DYNAMO = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiled_model(compiled_before: bool, model: Mlp, x: Tensor) -> None:
    """Dynamo goes round the hooks; they see the same as without it."""
    layers = make_layers(model, rank=3)
    want = capture_rows(model, layers, 4, lambda: model(x).square().sum())
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager")
    if compiled_before:
        if OLD_DYNAMO:
            pytest.skip("this torch does not see hooks that come after compiling")
        fast(x).square().sum().backward()
    got = capture_rows(model, layers, 4, lambda: fast(x).square().sum())
    assert torch.allclose(got, want, rtol=1e-6)


def test_one_capture_inside_another() -> None:
    one, x = mlp_batch()
    other = Mlp()
    layers, more = make_layers(one), make_layers(other)
    want = capture_rows(one, layers, 4, lambda: one(x).square().sum())
    with Capture(one, layers, 4) as outer, Capture(other, more, 4) as inner:
        (one(x).square().sum() + other(x).square().sum()).backward()
    assert torch.equal(outer.rows(), want)
    assert inner.rows().shape == want.shape


def test_captures_of_two_threads() -> None:
    """Each has its model. The first to open is the first to close: no stack of patches."""
    batches = [mlp_batch(), mlp_batch()]
    before = [traces(model) for model, _ in batches]
    turn, rows, errors = threading.Barrier(2, timeout=60), {}, []

    def work(number: int) -> None:
        model, x = batches[number]
        try:
            if number == 1:
                turn.wait()
            with Capture(model, make_layers(model), 4) as capture:
                if number == 0:
                    turn.wait()
                turn.wait()  # both are open
                model(x).square().sum().backward()
                turn.wait()
                if number == 1:
                    turn.wait()
            rows[number] = capture.rows()
            if number == 0:
                turn.wait()  # closed before the other
        except BaseException as error:
            errors.append(error)
            turn.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, (model, x) in enumerate(batches):
        assert same_traces(traces(model), before[number])
        loss = lambda model=model, x=x: model(x).square().sum()  # noqa: E731
        assert torch.equal(rows[number], capture_rows(model, make_layers(model), 4, loss))


# what it refuses


def test_no_backward(model: Mlp, x: Tensor) -> None:
    with refuse("call loss.backward() once inside the `with`", RuntimeError):  # noqa: SIM117
        with Capture(model, make_layers(model), 4):
            model(x)


def test_forward_without_gradients(model: Mlp, x: Tensor) -> None:
    with refuse("first ran with gradients turned off", RuntimeError):  # noqa: SIM117
        with Capture(model, make_layers(model, ["first"]), 4), torch.no_grad():
            model(x)


def test_an_error_of_the_user_is_not_replaced() -> None:
    model, _ = mlp_batch()
    with pytest.raises(KeyError, match="mine"), Capture(model, make_layers(model), 4):
        raise KeyError("mine")


@pytest.mark.parametrize("again", ["same graph", "new forward"])
def test_backward_twice(again: str, model: Mlp, x: Tensor) -> None:
    with refuse("a second backward pass inside one `with`", RuntimeError):  # noqa: SIM117
        with Capture(model, make_layers(model), 4):
            loss = model(x).square().sum()
            loss.backward(retain_graph=True)
            (loss if again == "same graph" else model(x).square().sum()).backward()


def test_backward_twice_by_autograd_grad(model: Mlp, x: Tensor) -> None:
    x.requires_grad_()
    with refuse("a second backward pass inside one `with`", RuntimeError):  # noqa: SIM117
        with Capture(model, make_layers(model), 4):
            loss = model(x).square().sum()
            torch.autograd.grad(loss, [x], retain_graph=True)
            torch.autograd.grad(loss, [x])


def test_a_backward_pass_that_no_watched_module_sees_does_not_count(model: Mlp, x: Tensor) -> None:
    other = nn.Linear(7, 1)
    with Capture(model, make_layers(model), 4) as capture:
        other(x).sum().backward()
        model(x).square().sum().backward()
    assert capture.rows().shape[0] == 4
    assert other.weight.grad is not None


def test_unused_modules() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "spare": nn.Linear(3, 2)})
    layers = make_layers(model)
    x = torch.randn(4, 3)
    with refuse("no gradient reached: spare; leave them out by name_filter", RuntimeError):
        capture_rows(model, layers, 4, lambda: model["used"](x).sum())
    rows = capture_rows(model, layers, 4, lambda: model["used"](x).sum(), allow_unused=True)
    assert rows.shape == (4, 12)
    assert rows[:, :6].abs().min() > 0
    assert (rows[:, 6:] == 0).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 5), "mask: expected shape [N, T] = [4, 6] for the tokens of module token, "
                           "got [4, 5]"),
        (torch.ones(3, 6), "mask: expected shape [N, T] with N = 4 (one row per data_id), "
                           "got [3, 6]"),
        (torch.ones(4), "mask: expected shape [N, T] with N = 4 (one row per data_id), got [4]"),
        (torch.full((4, 6), 0.5), "mask: expected only 0 and 1, got other values"),
        ("left", "mask: expected a tensor [N, T] of 0 and 1, got 'left'"),
        (torch.full((4, 6), 2), "mask: expected only 0 and 1, got other values"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit(mask: Tensor | None, message: str) -> None:
    model, x = Recurrent(), torch.randn(4, 6, 6)
    refused(message, capture_rows, model, make_layers(model), 4, lambda: model(x).sum(), mask)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_mask_types(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    loss = lambda: model(x).square().sum()  # noqa: E731
    want = capture_rows(model, make_layers(model), 2, loss, mask)
    assert torch.equal(capture_rows(model, make_layers(model), 2, loss, mask.to(kind)), want)


def test_token_mask_does_not_apply_to_two_dimensional_input() -> None:
    """A head on pooled features, beside layers that see tokens."""
    model, x = Recurrent(), torch.randn(4, 6, 6)
    rows = capture_rows(
        model, make_layers(model), 4, lambda: model(x).square().sum(), torch.ones(4, 6)
    )
    assert torch.equal(
        rows, capture_rows(model, make_layers(model), 4, lambda: model(x).square().sum())
    )


def test_wrong_number_of_examples(model: Mlp, x: Tensor) -> None:
    with refuse(
        "module first: expected an input of shape [N, ...], or [N*T, ...] with a mask [N, T] with "
        "N = 3 (one per data_id), got [4, 7]"
    ):
        capture_rows(model, make_layers(model), 3, lambda: model(x).sum())


def test_module_that_sees_positions_not_examples() -> None:
    """GPT-2 looks its positions up once for the whole batch."""
    model = tiny_gpt2()
    layers = make_layers(model, ["transformer.wpe"])
    with refuse("module transformer.wpe: expected an input of shape"), Capture(model, layers, 4):
        model(torch.ones(4, 5, dtype=torch.int64))


def test_convolution_refuses_a_token_mask_of_other_size() -> None:
    model, x = SmallCnn(), torch.randn(2, 2, 12, 11)
    with refuse("mask: expected shape [N, T] = [2, 36] for the tokens of module plain"):
        capture_rows(model, make_layers(model), 2, lambda: model(x).sum(), torch.ones(2, 5))
    with refuse("module plain: expected an input of shape [N, C, H, W] with N = 1"):
        capture_rows(model, make_layers(model), 1, lambda: model(x).sum())


def test_input_changed_in_place_after_the_call() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x += self.linear(x)
            return x

    model, x = Residual(), torch.randn(2, 4)
    with refuse("module linear: its input was changed in place", RuntimeError):
        capture_rows(model, make_layers(model), 2, lambda: model(x.clone()).sum())
    capture_rows(model, make_layers(model, rank=2), 2, lambda: model(x.clone()).sum())


# averaged losses


def averaged_losses() -> dict[str, Callable[[Tensor], Tensor]]:
    y = torch.tensor([0, 1, 2, 1])
    cross_entropy = functional.cross_entropy
    return {
        "mean": lambda out: out.square().mean(),
        "mean over an axis": lambda out: out.square().sum(1).mean(0),
        "cross entropy": lambda out: cross_entropy(out, y),
        "cross entropy, cast and scaled": lambda out: (cross_entropy(out, y) * 1024).double(),
        "cross entropy and a penalty": lambda out: out.square().sum() + cross_entropy(out, y),
        "cross entropy, smoothed": lambda out: cross_entropy(out, y, label_smoothing=0.1),
        "cross entropy over two axes": lambda out: cross_entropy(
            out[:, :, None, None], y[:, None, None]
        ),
        "nll of a sequence": lambda out: cross_entropy(out[None].transpose(1, 2), y[None]),
        "mse": lambda out: functional.mse_loss(out, torch.zeros_like(out)),
        "l1": lambda out: functional.l1_loss(out, torch.zeros_like(out)),
        "huber": lambda out: functional.huber_loss(out, torch.zeros_like(out)),
        "smooth l1": lambda out: functional.smooth_l1_loss(out, torch.zeros_like(out)),
        "bce": lambda out: functional.binary_cross_entropy(out.sigmoid(), torch.ones_like(out)),
        "bce with logits": lambda out: functional.binary_cross_entropy_with_logits(
            out, torch.ones_like(out)
        ),
        "kl": lambda out: functional.kl_div(out.log_softmax(1), out.detach(), reduction="mean"),
        "accumulated": lambda out: cross_entropy(out, y) / 8,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", averaged_losses())
def test_averaged_loss_is_an_error_before_the_pass(name: str, model: Mlp, x: Tensor) -> None:
    layers = make_layers(model)
    loss = averaged_losses()[name]
    with refuse("loss: expected a sum over examples and tokens, got a mean"):
        capture_rows(model, layers, 4, lambda: loss(model(x)))
    with pytest.warns(UserWarning, match="expected a sum"):
        capture_rows(model, layers, 4, lambda: loss(model(x)), averaged_loss="warn")
    capture_rows(model, layers, 4, lambda: loss(model(x)), averaged_loss="allow")


def test_summed_losses_pass(model: Mlp, x: Tensor) -> None:
    y = torch.tensor([0, 1, 2, 1])
    layers = make_layers(model)
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda out: functional.cross_entropy(out, y, reduction="sum"),
        lambda out: functional.cross_entropy(out, y, reduction="none").sum() * 2.0,
        lambda out: functional.mse_loss(out, torch.zeros_like(out), reduction="sum"),
        # features may be averaged: only examples and tokens must not
        lambda out: out.square().mean(dim=1).sum(),
    ]
    for loss in losses:
        capture_rows(model, layers, 4, lambda: loss(model(x)))  # noqa: B023 (called at once)


def test_hf_loss_is_an_average() -> None:
    model = tiny_gpt2()
    layers = make_layers(model, ["transformer.h.0.mlp.c_fc"])
    ids = torch.ones(2, 5, dtype=torch.int64)
    with refuse("got a mean (NllLossBackward0 with reduction='mean')"):
        capture_rows(model, layers, 2, lambda: model(input_ids=ids, labels=ids).loss)


def test_unknown_averaged_loss() -> None:
    model, _ = mlp_batch()
    with refuse("averaged_loss: expected one of raise, warn, allow, got 'ignore'"):
        Capture(model, make_layers(model), 4, averaged_loss="ignore")


def test_token_scores_refuse_what_they_cannot_give(model: Mlp, x: Tensor) -> None:
    layers = make_layers(model)
    with refuse("token_queries: expected [Q, 212], got [1, 3]"):
        Capture(model, layers, 4, token_queries=torch.ones(1, 3))
    with Capture(model, layers, 4) as capture:
        model(x).sum().backward()
    refused("token scores: give token_queries", capture.token_scores, error=RuntimeError)
    mixed, tokens = Recurrent(), torch.randn(4, 6, 6)
    with refuse("token scores: module token has 6 tokens, another watched module has 1"):
        capture_rows(
            mixed, make_layers(mixed), 4, lambda: mixed(tokens).sum(),
            token_queries=torch.ones(2, 72),
        )  # fmt: skip


@pytest.mark.parametrize("queries", [False, True])
def test_gradients_are_freed_with_the_pass(model: Mlp, x: Tensor, queries: bool) -> None:
    """By counting references: rows of whole gradients are too large to wait for the collector."""
    asked = torch.ones(2, 212) if queries else None
    gc.collect()
    gc.disable()
    try:
        with Capture(
            model, make_layers(model), 4, keep_tokens=True, token_queries=asked
        ) as capture:
            model(x).sum().backward()
        kept = weakref.ref(capture)
        del capture
        assert kept() is None
    finally:
        gc.enable()
