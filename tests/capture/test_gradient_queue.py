"""The way that a GPU takes, gradients in groups of modules of one shape, forced on the CPU."""

from typing import Any

import pytest
import torch
from torch import nn

from logra_kernels import ops
from logra_kernels.capture import Capture, gradient_queue
from logra_kernels.capture.kinds import EmbeddingLayer, LinearLayer
from logra_kernels.capture.layers import Layer
from logra_kernels.projection import build_projections


class Tower(nn.Module):
    """Four linear modules of one shape, one of another, one called twice, one embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in (*self.blocks, self.blocks[0]):
            x = x + torch.tanh(block(x))
        logits: torch.Tensor = self.head(x)
        return logits


MASK = torch.arange(24).reshape(4, 6) % 5 > 0


def watched(model: Tower, rank: int | None) -> list[Layer]:
    found: list[Layer] = [EmbeddingLayer("embed", model.embed)]
    found += [LinearLayer(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    found.append(LinearLayer("head", model.head))
    if rank is not None:
        shapes = {layer.name: (layer.in_features, layer.out_features) for layer in found}
        for name, projection in build_projections(shapes, rank).items():
            next(layer for layer in found if layer.name == name).projection = projection
    return found


def rows(rank: int | None, during: Any = None, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    model = Tower()
    ids = torch.randint(0, 11, (4, 6))
    with Capture(model, watched(model, rank), 4, MASK, **kwargs) as capture:
        model(ids).square().sum().backward()
        if during is not None:
            during(capture)
    return capture.rows()


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forces the queue; the sizes of the groups are listed."""
    sizes: list[int] = []
    call = ops.projected_gradients_grouped

    def counted(xs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(xs))
        return call(xs, *args, **kwargs)

    monkeypatch.setattr(gradient_queue, "WAITING_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(ops, "projected_gradients_grouped", counted)
    return sizes


@pytest.mark.parametrize("rank", [None, 3])
def test_the_same_bits(
    rank: int | None, grouped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    got = rows(rank)
    # blocks.0 is called twice; the embedding's x is as wide as the others' where it is projected
    assert sorted(grouped) == ([1, 1, 5] if rank is None else [1, 6])
    monkeypatch.setattr(gradient_queue, "WAITING_BYTES", {})
    del grouped[:]
    assert torch.equal(got, rows(rank))
    assert not grouped


def test_nothing_waits_beyond_the_bound(
    grouped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(3)
    del grouped[:]
    # a module's Px [4, 6, 3] and dy [4, 6, 24] in float32: two fit
    monkeypatch.setattr(gradient_queue, "WAITING_BYTES", {"cpu": 2 * 4 * 6 * 27 * 4})
    assert torch.equal(rows(3), whole)
    assert max(grouped) <= 3


def test_rows_inside_the_pass(grouped: list[int]) -> None:
    inside = []

    def ask(capture: Capture) -> None:
        capture.check_complete()
        inside.append(capture.rows())

    whole = rows(3, ask)
    assert torch.equal(inside[0], whole)


def test_token_scores(grouped: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layers_only = [3 * 3] * 6
    queries = torch.randn(2, sum(layers_only))
    scores = []
    rows(3, lambda capture: scores.append(capture.token_scores()), token_queries=queries)
    monkeypatch.setattr(gradient_queue, "WAITING_BYTES", {})
    rows(3, lambda capture: scores.append(capture.token_scores()), token_queries=queries)
    assert torch.equal(*scores)


def test_an_exception_leaves_nothing_waiting(grouped: list[int]) -> None:
    def fail(capture: Capture) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        rows(3, fail)
    assert not grouped


def test_a_gradient_changed_in_place_is_refused(grouped: list[int]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def run() -> None:
        with Capture(model, [LinearLayer("1", model[1])], 2):
            out = model(torch.randn(2, 3))
            # called after the capture's hook, on the same gradient
            out.grad_fn.register_prehook(lambda gradients: (gradients[0].mul_(2),))
            out.square().sum().backward()

    with pytest.raises(RuntimeError, match="module 1: the gradient of its output was changed in p"):
        run()
