"""Which linear layers of a language model are logged where nobody names them."""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from logra_kernels.capture.layers import layer_kind

# A trial pass is of so many examples and tokens. Experts get another number of tokens each.
TRIAL = (2, 8)


def linear_layers(model: nn.Module) -> list[str]:
    """The names of a model's linear layers, in its order."""
    return [
        name
        for name, module in model.named_modules()
        if layer_kind(module) is not None and not isinstance(module, nn.Embedding)
    ]


def default_layers(model: nn.Module) -> tuple[list[str], str]:
    """The linear layers of the blocks outside attention, and a note where there are none.

    A block is an entry of an nn.ModuleList. Attention is a module whose class has that word in its
    name, as all have in transformers: what is left are feed-forward layers, Mamba's mixers, and
    routers that are linear layers.
    """
    names = linear_layers(model)
    owners = {name: _owners(model, name) for name in names}
    in_blocks = [n for n in names if any(isinstance(o, nn.ModuleList) for o in owners[n])]
    chosen = [n for n in in_blocks if not any(_is_attention(o) for o in owners[n])]
    if chosen:
        return chosen, ""
    if in_blocks:
        return in_blocks, "no block has a linear layer outside attention: all of theirs are logged"
    return names, "the model has no list of blocks: all its linear layers are logged"


def called_on_every_token(model: nn.Module, names: Collection[str]) -> set[str]:
    """The layers that a trial pass calls, and with all tokens of all examples each time.

    The others are experts, which get the tokens that are sent to them, layers whose weight is used
    without them, as Mamba's dt_proj, and layers that have no part in the pass. A model without
    weights (on the device meta) cannot be tried: all of its layers are given back.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return set(names)
    calls: dict[str, list[int]] = {}  # {name: the number of tokens of each call}

    def count(
        name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        x = inputs[0] if inputs else next(iter(named.values()))
        calls.setdefault(name, []).append(x.shape[:-1].numel())

    hooks = [
        module.register_forward_hook(partial(count, name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in names
    ]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.arange(TRIAL[0] * TRIAL[1], device=device).reshape(TRIAL)
    try:
        with torch.no_grad():
            model(
                input_ids=tokens % embedding.weight.shape[0],
                attention_mask=torch.ones_like(tokens),
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, counts in calls.items() if set(counts) == {tokens.numel()}}


def patterns(names: Iterable[str]) -> str:
    """The names with * for numbers, each once."""
    return ", ".join(sorted({re.sub(r"\d+", "*", name) for name in names}))


def in_last_blocks(names: Sequence[str], last_blocks: int) -> list[str]:
    """The names that are of the last so many transformer blocks.

    Raises: ValueError if there is no such block.
    """
    if last_blocks < 1:
        raise ValueError(f"last_blocks: expected at least 1, got {last_blocks}")
    numbers = {name: _block(name) for name in names}
    blocks = sorted({number for number in numbers.values() if number is not None})
    kept = [name for name in names if numbers[name] in blocks[-last_blocks:]]
    if not kept:
        raise ValueError("last_blocks: the watched modules' names hold no block numbers")
    return kept


def _block(name: str) -> int | None:
    """The first number in a module's name: `model.layers.29.mlp.up_proj` is of block 29."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def _owners(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that hold a layer, from the outermost inside the model on."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()
