"""The MLP on Fashion-MNIST: its data, and models trained side by side.

784-128-64-10 on the first 5,000 training images, initialised as nn.Linear is, SGD with momentum, 30
epochs. The images are those of Debian's package dataset-fashion-mnist, or of LOGRA_FASHION_MNIST, a
folder with the four IDX files.
"""

from __future__ import annotations

import gzip
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(os.environ.get("LOGRA_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
WIDTHS = (784, 128, 64, 10)
NAME = "mlp 784-128-64-10 as nn.Linear, sgd 0.03 momentum 0.9 decay 1e-3, batch 64, 30 epochs"
BATCH, EPOCHS, RATE, MOMENTUM, DECAY = 64, 30, 0.03, 0.9, 1e-3


@dataclass(frozen=True)
class Data:
    """Images [N, 784] in 0 … 1, standardised, with their classes [N]."""

    x: Tensor
    y: Tensor
    queries: Tensor  # [Q, 784]
    answers: Tensor  # [Q]


def load(examples: int = 5000, queries: int = 200) -> Data:
    """The first images of the training set, and as queries the first of the test set.

    Raises: FileNotFoundError with what to install.
    """
    if not FOLDER.is_dir():
        raise FileNotFoundError(
            f"{FOLDER}: not there; install dataset-fashion-mnist, or set LOGRA_FASHION_MNIST"
        )
    x, y = _read("train-images-idx3", 16, examples), _read("train-labels-idx1", 8, examples)
    qx, qy = _read("t10k-images-idx3", 16, queries), _read("t10k-labels-idx1", 8, queries)
    mean, spread = x.mean(), x.std()
    return Data(
        torch.from_numpy((x - mean) / spread).float().view(-1, 784),
        torch.from_numpy(y).long().flatten(),
        torch.from_numpy((qx - mean) / spread).float().view(-1, 784),
        torch.from_numpy(qy).long().flatten(),
    )


def _read(name: str, offset: int, count: int) -> np.ndarray:
    plain, packed = FOLDER / f"{name}-ubyte", FOLDER / f"{name}-ubyte.gz"
    raw = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    size = 784 if offset == 16 else 1
    values: np.ndarray = np.frombuffer(raw, np.uint8, count * size, offset).astype(np.float64)
    return values / 255 if offset == 16 else values


def train_side_by_side(data: Data, indices: list[np.ndarray], seeds: list[int]) -> list[Tensor]:
    """Weights and biases [B, …] of B models, model b trained on indices[b] with seeds[b].

    The subsets have one size, so that all models take the same steps.
    """
    count, size = len(indices), len(indices[0])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    parameters: list[Tensor] = []
    for width, out in itertools.pairwise(WIDTHS):
        for shape in ((out, width), (out,)):
            drawn = [torch.rand(shape, generator=one) * 2 - 1 for one in generators]
            parameters.append(torch.stack(drawn) * width**-0.5)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, RATE, MOMENTUM, weight_decay=DECAY)
    steps = EPOCHS * -(-size // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    places = torch.stack([torch.from_numpy(one) for one in indices])
    for _ in range(EPOCHS):
        order = torch.stack([torch.randperm(size, generator=one) for one in generators])
        for part in order.split(BATCH, dim=1):
            chosen = places.gather(1, part)  # [B, batch]
            logits = forward(parameters, data.x[chosen])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), data.y[chosen].flatten())
            optimizer.zero_grad(set_to_none=True)
            (loss * count).backward()  # each model has the mean over its own batch
            optimizer.step()
            schedule.step()
    return [parameter.detach() for parameter in parameters]


def forward(parameters: list[Tensor], x: Tensor) -> Tensor:
    """Logits [B, n, 10] of x [B, n, 784]."""
    for place in range(0, len(parameters), 2):
        weight, bias = parameters[place], parameters[place + 1]
        x = torch.baddbmm(bias[:, None], x, weight.mT)
        x = torch.relu(x) if place + 2 < len(parameters) else x
    return x


def query_losses(data: Data, indices: list[np.ndarray], seeds: list[int]) -> np.ndarray:
    """Losses of the queries [B, Q] under models trained so: `retrain`'s function."""
    parameters = train_side_by_side(data, indices, seeds)
    with torch.no_grad():
        x = data.queries.expand(len(indices), -1, -1)
        logits = forward(parameters, x)
        classes = data.answers.expand(len(indices), -1)
        losses = nn.functional.cross_entropy(logits.mT, classes, reduction="none")
    return losses.double().numpy()


def model_of(data: Data, seed: int = 1000) -> nn.Sequential:
    """The model that is explained, trained on all examples."""
    parameters = train_side_by_side(data, [np.arange(len(data.x))], [seed])
    layers: list[nn.Module] = []
    for place in range(0, len(parameters), 2):
        weight, bias = parameters[place][0], parameters[place + 1][0]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
