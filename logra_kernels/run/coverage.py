"""What of a model is watched, what is left out, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from logra_kernels.capture.layers import Layer, layer_kind, plain_name
from logra_kernels.run.bypassed import is_bypassed

LEFT_BY_FILTERS = "layers that the filters leave out"
BIASES = "biases of watched layers, logged with bias=True"
BYPASSED = "layers whose weight is used without calling them"
FROZEN = "frozen, while other parameters are trained"
EMBEDDINGS = "embeddings, watched where type_filter names nn.Embedding"
NORMS = "norms, which have no layer kind"
CONVOLUTIONS = "convolutions other than nn.Conv2d, which have no layer kind"
STACKED = "weights of three or more axes, such as fused experts, which have no layer kind"
OTHERS = "parameters of modules that have no layer kind"


@dataclass(frozen=True)
class WatchedModule:
    """A watched module: its class, its weight's shape (O, I), and how many parameters are logged.

    I counts the bias's column where the bias is logged. `shared_with` are the other modules that
    have the same weight.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    parameters: int
    shared_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """Parameters that no row holds, for one reason; `names` has * for the numbers in them."""

    reason: str
    parameters: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """What `watch` covers; str() is a readable summary.

    A parameter that several modules share is counted once.

    Args:
        watched: the watched modules, in the row's order.
        left_out: the other parameters by reason, the largest part first.
        parameters: of the model.
        trainable: of these, those that require a gradient.
        watched_parameters: of `parameters`, those that a watched module logs.
        watched_trainable: of `trainable`, those that a watched module logs.
        notes: watched modules whose rows are not the whole gradient, a sentence each.
    """

    watched: tuple[WatchedModule, ...]
    left_out: tuple[LeftOut, ...]
    parameters: int
    trainable: int
    watched_parameters: int
    watched_trainable: int
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The watched share of what is trained; of all parameters where nothing requires grad."""
        if self.trainable:
            return self.watched_trainable / self.trainable
        return self.watched_parameters / max(self.parameters, 1)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, which a store keeps; the modules stand in the store's own list."""
        return {
            "parameters": self.parameters,
            "trainable": self.trainable,
            "watched_parameters": self.watched_parameters,
            "watched_trainable": self.watched_trainable,
            "left_out": [
                {"reason": part.reason, "parameters": part.parameters, "names": list(part.names)}
                for part in self.left_out
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join([*self._watched_lines(), *lines_of(self.as_dict())])

    def _watched_lines(self) -> list[str]:
        alike: dict[tuple[str, str, tuple[int, int]], list[int]] = {}
        for module in self.watched:
            key = (_starred(module.name), module.kind, module.shape)
            alike.setdefault(key, []).append(module.parameters)
        return [
            f"watched: {name}: {len(sizes)} x {kind} [{shape[0]}, {shape[1]}], {sum(sizes):,}"
            for (name, kind, shape), sizes in alike.items()
        ]


def lines_of(described: Mapping[str, Any]) -> list[str]:
    """`Coverage.as_dict()` in lines: the share, what is left out, and the notes.

    Raises: KeyError, TypeError, ValueError or OverflowError for a dictionary of another form.
    """
    share = _of(described["watched_parameters"], described["parameters"])
    line = f"watched parameters: {share}"
    if described["trainable"] not in (0, described["parameters"]):
        line += f"; {_of(described['watched_trainable'], described['trainable'])} that are trained"
    lines = [line]
    for part in described["left_out"]:
        names = part["names"]
        shown = ", ".join(names[:4]) + (f", … ({len(names)} in all)" if names[4:] else "")
        lines.append(f"left out: {part['parameters']:,} {part['reason']}: {shown}")
    return lines + [f"note: {note}" for note in described["notes"]]


def coverage_of(model: nn.Module, layers: Sequence[Layer]) -> Coverage:
    """What these layers cover of the model's parameters."""
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}  # {parameter: its names and modules}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = plain_name(f"{path}.{key}" if path else key)
                owners.setdefault(parameter, []).append((name, module))
    watched = {layer.module: layer for layer in layers}
    logged = {parameter for layer in layers for parameter in _logged_by(layer)}
    trained = {parameter for parameter in owners if parameter.requires_grad}
    sizes = {parameter: _size(parameter, places[0][1]) for parameter, places in owners.items()}
    paths = {module: path for path, module in model.named_modules()}
    left: dict[str, list[Tensor]] = {}
    for parameter, places in owners.items():
        if parameter not in logged:
            module = places[0][1]
            reason = _why_left_out(parameter, module, module in watched, bool(trained))
            if reason == LEFT_BY_FILTERS and is_bypassed(model, paths[module]):
                reason = BYPASSED
            left.setdefault(reason, []).append(parameter)

    def count(parameters: Iterable[Tensor]) -> int:
        return sum(sizes[parameter] for parameter in parameters)

    def names(parameters: Iterable[Tensor]) -> tuple[str, ...]:
        # A weight of several modules has several names.
        joined = (" = ".join(name for name, _ in owners[parameter]) for parameter in parameters)
        return tuple(dict.fromkeys(map(_starred, joined)))

    parts = [LeftOut(reason, count(of), names(of)) for reason, of in left.items()]
    found = tuple(_described(layer, owners) for layer in layers)
    return Coverage(
        found,
        tuple(sorted(parts, key=lambda part: -part.parameters)),
        parameters=count(owners),
        trainable=count(trained),
        watched_parameters=count(logged),
        watched_trainable=count(logged & trained),
        notes=(*_shared_weights(found), *_hooked_weights(layers), *_zero_partners(model, layers)),
    )


def _described(layer: Layer, owners: Mapping[Tensor, list[tuple[str, nn.Module]]]) -> WatchedModule:
    weight = layer.module._parameters.get("weight")
    places = [] if weight is None else owners[weight]
    return WatchedModule(
        layer.name,
        type(layer.module).__name__,
        (layer.out_features, layer.in_features),
        sum(_size(parameter, layer.module) for parameter in _logged_by(layer)),
        tuple(name.rpartition(".")[0] for name, module in places if module is not layer.module),
    )


def _logged_by(layer: Layer) -> list[Tensor]:
    """The parameters whose gradient a layer's rows hold."""
    keys = ("weight", "bias") if layer.with_bias else ("weight",)
    found = (layer.module._parameters.get(key) for key in keys)
    return [parameter for parameter in found if parameter is not None]


def _size(parameter: Tensor, module: nn.Module) -> int:
    """The number of a parameter's elements; a quantised weight is packed into fewer bytes."""
    if isinstance(parameter, nn.UninitializedParameter):
        return 0
    width = getattr(module, "in_features", None)
    if parameter is module._parameters.get("weight") and isinstance(width, int):
        return width * int(getattr(module, "out_features", parameter.numel() // width))
    return parameter.numel()


def _why_left_out(parameter: Tensor, module: nn.Module, watched: bool, trained: bool) -> str:
    if watched:
        return BIASES
    if trained and not parameter.requires_grad:
        return FROZEN
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if layer_kind(module) is not None:
        return LEFT_BY_FILTERS
    if "norm" in type(module).__name__.lower():
        return NORMS
    if isinstance(module, nn.modules.conv._ConvNd):
        return CONVOLUTIONS
    return STACKED if parameter.ndim >= 3 else OTHERS


def _starred(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj"""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.1%})"


# Notes on watched modules.


def _shared_weights(watched: Sequence[WatchedModule]) -> list[str]:
    return [
        f"module {module.name}: its weight is also that of {', '.join(module.shared_with)}; a row "
        f"holds only the part of the weight's gradient that passes through {module.name}"
        for module in watched
        if module.shared_with
    ]


def _hooked_weights(layers: Sequence[Layer]) -> list[str]:
    return [
        f"module {layer.name}: its weight has a gradient hook, which changes no row"
        for layer in layers
        if (weight := layer.module._parameters.get("weight")) is not None and weight._backward_hooks
    ]


def _zero_partners(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """LoRA's factors whose partner is zero: the gradient of A is Bᵀ times something."""
    modules = {plain_name(path): module for path, module in model.named_modules()}
    notes = []
    for own, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        found = []
        for layer in layers:
            parts = [other if part == own else part for part in layer.name.split(".")]
            partner = modules.get(".".join(parts))
            weight = None if partner is None else partner._parameters.get("weight")
            if own not in layer.name.split(".") or weight is None or weight.is_meta:
                continue
            if not weight.any():
                found.append(layer.name)
        if found:
            more = f" and {len(found) - 1} more" if found[1:] else ""
            notes.append(
                f"module {found[0]}{more}: the rows are zero as long as {other} is zero, as "
                f"before training; train first, or leave {own} out by name_filter"
            )
    return notes
