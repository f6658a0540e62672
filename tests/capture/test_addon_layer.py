"""LoGra as add-on layers (§3.1): encoder P_i, zero bottleneck, decoder P_oᵀ, and autograd.

The bottleneck's weight B sits in y = W x + P_oᵀ B P_i x; its gradient at B = 0 is
Σ_t (P_o dy_t)(P_i x_t)ᵀ, the projected gradient, and the model computes what it always did.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toy_models import (
    Mlp,
    Recurrent,
    causal_loss,
    make_layers,
    ragged_batch,
    tiny_gpt2,
    tiny_llama,
)

from logra_kernels.capture import Capture
from logra_kernels.capture.layers import Layer


class AddOn(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        projection = layer.projection
        assert projection.proj_in is not None
        assert projection.proj_out is not None
        self.original = layer.module
        dtype = layer.module.weight.dtype
        self.encoder = nn.Linear(layer.in_features, layer.ki, bias=False, dtype=dtype)
        self.bottleneck = nn.Linear(layer.ki, layer.ko, bias=False, dtype=dtype)
        self.decoder = nn.Linear(layer.ko, layer.out_features, bias=False, dtype=dtype)
        self.encoder.weight.data.copy_(projection.proj_in)
        self.bottleneck.weight.data.zero_()
        self.decoder.weight.data.copy_(projection.proj_out.T)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.original(x) + self.decoder(self.bottleneck(self.encoder(x)))
        return out


def add_on(model: nn.Module, layers: list[Layer]) -> list[nn.Linear]:
    bottlenecks = []
    for layer in layers:
        parent_name, _, child = layer.name.rpartition(".")
        addition = AddOn(layer)
        setattr(model.get_submodule(parent_name), child, addition)
        bottlenecks.append(addition.bottleneck)
    return bottlenecks


Case = tuple[
    nn.Module, list[str] | None, Callable[[slice], Tensor], int, Tensor | None
]  # model, watched modules, loss, examples, mask


def language_model_case(make: Callable[[torch.dtype], nn.Module], watched: tuple[str, ...]) -> Case:
    model = make(torch.float64)
    ids, mask = ragged_batch(61, [7, 3, 5], "left")
    names = [name for name, _ in model.named_modules() if name.endswith(watched)]
    return model, names, lambda n: causal_loss(model, ids[n], mask[n]), 3, mask


def case(name: str) -> Case:
    torch.manual_seed(0)
    if name == "gpt2":
        return language_model_case(tiny_gpt2, ("c_fc", "c_proj", "c_attn"))
    if name == "llama":
        return language_model_case(tiny_llama, ("up_proj", "gate_proj", "down_proj", "q_proj"))
    if name == "mlp":
        mlp, rows = Mlp().double(), torch.randn(4, 7, dtype=torch.float64)
        return mlp, None, lambda n: mlp(rows[n]).exp().sum(), 4, None
    model, x = Recurrent().double(), torch.randn(4, 5, 6, dtype=torch.float64)
    return model, None, lambda n: model(x[n]).exp().sum(), 4, None


@pytest.mark.parametrize("name", ["mlp", "recurrent", "gpt2", "llama"])
def test_bottleneck_gradients_are_the_projected_gradients(name: str) -> None:
    model, watched, loss, count, mask = case(name)
    layers = make_layers(model, watched, rank=(2, 3))
    with Capture(model, layers, count, mask) as capture:
        value = loss(slice(None))
        value.backward()
    bottlenecks = add_on(model, layers)
    weights = [bottleneck.weight for bottleneck in bottlenecks]
    rows = []
    total = 0.0
    for n in range(count):
        single = loss(slice(n, n + 1))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(single, weights)]))
        total += single.item()
    want = torch.stack(rows)
    assert (capture.rows() - want).abs().max() <= 1e-10 * want.abs().max()
    assert total == pytest.approx(value.item(), rel=1e-12)
