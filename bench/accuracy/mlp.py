"""An MLP 784-128-64-10 on the first 5,000 images of Fashion-MNIST.

The images are those of Debian's package dataset-fashion-mnist, or of LOGRA_FASHION_MNIST, a folder
with the four IDX files.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.accuracy.setting import Data, Recipe, Setting

PACKAGE = "/usr/share/datasets/fashion-mnist"
EXAMPLES, QUERIES = 5000, 200


def load(examples: int = EXAMPLES, queries: int = QUERIES) -> Data:
    """The first images of the training set, and as queries the first of the test set.

    Raises: FileNotFoundError with what to install.
    """
    folder = Path(os.environ.get("LOGRA_FASHION_MNIST", PACKAGE))
    if not folder.is_dir():
        raise FileNotFoundError("install dataset-fashion-mnist, or set LOGRA_FASHION_MNIST")
    x, qx = (_read(folder, f"{part}-images-idx3", 16) for part in ("train", "t10k"))
    y, qy = (_read(folder, f"{part}-labels-idx1", 8) for part in ("train", "t10k"))
    x, qx = x.reshape(-1, 784)[:examples] / 255, qx.reshape(-1, 784)[:queries] / 255
    mean, spread = x.mean(), x.std()
    return Data(
        torch.from_numpy((x - mean) / spread).float(),
        torch.from_numpy(y[:examples].astype(np.int64)),
        torch.from_numpy((qx - mean) / spread).float(),
        torch.from_numpy(qy[:queries].astype(np.int64)),
    )


def _read(folder: Path, name: str, offset: int) -> np.ndarray:
    plain, packed = folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz"
    raw = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    values: np.ndarray = np.frombuffer(raw, np.uint8, offset=offset)
    return values


def model() -> nn.Sequential:
    """Untrained, as torch initialises it."""
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


SETTING = Setting(
    name="mlp",
    title="MLP on Fashion-MNIST",
    load=load,
    model=model,
    recipe=Recipe("sgd", 0.03, 1e-3, batch=64, epochs=30),
    halves=100,
    seeds=3,
    side_by_side=50,
    removed=(20, 80, 320),
    asked=20,
    ranks=(16, 32, 64),
    coordinates=(2368, 8192, 16384),
    trak_dim=512,
    representation="3",
)
