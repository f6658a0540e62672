"""The layers whose gradients are logged, with their projections."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from logra_kernels.capture.axes import set_batch_axes
from logra_kernels.capture.layers import (
    Layer,
    layer_kind,
    make_layer,
    plain_name,
    row_layout,
    unwrapped,
)
from logra_kernels.projection import (
    ModuleProjection,
    PilotProjection,
    ProjectionSpec,
    describe_projection,
    described_widths,
    stored_projections,
)
from logra_kernels.run.bypassed import is_bypassed
from logra_kernels.run.coverage import coverage_of
from logra_kernels.store import RowLayout, Store
from logra_kernels.store.manifest import first_difference


class WatchedLayers:
    """Some layers of a model, in the row's order, with their projections.

    Without `project` the whole gradients are logged. `description` is what a store keeps of the
    projection, `coverage` which part of the model's parameters the layers are.

    Args:
        model: the model that holds the layers.
        layers: at least one, each with a name of its own.
        bias: whether the layers log their bias's gradient as one more column of the weight's.
        batch_dim: the axis of the layers' inputs that is the batch, as `Run.watch` says.

    Raises: ValueError for a batch_dim that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        bias: bool = False,
        batch_dim: int | Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.bias = bias
        set_batch_axes(model, self.layers, batch_dim)
        self.description: dict[str, Any] = describe_projection(self.projections, bias)
        self.coverage = coverage_of(model, self.layers)
        self._chose_projection = False
        for note in self.coverage.notes:
            warnings.warn(note, stacklevel=4)

    @classmethod
    def matching(
        cls,
        model: nn.Module,
        type_filter: Collection[type[nn.Module]] | None = None,
        name_filter: Collection[str] | None = None,
        bias: bool = False,
        batch_dim: int | Mapping[str, int] | None = None,
    ) -> WatchedLayers:
        """The layers of these types whose names hold one of these parts, as `Run.watch` says.

        Raises: ValueError for a model, filter or batch_dim of a wrong type, if no layer matches, or
            for a module that computes something else than the class its kind is for.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected an nn.Module, got {model!r:.80}")
        _check_filter("type_filter", type_filter, type, "classes")
        _check_filter("name_filter", name_filter, str, "parts of names")
        model = unwrapped(model)
        found: list[Layer] = []
        other_types: set[str] = set()  # of modules that match, but are no layers
        bypassed: list[str] = []
        for path, module in model.named_modules():
            name = plain_name(path)
            if type_filter is not None and not isinstance(module, tuple(type_filter)):
                continue
            if type_filter is None and isinstance(module, nn.Embedding):
                continue
            if name_filter is not None and not any(part in name for part in name_filter):
                continue
            named = name_filter is not None and name in name_filter
            if layer_kind(module) is not None and not named and is_bypassed(model, path):
                bypassed.append(name)
                continue
            layer = make_layer(name or "model", module, bias)
            if layer is None:
                other_types.add(type(module).__name__)
            else:
                found.append(layer)
        if bypassed:
            warnings.warn(
                f"watch: left out {', '.join(bypassed)}: the model multiplies by the weight without"
                " calling the layer, so that its gradient is not seen",
                stacklevel=3,
            )
        if not found:
            raise ValueError(_nothing_to_watch(model, type_filter, name_filter, other_types))
        return cls(model, found, bias, batch_dim)

    @classmethod
    def named(cls, model: nn.Module, names: Sequence[str]) -> WatchedLayers:
        """The layers of exactly these names, in their order.

        Raises: ValueError for a name that the model has not, or that is no layer's, or for a
            module that computes something else than the class its kind is for.
        """
        modules = dict(model.named_modules())
        found = []
        for name in names:
            layer = make_layer(name, modules[name]) if name in modules else None
            if layer is None:
                raise ValueError(f"modules: {name}: the model has no linear layer of that name")
            found.append(layer)
        return cls(model, found)

    @property
    def layout(self) -> RowLayout:
        """The columns of a row."""
        return row_layout(self.layers)

    @property
    def projections(self) -> dict[str, ModuleProjection]:
        """{module name: its P_i and P_o}, in the row's order."""
        return {layer.name: layer.projection for layer in self.layers}

    def project(self, projection: ProjectionSpec | PilotProjection | Store) -> None:
        """Give every layer a new projection, or the one that a store's rows were made with.

        Raises: ValueError if the store's modules are others, or an earlier `project` chose a
            projection that is not the store's.
        """
        if isinstance(projection, Store):
            self._check_same_modules(projection)
            self._check_same_projection(projection)
            self.give(stored_projections(projection))
            self.description = projection.projection
        else:
            widths = {name: (p.in_features, p.out_features) for name, p in self.projections.items()}
            self.give(projection.build(widths))
            self.description = describe_projection(self.projections, self.bias, projection)
            self._chose_projection = True

    def give(self, projections: Mapping[str, ModuleProjection]) -> None:
        """Give every layer a projection for now; `description` stays as it is."""
        for layer in self.layers:
            layer.projection = projections[layer.name]

    def _check_same_projection(self, store: Store) -> None:
        if not self._chose_projection:
            return
        difference = first_difference(store.projection, self.description, "projection")
        if difference is not None:
            raise ValueError(
                f"add_lora: {difference}; without add_lora the store's projection is taken"
            )

    def _check_same_modules(self, store: Store) -> None:
        """Raise ValueError at the first module in which the store and these layers differ."""
        widths = described_widths(store.projection)
        for number, (module, layer) in enumerate(zip(store.modules, self.layers, strict=False)):
            if layer.name != module.name:
                raise ValueError(
                    f"modules: the store's module {number} is {module.name}, the watched one is "
                    f"{layer.name}; watch with the filters that the store was logged with"
                )
            want, got = widths[module.name], (layer.in_features, layer.out_features)
            if want != got:
                stored, watched = (
                    "with bias" if flag else "without bias"
                    for flag in (store.projection["bias"], self.bias)
                )
                raise ValueError(
                    f"modules: {module.name}: expected the store's widths (I, O) = {want} "
                    f"({stored}), got {got} ({watched})"
                )
        counts = len(store.modules), len(self.layers)
        if counts[0] != counts[1]:
            longer = store.modules if counts[0] > counts[1] else self.layers
            raise ValueError(
                f"modules: the store has {counts[0]}, {counts[1]} are watched; the first that only "
                f"one of them has is {longer[min(counts)].name}"
            )


def _check_filter(name: str, value: Any, kind: type, what: str) -> None:
    """A filter is a list (a tuple, a set) of classes or of texts, or None."""
    if value is None:
        return
    if isinstance(value, (str, type)) or not isinstance(value, Collection):
        raise ValueError(f"{name}: expected a list, got {value!r}")
    for item in value:
        if not isinstance(item, kind):
            raise ValueError(f"{name}: expected a list of {what}, got {item!r:.80} in it")


def _nothing_to_watch(
    model: nn.Module,
    type_filter: Collection[type[nn.Module]] | None,
    name_filter: Collection[str] | None,
    other_types: set[str],
) -> str:
    """Why no layer matches, with the layers that there are."""
    named = ((plain_name(path), module) for path, module in model.named_modules())
    names = [name for name, module in named if layer_kind(module) is not None]
    if not names:
        return "watch: the model has no nn.Linear, nn.Conv2d, Conv1D or nn.Embedding"
    told = []
    if type_filter is not None:
        told.append(f"type_filter=[{', '.join(kind.__name__ for kind in type_filter)}]")
    if name_filter is not None:
        told.append(f"name_filter={list(name_filter)}")
    shown = ", ".join(names[:6]) + (", …" if names[6:] else "")
    text = f"watch: {' and '.join(told) or 'the default'} matches none of the layers {shown}"
    if other_types and told:
        text += f" (matched: {', '.join(sorted(other_types))}, which are no layers)"
    if type_filter is None and any(isinstance(m, nn.Embedding) for m in model.modules()):
        text += "; nn.Embedding is watched where type_filter names it"
    return text
