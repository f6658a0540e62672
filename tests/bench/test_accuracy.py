"""The accuracy benchmark on random images: every method runs; models train as if alone."""

import dataclasses

import numpy as np
import pytest
import torch

from bench.accuracy import mlp
from bench.accuracy.__main__ import flipped_auc
from bench.accuracy.methods import METHODS, Method

COUNT = 80


@pytest.fixture(scope="module")
def data() -> mlp.Data:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (COUNT,), generator=generator)
    means = torch.randn(10, 784, generator=generator)
    x = means[y] + torch.randn(COUNT, 784, generator=generator)
    return mlp.Data(x, y, x[:6] + 0.1, y[:6])


def test_models_side_by_side_are_those_that_train_alone(
    data: mlp.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to float32's sums in another order over six steps."""
    monkeypatch.setattr(mlp, "EPOCHS", 3)
    parts = [np.arange(0, 40), np.arange(40, 80)]
    both = mlp.query_losses(data, parts, [0, 1])
    alone = [
        mlp.query_losses(data, [part], [seed])[0] for part, seed in zip(parts, (0, 1), strict=True)
    ]
    assert np.allclose(both, alone, rtol=1e-3)
    assert not np.allclose(both[0], both[1], rtol=0.1)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_every_method_scores(
    data: mlp.Data, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "EPOCHS", 2)
    small = method
    if method.rank is not None:
        small = dataclasses.replace(method, rank=4)
    elif method.coordinates is not None:
        small = dataclasses.replace(method, coordinates=90)
    scores, dim, size = small.scores(mlp.model_of(data), data)
    assert scores.shape == (6, COUNT)
    assert scores.isfinite().all()
    assert dim * 2 <= size <= dim * 4 + 200
    same = (data.y == data.answers[:, None]).float()  # examples of the query's class help it
    assert (scores * same).sum() > (scores * (1 - same)).sum()


def test_flipped_labels_stand_out(data: mlp.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "EPOCHS", 8)
    assert flipped_auc(data) > 0.7
