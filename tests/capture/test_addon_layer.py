"""LoGra as add-on layers (§3.1): encoder P_i, zero bottleneck, decoder P_oᵀ, and autograd.

The bottleneck's weight B sits in y = W x + P_oᵀ B P_i x; its gradient at B = 0 is
Σ_t (P_o dy_t)(P_i x_t)ᵀ, the projected gradient, and the model computes what it always did.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy_models import (
    Mlp,
    Recurrent,
    capture_rows,
    causal_loss,
    make_layers,
    ragged_batch,
    tiny_gpt2,
    tiny_llama,
)

from logra_kernels.capture.layers import Layer


class AddOn(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.original, dtype = layer.module, layer.module.get_parameter("weight").dtype
        encoder, decoder = layer.projection.proj_in, layer.projection.proj_out
        assert encoder is not None
        assert decoder is not None
        self.encoder, self.decoder = encoder.to(dtype), decoder.T.to(dtype)
        self.bottleneck = nn.Parameter(torch.zeros(layer.ko, layer.ki, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(functional.linear(x, self.encoder), self.bottleneck)
        out: Tensor = self.original(x) + functional.linear(hidden, self.decoder)
        return out


def add_on(model: nn.Module, layers: list[Layer]) -> list[nn.Parameter]:
    additions = {layer.name: AddOn(layer) for layer in layers}
    for name, addition in additions.items():
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, addition)
    return [addition.bottleneck for addition in additions.values()]


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
    value = loss(slice(None)).item()
    got = capture_rows(model, layers, count, lambda: loss(slice(None)), mask)
    weights, rows = add_on(model, layers), []
    total = 0.0
    for n in range(count):
        single = loss(slice(n, n + 1))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(single, weights)]))
        total += single.item()
    want = torch.stack(rows)
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    assert total == pytest.approx(value, rel=1e-12)
