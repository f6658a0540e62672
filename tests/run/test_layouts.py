"""What a run is told of its batches: masks of parts, packed sequences, the batch's axis."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import autograd_rows, make_layers

import logra_kernels as logra
from logra_kernels import Store
from logra_kernels.integrations.logix.run import LogixRun

LENGTHS = [2, 4, 1]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


class TwoSides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.ModuleDict({"own": nn.Linear(4, 4), "cross": nn.Linear(4, 4)})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory = self.encoder(x)
        out: Tensor = self.decoder["own"](y).sum(1) * self.decoder["cross"](memory).sum(1)
        return out.exp().sum()


def make_run(folder: Path, model: nn.Module, **watch: Any) -> LogixRun:
    run = logra.init("layouts", root_dir=str(folder), dtype="float32")
    run.watch(model, **watch)
    run.setup({"save": "grad"})
    return run


def assert_stored(run: LogixRun, want: Tensor) -> None:
    run.finalize()
    got = torch.from_numpy(Store.open(run.path).take(range(len(want))))
    assert (got - want).abs().max() <= 2**-22 * want.abs().max()  # stored as float32


def test_masks_of_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """Padding is not zero, and the loss counts it: only the masks keep it out of the rows."""
    torch.manual_seed(0)
    model = TwoSides().double()
    run = make_run(tmp_path, model)
    x, y = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    masks = {
        "encoder": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "decoder": torch.tensor([[1, 1, 1], [0, 1, 1]]),
    }
    with pytest.raises(ValueError, match="mask: expected one for each part of a model"):
        run(["a", "b"], masks["encoder"])
    with run(["a", "b"], masks):
        model(x, y).backward()
    sides = masks["encoder"], masks["decoder"]

    def single(n: int) -> Tensor:
        encoder, decoder = (side[n : n + 1] for side in sides)
        memory = counted(model.encoder, x[n : n + 1], encoder)
        own = counted(model.decoder["own"], y[n : n + 1], decoder).sum(1)
        return (own * counted(model.decoder["cross"], memory, encoder).sum(1)).exp().sum()

    assert_stored(
        run, autograd_rows(model, make_layers(model), [partial(single, n) for n in (0, 1)])
    )


def counted(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """The layer's output, whose masked tokens have no part in the weight's gradient."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    frozen = nn.functional.linear(x, weight.detach(), bias)
    return torch.where(mask[..., None] == 1, nn.functional.linear(x, weight, bias), frozen)


@pytest.mark.parametrize("said", ["cu_seqlens", "position_ids"])
@pytest.mark.parametrize("started", [False, True])
def test_packed_sequences(tmp_path: Path, said: str, started: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    run = make_run(tmp_path, model)
    run.add_lora(rank=2)
    x = torch.randn(1, sum(LENGTHS), 4, dtype=torch.float64)
    bounds: dict[str, Any] = {"cu_seqlens": [0, 2, 6, 7], "position_ids": POSITIONS[None]}
    boundaries = {said: bounds[said]}

    def loss(x: Tensor) -> Tensor:
        out: Tensor = model(x).exp().sum()
        return out

    if started:
        run.start(range(3), **boundaries)
        loss(x).backward()
        run.end()
    else:
        with run(range(3), **boundaries):
            loss(x).backward()
    layers = make_layers(model, rank=2)
    for layer, watched in zip(layers, run._layers("test").layers, strict=True):
        layer.projection = watched.projection
    parts = x.split(LENGTHS, dim=1)
    assert_stored(run, autograd_rows(model, layers, [partial(loss, part) for part in parts]))


def test_packed_sequences_that_do_not_fit(tmp_path: Path) -> None:
    run = make_run(tmp_path, nn.Sequential(nn.Linear(4, 5)))
    message = "cu_seqlens: expected 2 packed examples (one per data_id), got 3"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(["a", "b"], cu_seqlens=[0, 2, 6, 7])
    assert not run.path.exists()


@pytest.mark.parametrize("again", [{}, {"name_filter": ["0"]}])
def test_the_batch_s_axis_outlives_add_lora(tmp_path: Path, again: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
    run = make_run(tmp_path, model, batch_dim=1)
    run.add_lora(rank=2, **again)
    x = torch.randn(3, 3, 4, dtype=torch.float64)  # [T, N, I]

    def loss(x: Tensor) -> Tensor:
        out: Tensor = model(x).exp().sum()
        return out

    with run(range(3)):
        loss(x).backward()
    layers = make_layers(model, rank=2)
    layers[0].projection = run._layers("test").layers[0].projection
    assert_stored(
        run, autograd_rows(model, layers, [partial(loss, x[:, n, None]) for n in range(3)])
    )
