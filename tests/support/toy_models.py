"""Small models, and the truth they are compared with: a loop of autograd over single examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.capture import Capture
from logra_kernels.capture.layers import Layer, layer_kind
from logra_kernels.projection import build_projections

IGNORED = -100


def make_layers(
    model: nn.Module,
    watched: Sequence[str] | None = None,
    rank: int | tuple[int, int] | None = None,
    bias: bool = False,
    init: str = "normal",
) -> list[Layer]:
    """Every module there is an adapter for, or those named; rank None: no projection."""
    layers = []
    for name, module in model.named_modules():
        kind = layer_kind(module)
        if kind is not None and (watched is None or name in watched):
            layers.append(kind(name, module, bias))
    if rank is None:
        return layers  # a layer begins with the identity
    features = {layer.name: (layer.in_features, layer.out_features) for layer in layers}
    projections = build_projections(features, rank, init)
    for layer in layers:
        layer.projection = projections[layer.name]
    return layers


def weight_gradient(layer: Layer, parameters: dict[str, Tensor]) -> Tensor:
    """The gradient of a layer's weight (and bias) in the form [O, I]."""
    module, gradient = layer.module, parameters[f"{layer.name}.weight"]
    if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
        gradient = gradient.T
    gradient = gradient.flatten(1)
    if layer.with_bias:
        gradient = torch.cat([gradient, parameters[f"{layer.name}.bias"][:, None]], dim=1)
    return gradient


def autograd_rows(
    model: nn.Module, layers: Sequence[Layer], losses: Sequence[Callable[[], Tensor]]
) -> Tensor:
    """P_o (dL_n / dW) P_i^T for each example n, each from a forward and backward of its own."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        by_name = {
            name: torch.zeros_like(p) if g is None else g
            for name, p, g in zip(names, parameters, gradients, strict=True)
        }
        row = []
        for layer in layers:
            full = weight_gradient(layer, by_name).double()
            proj_in, proj_out = layer.projection.proj_in, layer.projection.proj_out
            full = full if proj_in is None else full @ proj_in.double().T
            full = full if proj_out is None else proj_out.double() @ full
            row.append(full.flatten())
        rows.append(torch.cat(row))
    return torch.stack(rows)  # [N, D]


def capture_rows(
    model: nn.Module,
    layers: Sequence[Layer],
    count: int,
    loss: Callable[[], Tensor],
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The same [N, D] from a capture of one pass over all of them."""
    with Capture(model, layers, count, mask, **options) as capture:
        loss().backward()
    return capture.rows()


def square_sum(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out.square().sum()


def causal_loss(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Summed next-token cross entropy of an HF causal LM; padding is neither seen nor predicted."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    # padding on the left stands before the first token, and does not predict it
    labels = ids[:, 1:].masked_fill((mask[:, 1:] * mask[:, :-1]) == 0, IGNORED)
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED
    )


def ragged_batch(
    vocabulary: int, lengths: Sequence[int], side: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """ids [N, T], mask [N, T], padded on the left or on the right to the longest length."""
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths)
    ids = torch.zeros(len(lengths), size, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for n, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(size - length, size)
        ids[n, place] = torch.randint(1, vocabulary, (length,), generator=generator)
        mask[n, place] = 1
    return ids, mask


def tiny_gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model.to(dtype)


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype)


class Mlp(nn.Module):
    """2-D input; the first ReLU works in place on a watched module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.second = nn.Linear(11, 9, bias=False)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.relu(self.first(x), inplace=True)
        logits: Tensor = self.head(torch.tanh(self.second(hidden)))
        return logits


class SmallCnn(nn.Module):
    """Every way a convolution can be laid out: stride, dilation, 'same', circular, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.same = nn.Conv2d(6, 6, (2, 3), padding="same", dilation=(1, 2))
        self.circular = nn.Conv2d(6, 8, 3, padding=(1, 0), padding_mode="circular", bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding="valid", groups=4)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.plain(x), inplace=True)
        x = torch.tanh(self.same(x))
        x = torch.tanh(self.circular(x))
        logits: Tensor = self.head(torch.tanh(self.grouped(x)).mean(dim=(2, 3)))
        return logits


class Recurrent(nn.Module):
    """One module called once for each step, another twice on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(6, 6)
        self.token = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 6]
        x = self.token(torch.tanh(self.token(x)))
        state = x[:, 0]
        for t in range(1, x.shape[1]):
            state = torch.tanh(self.cell(state) + x[:, t])
        return state
