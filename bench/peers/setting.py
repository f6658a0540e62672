"""The model, the examples and the projections that every library is given."""

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.models import linear_weights, llama, summed_loss
from logra_kernels.projection import ModuleProjection, build_projections
from logra_kernels.store import Module

VOCABULARY = 8192


class LoggingSetting:
    """A Llama with random weights whose MLP layers are logged, N examples of T tokens.

    All examples have the same length, for Bergson hands no attention mask to the model. The loss
    is summed over tokens and examples.
    """

    def __init__(
        self,
        rank: int,
        *,
        num_examples: int = 16,
        batch_size: int = 8,
        num_tokens: int = 128,
        blocks: int = 4,
        width: int = 576,
    ) -> None:
        torch.manual_seed(0)
        self.rank, self.batch_size = rank, batch_size
        self.ids = torch.randint(0, VOCABULARY, (num_examples, num_tokens))
        self._model = llama(blocks=blocks, width=width, vocabulary=VOCABULARY)
        widths = {
            name: (module.in_features, module.out_features)
            for name, module in self._model.named_modules()
            if "mlp" in name and isinstance(module, nn.Linear)
        }
        self.projections: dict[str, ModuleProjection] = build_projections(widths, rank)
        self.title = (
            f"Llama, {blocks} blocks of {width}, {num_examples} x {num_tokens} tokens in batches "
            f"of {batch_size}, rank {rank}, fp32"
        )

    @property
    def names(self) -> list[str]:
        """The watched modules' names."""
        return list(self.projections)

    @property
    def modules(self) -> list[Module]:
        """The watched modules with their projected widths."""
        return [Module(name, p.ko, p.ki) for name, p in self.projections.items()]

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return self.ids.numel()

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """P_o [Ko, O] and P_i [Ki, I]."""
        projection = self.projections[name]
        assert projection.proj_out is not None, "the rank is below every width"
        assert projection.proj_in is not None
        return projection.proj_out, projection.proj_in

    def model(self) -> Any:
        """A copy, for each library changes the model in its own way."""
        return copy.deepcopy(self._model)

    def probe(self) -> Any:
        """A copy frozen but for the embedding, as Bergson sets it up: no weight gradients."""
        model = self.model().requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        return model

    def batches(self) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, token ids) batch by batch."""
        for first in range(0, len(self.ids), self.batch_size):
            ids = self.ids[first : first + self.batch_size]
            yield list(range(first, first + len(ids))), ids

    def passes_alone(self) -> Callable[[], None]:
        """Forward and backward pass of every batch, down to the embedding."""
        model = self.probe()

        def run() -> None:
            for _, ids in self.batches():
                model.zero_grad()
                with torch.enable_grad():
                    summed_loss(model, ids).backward()

        return run

    @cached_property
    def first_rows(self) -> Tensor:
        """Rows of the first four examples, [4, D] float64: one at a time, by autograd."""
        model = self.model().double()
        rows = []
        for ids in self.ids[:4]:
            model.zero_grad()
            with torch.enable_grad():
                summed_loss(model, ids[None]).backward()
            parts = []
            for name in self.names:
                gradient = model.get_submodule(name).weight.grad
                proj_out, proj_in = self.matrices(name)
                parts.append((proj_out.double() @ gradient @ proj_in.double().T).flatten())
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    @property
    def flops(self) -> float:
        """Of the forward and activation-gradient pass: 4 for each weight and token."""
        return 4.0 * linear_weights(self._model) * self.num_tokens
