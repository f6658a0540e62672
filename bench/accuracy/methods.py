"""Scores [Q, N] of an MLP's training examples by each method, and what they cost to keep."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.accuracy.mlp import Data
from logra_kernels import Config, Run
from logra_kernels.curvature import DampingScale

LOG_BATCH = 250


@dataclass(frozen=True)
class Method:
    """A way to score: its projection, its curvature, and how its rows are stored."""

    name: str
    curvature: str  # a kind, or "none"
    rank: int | None = None  # of a random or PCA projection
    coordinates: int | None = None  # of eigenbasis rows
    init: str = "random"
    dtype: str = "float16"
    pilot: float = 1.0  # share of the examples
    cosine: bool = False
    damping_scale: DampingScale | None = None

    @property
    def label(self) -> str:
        """How the table calls it."""
        rank = "" if self.rank is None else f", rank {self.rank}"
        pilot = "" if self.pilot == 1 else f", pilot of {self.pilot:.0%}"
        scale = "" if self.damping_scale is None else f", damping {self.damping_scale}"
        return f"{self.name}{rank}{pilot}{scale}"

    def logged(self, model: nn.Module, data: Data, folder: str) -> Run:
        """The finished run of all training examples."""
        run = Run("mlp", Config(root_dir=folder, dtype=self.dtype))
        run.watch(model, bias=True)
        self._project(run, model, data)
        run.setup({"save": "grad", "statistic": self.curvature})
        for ids, x, y in _batches(data.x, data.y):
            with run(ids):
                _loss(model, x, y).backward()
        run.finalize()
        return run

    def scores(self, model: nn.Module, data: Data) -> tuple[Tensor, int, int]:
        """(scores [Q, N], D, bytes of a row with its scale)."""
        with tempfile.TemporaryDirectory() as folder:
            run = self.logged(model, data, folder)
            run.eval()
            found = []
            for ids, x, y in _batches(data.queries, data.answers):
                with run([f"query {n}" for n in ids]):
                    _loss(model, x, y).backward()
                found.append(run.last_rows()[1])
            attributor = run.attributor(
                precondition=self.curvature != "none", damping_scale=self.damping_scale
            )
            mode = "whitened-cosine" if self.cosine else "dot"
            scores = attributor.scores(torch.cat(found), mode).scores
            size = sum(file.stat().st_size for file in Path(folder).rglob("shard-*.npy"))
            return scores, run.layout.dim, size // len(data.x)

    def _project(self, run: Run, model: nn.Module, data: Data) -> None:
        if self.rank is not None and self.init != "pca":
            run.add_lora(rank=self.rank, init=self.init)
        elif self.rank is not None or self.coordinates is not None:
            count = max(1, round(self.pilot * len(data.x)))
            init = "pca" if self.rank is not None else "eigen"
            with run.pilot(init, coordinates=self.coordinates, rank=self.rank):
                for ids, x, y in _batches(data.x[:count], data.y[:count]):
                    with run(ids):
                        _loss(model, x, y).backward()


def _batches(x: Tensor, y: Tensor) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    for first in range(0, len(x), LOG_BATCH):
        part = slice(first, first + LOG_BATCH)
        yield list(range(len(x)))[part], x[part], y[part]


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="sum")


METHODS = [
    Method("full EKFAC", "ekfac", dtype="float32"),
    Method("random, raw", "raw", rank=16),
    Method("random, raw", "raw", rank=64),
    Method("random, raw", "raw", rank=64, damping_scale="auto"),
    Method("random, EKFAC", "ekfac", rank=64),
    Method("PCA, EKFAC", "ekfac", rank=16, init="pca"),
    Method("PCA, EKFAC", "ekfac", rank=64, init="pca"),
    Method("eigenbasis", "diagonal", coordinates=2368),
    Method("eigenbasis", "diagonal", coordinates=8192),
    Method("eigenbasis", "diagonal", coordinates=16384),
    Method("eigenbasis", "diagonal", coordinates=8192, pilot=0.1),
    Method("gradient dot", "none", dtype="float32"),
    Method("gradient cosine", "none", dtype="float32", cosine=True),
]
