"""ResNet-9, width 16, on 5,000 images of CIFAR-10.

LOGRA_CIFAR10 names an npz file with x_train [N, 32, 32, 3] uint8, y_train, x_test and y_test, or a
folder with torchvision's cifar-10-batches-py.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.accuracy.setting import Data, Recipe, Setting

EXAMPLES, QUERIES = 5000, 200
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def resnet9(width: int) -> nn.Module:
    """Images [n, 3, 32, 32] to logits [n, 10]; eight convolutions and a linear layer."""

    def convolution(channels: int, out: int, stride: int = 1) -> nn.Module:
        layer = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU())

    w, w2, w4 = width, 2 * width, 4 * width
    layers = nn.Sequential(
        convolution(3, w),
        convolution(w, w2, stride=2),
        Residual(convolution(w2, w2), convolution(w2, w2)),
        convolution(w2, w4, stride=2),
        convolution(w4, w4, stride=2),
        Residual(convolution(w4, w4), convolution(w4, w4)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(w4, 10),
    )
    for weight in layers.parameters():
        if weight.dim() == 4:  # convolutions of channels that lie last are the faster ones
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return layers


def load(examples: int = EXAMPLES, queries: int = QUERIES) -> Data:
    """The first images of both parts, each channel standardised.

    Raises: FileNotFoundError for a missing file or folder.
    """
    x, y, qx, qy = _read(Path(os.environ.get("LOGRA_CIFAR10", "")))
    return images(x[:examples], y[:examples], qx[:queries], qy[:queries])


def images(x: np.ndarray, y: np.ndarray, queries: np.ndarray, answers: np.ndarray) -> Data:
    """Images [N, 32, 32, 3] uint8 as the model wants them."""
    mean, spread = x.mean(axis=(0, 1, 2)), x.std(axis=(0, 1, 2))
    scaled = [torch.from_numpy((part - mean) / spread).float() for part in (x, queries)]
    return Data(
        scaled[0].permute(0, 3, 1, 2),
        torch.from_numpy(y.astype(np.int64)),
        scaled[1].permute(0, 3, 1, 2),
        torch.from_numpy(answers.astype(np.int64)),
    )


def _read(path: Path) -> Arrays:
    if path.is_file():
        with np.load(path) as file:
            return file["x_train"], file["y_train"], file["x_test"], file["y_test"]
    folder = path / "cifar-10-batches-py"
    if not folder.is_dir():
        raise FileNotFoundError(
            "set LOGRA_CIFAR10 to an npz file, or to torchvision's folder of CIFAR-10"
        )
    parts = [_batch(folder / f"data_batch_{n}") for n in range(1, 6)]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return x, y, *_batch(folder / "test_batch")


def _batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with open(path, "rb") as file:
        content = pickle.load(file, encoding="bytes")
    pixels = content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels, np.array(content[b"labels"])


def model() -> nn.Module:
    """Untrained, as torch initialises it."""
    return resnet9(16)


SETTING = Setting(
    name="resnet9",
    title="ResNet-9 of width 16 on CIFAR-10",
    load=load,
    model=model,
    recipe=Recipe("adamw", 3e-3, 0.01, batch=32, epochs=6, bf16=True),
    halves=50,
    seeds=2,
    side_by_side=1,
    removed=(320,),
    asked=10,
    ranks=(8, 16, 32),
    coordinates=(8192, 32768, 65536),
    trak_dim=512,
    representation="7",
)
