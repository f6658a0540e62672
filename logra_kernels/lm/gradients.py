"""Rows of a language model's examples: the watched modules, their projection, one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logra_kernels.capture import Capture
from logra_kernels.capture.layers import Layer, layer_kind
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example
from logra_kernels.projection import ProjectionSpec, describe_projection, stored_projections
from logra_kernels.run.config import Config
from logra_kernels.store import Module, Store, StoreMismatchError


class LMGradients:
    """Projected gradients of a causal language model's summed loss, for some of its layers.

    Args:
        lm: the model.
        names: the watched linear layers, in the row's order.
        projection: the store whose projection is taken, or the rank, init and seed of a new one.
    """

    def __init__(self, lm: CausalLM, names: Sequence[str], projection: Config | Store) -> None:
        self.lm = lm
        self.layers: list[Layer] = []
        available = dict(lm.model.named_modules())
        for name in names:
            module = available.get(name)
            kind = None if module is None else layer_kind(module)
            if module is None or kind is None:
                raise ValueError(f"modules: {name}: the model has no linear layer of that name")
            self.layers.append(kind(name, module))
        if isinstance(projection, Config):
            widths = {layer.name: (layer.in_features, layer.out_features) for layer in self.layers}
            spec = ProjectionSpec(projection.init, projection.rank, projection.seed)
            projections = spec.build(widths)
        else:
            projections = stored_projections(projection)
        for layer in self.layers:
            layer.projection = projections[layer.name]
        self.projection: dict[str, Any]
        if isinstance(projection, Config):
            self.projection = describe_projection(projections, False, spec)
        else:
            self.projection = projection.projection

    @classmethod
    def of_store(cls, store: Store, lm: CausalLM) -> "LMGradients":
        """The modules and projection that a store's rows were made with.

        Raises:
            StoreMismatchError: the store is not of a language model's examples, or of another
                model, tokenizer or dtype.
        """
        check_same_model(store, lm)
        return cls(lm, [module.name for module in store.modules], store)

    @property
    def modules(self) -> list[Module]:
        """The row's layout."""
        return [Module(layer.name, layer.ko, layer.ki) for layer in self.layers]

    @property
    def dim(self) -> int:
        """D."""
        return sum(module.size for module in self.modules)

    def rows(self, examples: Sequence[Example]) -> Tensor:
        """One forward and one backward pass: [N, D] float32, on the CPU."""
        return self._pass(examples).rows().float().cpu()

    def token_scores(self, examples: Sequence[Example], queries: Tensor) -> Tensor:
        """[Q, N, T]: what each token adds to the dot product of query [Q, D] and example."""
        return self._pass(examples, queries).token_scores().float().cpu()

    def _pass(self, examples: Sequence[Example], queries: Tensor | None = None) -> Capture:
        batch = self.lm.collate(examples)
        capture = Capture(
            self.lm.model,
            self.layers,
            len(examples),
            batch["attention_mask"],
            token_queries=queries,
        )
        with capture, torch.enable_grad():
            self.lm.summed_loss(batch).backward()
        return capture


def check_same_model(store: Store, lm: CausalLM) -> None:
    """Refuse a model that is not the one a store was logged with.

    Raises:
        StoreMismatchError: says what differs, and what the store was logged with.
    """
    stored = lm_fingerprints(store)["model"]
    given = lm_fingerprint(lm)
    for part, meaning in (
        ("config", "configuration"),
        ("weights", "weights"),
        ("tokenizer", "tokenizer"),
        ("dtype", "dtype of the weights"),
    ):
        if stored[part] != given[part]:
            raise StoreMismatchError(
                f"model: {lm.path} is not the model that {store.path} was logged with"
                f" ({stored['name']}): expected {meaning} {stored[part]}, got {given[part]}"
            )


def lm_fingerprints(store: Store) -> dict[str, Any]:
    """What `logra log` wrote about the model and data of a store.

    Raises:
        StoreMismatchError: the store was made by something else.
    """
    found = store.fingerprints
    if not isinstance(found, dict) or found.get("kind") != "causal-lm":
        raise StoreMismatchError(
            f"{store.path}: was not written by `logra log`: it does not say which language model"
            " and tokens its rows are of"
        )
    return found


def lm_fingerprint(lm: CausalLM) -> dict[str, str]:
    """The model's part of a store's fingerprints."""
    return {"name": lm.name, "dtype": lm.dtype, **lm.fingerprint}
