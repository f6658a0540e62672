"""Packed sequences: rows of [1, T, I] or [T, I] against a loop over single examples."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import IGNORED, autograd_rows, make_layers, tiny_llama

from logra_kernels.capture import Batch, Capture, gradient_queue
from logra_kernels.capture.layers import Layer

LENGTHS = [5, 1, 7, 3]
BOUNDS = [0, 5, 6, 13, 16]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


def refuse(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


class Packed(nn.Module):
    """Tokens [T, I] or [1, T, I] that attend within their example; a head on each one's last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 6)
        self.key = nn.Linear(6, 6)
        self.value = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        place = torch.arange(bounds[-1])
        segment = torch.bucketize(place, torch.tensor(bounds), right=True)
        apart = (segment[:, None] != segment) | (place[:, None] < place)
        scores = (self.key(x) @ x.transpose(-1, -2)).masked_fill(apart, -torch.inf)
        y = x + scores.softmax(-1) @ self.value(x)
        last = y.reshape(-1, 6)[torch.tensor(bounds[1:]) - 1]  # [N, 6]
        return y, self.head(last)


def loss_of(model: nn.Module, ids: Tensor, bounds: list[int]) -> Tensor:
    y, pooled = model(ids, bounds)
    loss: Tensor = y.square().sum() + pooled.exp().sum()
    return loss


def single_losses(model: nn.Module, ids: Tensor) -> list[Any]:
    parts = ids.flatten().split(LENGTHS)
    return [partial(loss_of, model, part[None], [0, len(part)]) for part in parts]


def toy(rank: int | None = None, bias: bool = False) -> tuple[nn.Module, list[Layer], Tensor]:
    torch.manual_seed(0)
    model = Packed().double()
    return model, make_layers(model, rank=rank, bias=bias), torch.randint(31, (sum(LENGTHS),))


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("rank", "bias"), [(None, True), (3, False)])
@pytest.mark.parametrize(
    "said",
    [
        {"cu_seqlens": BOUNDS},
        {"cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32)},
        {"position_ids": POSITIONS},
        {"position_ids": POSITIONS[None]},
    ],
)
def test_rows_of_packed_examples(
    said: dict[str, Any],
    rank: int | None,
    bias: bool,
    batched: bool,
    queued: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if queued:
        monkeypatch.setattr(gradient_queue, "WAITING_BYTES", {"cpu": 1 << 20})
    model, layers, ids = toy(rank, bias)
    with Capture(model, layers, 4, **said) as capture:
        loss_of(model, ids[None] if batched else ids, BOUNDS).backward()
    want = autograd_rows(model, layers, single_losses(model, ids))
    assert (capture.rows() - want).abs().max() <= 1e-10 * want.abs().max()
    assert all(want.abs().amax(dim=1) > 0)


def test_rows_of_a_packed_language_model() -> None:
    """transformers keeps packed examples apart by position_ids, without a mask and a cache."""
    pytest.importorskip("transformers", minversion="4.53")  # older ones mix packed examples
    model = tiny_llama(torch.float64)
    layers = make_layers(model, rank=4)
    ids = torch.randint(1, 61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))

    def summed(ids: Tensor, positions: Tensor) -> Tensor:
        labels = ids.masked_fill(positions == 0, IGNORED)  # each first token
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=IGNORED
        )

    with Capture(model, layers, 4, position_ids=POSITIONS[None]) as capture:
        summed(ids, POSITIONS[None]).backward()
    parts = ids.split(LENGTHS, dim=1)
    losses = [partial(summed, part, torch.arange(part.shape[1])[None]) for part in parts]
    want = autograd_rows(model, layers, losses)
    assert (capture.rows() - want).abs().max() <= 1e-10 * want.abs().max()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cu_seqlens": [0, 5, 5, 13, 16]}, "cu_seqlens: expected [N+1] integers from 0 that rise, "
                                            "got [0, 5, 5, 13, 16] of shape [5]"),
        ({"cu_seqlens": [0, 6, 5, 13, 16]}, "cu_seqlens: expected [N+1] integers from 0 that rise"),
        ({"cu_seqlens": [1, 5, 6, 13, 16]}, "cu_seqlens: expected [N+1] integers from 0 that rise"),
        ({"cu_seqlens": [BOUNDS]}, "got [0, 5, 6, 13, 16] of shape [1, 5]"),
        ({"cu_seqlens": []}, "cu_seqlens: expected integers, got torch.float32"),
        ({"cu_seqlens": [0.0, 5.0]}, "cu_seqlens: expected integers, got torch.float32"),
        ({"cu_seqlens": "flat"}, "cu_seqlens: expected a tensor of integers, got 'flat'"),
        ({"cu_seqlens": [0, 5, 16]}, "cu_seqlens: expected 4 packed examples (one per data_id), "
                                     "got 2"),
        ({"position_ids": POSITIONS[1:]}, "position_ids: expected positions that count up from 0 "
                                          "in each example, got [1, 2, 3, 4, 0"),
        ({"position_ids": [0, 1, 3, 0]}, "position_ids: expected positions that count up from 0"),
        ({"position_ids": [0, 1, 1, 0]}, "position_ids: expected positions that count up from 0"),
        ({"position_ids": POSITIONS[None, None]}, "position_ids: expected shape [T] or [1, T], got "
                                                  "[1, 1, 16]"),
        ({"position_ids": torch.zeros(2, 8, dtype=torch.int64)}, "position_ids: expected shape [T] "
                                                                 "or [1, T], got [2, 8]"),
        ({"position_ids": torch.arange(16)}, "position_ids: expected 4 packed examples (one per "
                                             "data_id), got 1"),
        ({"position_ids": POSITIONS, "cu_seqlens": BOUNDS}, "position_ids: expected None beside "
                                                            "cu_seqlens, got both"),
        ({"mask": torch.ones(4, 16), "cu_seqlens": BOUNDS}, "mask: expected None beside packed "
                                                            "sequences"),
    ],
)  # fmt: skip
def test_boundaries_that_do_not_fit(said: dict[str, Any], message: str) -> None:
    with refuse(message):
        Batch(4, **said)


def test_packed_tokens_that_an_expert_picked_are_refused() -> None:
    model, layers, ids = toy()
    inner = [layer for layer in layers if layer.name in ("embed", "head")]

    def loss(places: list[int]) -> Tensor:
        hidden = model.get_submodule("embed")(ids)
        out: Tensor = model.get_submodule("head")(hidden[torch.tensor(places)]).exp().sum()
        return out

    with (
        refuse("module head: its input [4, 6] is not one token of each of the 4 examples"),
        Capture(model, inner, 4, cu_seqlens=BOUNDS),
    ):
        loss([0, 1, 7, 14])
    with Capture(model, inner, 4, cu_seqlens=BOUNDS) as capture:
        loss([0, 5, 7, 14]).backward()
    assert capture.rows().shape[0] == 4


@pytest.mark.parametrize("shape", [(15,), (2, 8), (4, 4), (16, 2)])
def test_inputs_of_another_total(shape: tuple[int, ...]) -> None:
    model, layers, _ = toy()
    with (
        refuse(
            "module embed: expected an input of shape [1, T, features] or [T, features] with T = "
            "16 packed tokens with N = 4 (one per data_id), got " + str(list(shape))
        ),
        Capture(model, layers[:1], 4, cu_seqlens=BOUNDS),
    ):
        model.get_submodule("embed")(torch.ones(shape, dtype=torch.int64))


def test_packed_tokens_have_no_token_scores_and_no_convolutions() -> None:
    model, layers, _ = toy()
    with refuse("token_queries: expected None for packed sequences"):
        Capture(model, layers, 4, cu_seqlens=BOUNDS, token_queries=torch.ones(1, 3))
    convolution = nn.Conv2d(2, 3, 1)
    with (
        refuse("module : expected an input of shape [1, T, features]"),
        Capture(convolution, make_layers(convolution), 4, cu_seqlens=BOUNDS),
    ):
        convolution(torch.ones(4, 2, 4, 1))
