"""Rows of a language model's examples: the watched modules, their projection, one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logra_kernels.capture import Capture
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example
from logra_kernels.projection import ProjectionSpec
from logra_kernels.run import WatchedLayers
from logra_kernels.store import Module, Store, StoreMismatchError


class LMGradients:
    """Projected gradients of a causal language model's summed loss, for some of its layers.

    Args:
        lm: the model.
        names: the watched linear layers, in the row's order.
        projection: how the gradients are projected, or the store whose projection is taken; None:
            they are whole, until `pilot_corpus` gives them a projection.

    Raises:
        ValueError: a name that is no layer's, or layers that are not the store's.
    """

    def __init__(
        self, lm: CausalLM, names: Sequence[str], projection: ProjectionSpec | Store | None
    ) -> None:
        self.lm = lm
        self.watched = WatchedLayers.named(lm.model, names)
        if projection is not None:
            self.watched.project(projection)

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
        """The modules of a row, in its order."""
        return list(self.watched.layout)

    @property
    def dim(self) -> int:
        """The number of columns of a row, D = Σ Ko·Ki over the watched modules."""
        return self.watched.layout.dim

    def rows(self, examples: Sequence[Example]) -> Tensor:
        """One forward and one backward pass: [N, D] float32, on the CPU."""
        return self.passed(examples).rows().float().cpu()

    def token_scores(self, examples: Sequence[Example], queries: Tensor) -> Tensor:
        """[Q, N, T]: what each token adds to the dot product of query [Q, D] and example."""
        return self.passed(examples, token_queries=queries).token_scores().float().cpu()

    def passed(
        self, examples: Sequence[Example], *, sampled: bool = False, **options: Any
    ) -> Capture:
        """One forward and one backward pass of N examples; options as of `Capture`.

        `sampled`: the labels are tokens that the model draws.
        """
        batch = self.lm.collate(examples)
        capture = Capture(
            self.lm.model,
            self.watched.layers,
            len(examples),
            batch["attention_mask"],
            **options,
        )
        with capture, torch.enable_grad():
            names = [example.id for example in examples] if sampled else None
            self.lm.summed_loss(batch, names).backward()
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
