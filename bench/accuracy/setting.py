"""A setting: data, a model of it and how it is trained. Models of a setting train side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

EVALUATED = 256  # queries whose losses are found at a time


@dataclass(frozen=True)
class Data:
    """Training examples and queries; a text's answers are its own tokens, one later."""

    x: Tensor  # [N, …]
    y: Tensor  # [N] classes, or [N, T] tokens
    queries: Tensor  # [Q, …]
    answers: Tensor  # [Q] or [Q, T]
    texts: tuple[list[str], list[str]] | None = None  # of examples and queries, for BM25

    def to(self, device: torch.device) -> Data:
        """The same on a device."""
        return Data(
            self.x.to(device),
            self.y.to(device),
            self.queries.to(device),
            self.answers.to(device),
            self.texts,
        )


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: the rate falls linearly to 0."""

    optimizer: str  # "sgd" with momentum 0.9, or "adamw"
    rate: float
    decay: float
    batch: int
    epochs: int
    bf16: bool = False  # products in bfloat16, weights and sums in float32


@dataclass(frozen=True)
class Setting:
    """What an accuracy benchmark runs on, and how much of it."""

    name: str
    title: str
    load: Callable[[], Data]  # FileNotFoundError says which variable names the data
    model: Callable[[], nn.Module]  # untrained, x -> logits; torch's generator draws its weights
    recipe: Recipe
    halves: int
    seeds: int
    side_by_side: int  # models that are trained at once
    removed: tuple[int, ...]  # examples that brittleness leaves out
    asked: int  # queries of brittleness
    ranks: tuple[int, ...]  # of random and PCA projections
    coordinates: tuple[int, ...]  # of eigenbasis rows
    trak_dim: int
    representation: str  # the module before the last layer
    watched: tuple[str, ...] | None = None  # parts of the layers' names; None: all layers

    def smaller(self) -> Setting:
        """What `make accuracy` runs: the same models, few of them."""
        halves, asked = (40, 8) if self.side_by_side > 10 else (12, 2)
        return replace(self, halves=halves, seeds=1, removed=self.removed[-1:], asked=asked)

    def key(self, data: Data) -> str:
        """Names what a retrained model depends on, beside its examples and its seed."""
        digest = hashlib.sha256()
        for part in (data.x, data.y, data.queries, data.answers):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        return f"{self.name}, {self.recipe}, {digest.hexdigest()[:20]}"


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy [n] of logits [n, C], y [n], or summed over the tokens of [n, T, C], [n, T]."""
    if y.dim() == 1:
        return nn.functional.cross_entropy(logits, y, reduction="none")
    return nn.functional.cross_entropy(logits.mT, y, reduction="none").sum(dim=-1)


class SideBySide:
    """B models of one architecture, with weights [B, …] each; B = 1 is an ordinary model."""

    def __init__(self, setting: Setting, seeds: list[int], device: torch.device) -> None:
        made = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made.append(setting.model().to(device))
        self.count = len(made)
        self.module = made[0]
        self.parameters, self.buffers = stack_module_state(made)
        self._together: Callable[..., Tensor] = torch.func.vmap(self._alone)

    def logits(self, x: Tensor) -> Tensor:
        """[B, n, …] of x [B, n, …]; model b sees x[b]."""
        state = {**self.parameters, **self.buffers}
        if self.count == 1:
            one = {name: value[0] for name, value in state.items()}
            return self._alone(one, x[0])[None]
        return self._together(state, x)

    def _alone(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(self.module, state, (x,))
        return found

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, n] of x and y [B, n, …]."""
        flat = losses(self.logits(x).flatten(0, 1), y.flatten(0, 1))
        return flat.view(y.shape[:2])

    def single(self) -> nn.Module:
        """The first model, in evaluation mode, with weights of its own."""
        with torch.no_grad():
            for name, weight in self.module.named_parameters():
                weight.copy_(self.parameters[name][0])
            for name, buffer in self.module.named_buffers():
                buffer.copy_(self.buffers[name][0])
        return self.module.eval()


def train(setting: Setting, data: Data, indices: list[np.ndarray], seeds: list[int]) -> SideBySide:
    """B models, model b trained on the examples indices[b] with seeds[b]; subsets of one size."""
    recipe, size, device = setting.recipe, len(indices[0]), data.x.device
    models = SideBySide(setting, seeds, device)
    models.module.train()
    parameters = list(models.parameters.values())
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, recipe.rate, 0.9, weight_decay=recipe.decay)
    else:
        optimizer = torch.optim.AdamW(parameters, recipe.rate, weight_decay=recipe.decay)
    steps = recipe.epochs * -(-size // recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    places = torch.stack([torch.from_numpy(one) for one in indices])
    terms = data.y[0].numel()
    for _ in range(recipe.epochs):
        order = torch.stack([torch.randperm(size, generator=one) for one in generators])
        for part in order.split(recipe.batch, dim=1):
            chosen = places.gather(1, part).to(device)  # [B, batch]
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                found = models.losses(data.x[chosen], data.y[chosen])
            optimizer.zero_grad(set_to_none=True)
            # each model's own mean; their sum, because they share no weight
            (found.sum() / (part.shape[1] * terms)).backward()
            optimizer.step()
            schedule.step()
    models.module.eval()
    return models


def query_outcomes(
    setting: Setting, data: Data, indices: list[np.ndarray], seeds: list[int]
) -> np.ndarray:
    """[B, 2 Q] under models trained so: the queries' losses, then whether each is answered right.

    A text counts by the share of its tokens that are predicted.
    """
    models = train(setting, data, indices, seeds)
    count, found, right = models.count, [], []
    with torch.no_grad():
        for x, y in zip(data.queries.split(EVALUATED), data.answers.split(EVALUATED), strict=True):
            logits = models.logits(x.expand(count, *x.shape))
            answers = y.expand(count, *y.shape)
            found.append(losses(logits.flatten(0, 1), answers.flatten(0, 1)).view(count, len(x)))
            same = (logits.argmax(-1) == answers).double()
            right.append(same.view(count, len(x), -1).mean(dim=2))
    return torch.cat([*found, *right], dim=1).double().cpu().numpy()


def query_losses(
    setting: Setting, data: Data, indices: list[np.ndarray], seeds: list[int]
) -> np.ndarray:
    """Losses of the queries [B, Q] under models trained so: `retrain`'s function."""
    return query_outcomes(setting, data, indices, seeds)[:, : len(data.queries)]


def trained_model(setting: Setting, data: Data, seed: int = 1000) -> nn.Module:
    """The model that is explained, trained on all examples."""
    return train(setting, data, [np.arange(len(data.x))], [seed]).single()
