"""Every way to score a setting's training examples, and the bytes that it keeps of an example."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.accuracy.setting import Data, Setting, losses
from logra_kernels import Config, Run
from logra_kernels.baselines import (
    Bm25,
    Random,
    RepresentationSimilarity,
    RowProjection,
    Trak,
    gradient_cosine,
    gradient_dot,
    hidden_states,
    margin,
)
from logra_kernels.curvature import DampingScale

LOG_BATCH = 250  # examples of a pass
PASS_ELEMENTS = 1 << 26  # of whole gradients in memory, 256 MiB
FULL = "full EKFAC"


@dataclass(frozen=True)
class Subject:
    """A trained model of a setting, and the data that it is asked about."""

    setting: Setting
    data: Data
    model: nn.Module

    def batches(self, queries: bool = False) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(numbers, x, y) of the training examples or the queries, in order."""
        x, y = self.data.x, self.data.y
        if queries:
            x, y = self.data.queries, self.data.answers
        size = sum(weight.numel() for weight in self.model.parameters())
        batch = max(1, min(LOG_BATCH, PASS_ELEMENTS // size))
        for first in range(0, len(x), batch):
            part = slice(first, first + batch)
            yield list(range(len(x)))[part], x[part], y[part]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Summed over the examples."""
        return losses(self.model(x), y).sum()

    def run(self, folder: str, dtype: str = "float32") -> Run:
        """A run that watches the model's layers."""
        run = Run(self.setting.name, Config(root_dir=folder, dtype=dtype))
        run.watch(self.model, name_filter=self.setting.watched, bias=True)
        return run

    def query_rows(self, run: Run) -> Tensor:
        """[Q, D] as this run projects."""
        found = []
        for ids, x, y in self.batches(queries=True):
            with run([f"query {n}" for n in ids], save=False):
                self.loss(x, y).backward()
            found.append(run.last_rows()[1])
        return torch.cat(found)


class Found(NamedTuple):
    """A method's scores, and what it keeps of a training example."""

    method: str
    dim: int | None
    size: int | None  # bytes
    scores: Tensor  # [Q, N]


@dataclass(frozen=True)
class Rows:
    """Stored gradient rows, and the curvature that preconditions them."""

    name: str
    curvature: str
    init: str = "random"
    rank: int | None = None  # of a random or PCA projection
    coordinates: int | None = None  # of eigenbasis rows
    dtype: str = "float16"
    pilot: float = 1.0  # share of the examples
    moments: str = "expand"  # whose eigenvectors a pilot takes
    damping_scale: DampingScale | None = None

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        pilot = "" if self.pilot == 1 else f", pilot of {self.pilot:.0%}"
        scale = "" if self.damping_scale is None else f", damping {self.damping_scale}"
        moments = "" if self.moments == "expand" else f", {self.moments} moments"
        return f"{self.name}{rank}{pilot}{moments}{scale}"

    def logged(self, subject: Subject, folder: str) -> Run:
        """The finished run of all training examples."""
        run = subject.run(folder, self.dtype)
        if self.init in ("pca", "eigen"):
            count = max(1, round(self.pilot * len(subject.data.x)))
            size = {"coordinates": self.coordinates, "rank": self.rank}
            with run.pilot(self.init, moments=self.moments, **size):
                for ids, x, y in subject.batches():
                    kept = [n for n in ids if n < count]
                    if kept:
                        with run(kept):
                            subject.loss(x[: len(kept)], y[: len(kept)]).backward()
        elif self.rank is not None:
            run.add_lora(rank=self.rank, init=self.init)
        run.setup({"save": "grad", "statistic": self.curvature})
        for ids, x, y in subject.batches():
            with run(ids):
                subject.loss(x, y).backward()
        run.finalize()
        return run

    def __call__(self, subject: Subject) -> Iterator[Found]:
        """Its scores; whole rows give gradient products too."""
        with tempfile.TemporaryDirectory() as folder:
            run = self.logged(subject, folder)
            run.eval()
            queries = subject.query_rows(run)
            files = Path(folder).rglob("shard-*.npy")
            size = sum(file.stat().st_size for file in files) // len(subject.data.x)
            attributor = run.attributor(damping_scale=self.damping_scale)
            yield Found(str(self), run.layout.dim, size, attributor.scores(queries, "dot").scores)
            if self.name == FULL:
                dot, cosine = gradient_dot(run.store), gradient_cosine(run.store)
                yield Found("gradient dot", run.layout.dim, size, dot.scores(queries))
                yield Found("gradient cosine", run.layout.dim, size, cosine.scores(queries))


Method = Callable[[Subject], Iterator[Found]]


def trak(subject: Subject) -> Iterator[Found]:
    """TRAK of one model: whole gradients of the margin, projected together."""
    dim = min(subject.setting.trak_dim, len(subject.data.x) // 2)
    projection = RowProjection(dim)
    found: dict[bool, Tensor] = {}
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        run = subject.run(folder)
        for queries in (False, True):
            parts = []
            for ids, x, y in subject.batches(queries):
                with run([f"{queries} {n}" for n in ids], save=False):
                    outputs = margin(subject.model(x), y)
                    outputs.sum().backward()
                parts.append(projection(run.last_rows()[1]))
                if not queries:
                    residual = torch.sigmoid(-outputs.detach())
                    weights.append(residual if y.dim() == 1 else residual.mean(dim=1))
            found[queries] = torch.cat(parts)
    method = Trak([found[False]], [torch.cat(weights)])
    yield Found("TRAK, one model", dim, 4 * dim, method.scores([found[True]]))


def similarity(subject: Subject) -> Iterator[Found]:
    """Cosines of the representations before the last layer, a text's averaged over its tokens."""
    name = subject.setting.representation

    def states(queries: bool) -> Tensor:
        return torch.cat(
            [
                hidden_states(subject.model, name, partial(subject.model, x))
                for _, x, _ in subject.batches(queries)
            ]
        )

    examples = states(False)
    width = examples.shape[1]
    found = RepresentationSimilarity(examples).scores(states(True))
    yield Found("representation similarity", width, 4 * width, found)


def bm25(subject: Subject) -> Iterator[Found]:
    """Words that texts share; nothing for images."""
    if subject.data.texts is not None and importlib.util.find_spec("bm25s"):
        known, asked = subject.data.texts
        size = sum(len(text.encode()) for text in known) // len(known)
        yield Found("BM25", None, size, Bm25(known).scores(asked))


def chance(subject: Subject) -> Iterator[Found]:
    """Random scores."""
    scores = Random(len(subject.data.x)).scores(subject.data.queries)
    yield Found("random scores", None, None, scores)


def kronfluence(subject: Subject) -> Iterator[Found]:
    """kronfluence's EKFAC, an independent reference, where it is installed."""
    if not importlib.util.find_spec("kronfluence"):
        return
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    data, batch = subject.data, len(next(subject.batches())[0])
    with tempfile.TemporaryDirectory() as folder:
        watched = [module.name for module in subject.run(folder).modules]

    class Summed(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return losses(model(batch[0]), batch[1]).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return watched

        def get_attention_mask(self, batch: Any) -> None:
            return None

    # kronfluence puts its own modules in the place of the watched ones.
    model = copy.deepcopy(subject.model)
    task, examples = Summed(), TensorDataset(data.x, data.y)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            subject.setting.name, prepare_model(model, task), task, cpu=True,
            log_level=logging.ERROR, disable_tqdm=True, output_dir=folder,
        )  # fmt: skip
        analyzer.fit_all_factors(
            factors_name="factors",
            dataset=examples,
            per_device_batch_size=batch,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="factors",
            query_dataset=TensorDataset(data.queries, data.answers),
            train_dataset=examples,
            per_device_query_batch_size=20,
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(damping_factor=None),
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    yield Found("full EKFAC, kronfluence", None, None, scores)


def methods_of(setting: Setting, quick: bool = False) -> list[Method]:
    """All methods on a setting, full EKFAC first; quick: one of each kind."""
    ranks, middle = setting.ranks, setting.coordinates[1]
    quick_ranks = ranks[-1:] if quick else ranks
    methods: list[Method] = [Rows(FULL, "ekfac", dtype="float32")]
    methods += [
        Rows("eigenbasis", "diagonal", "eigen", coordinates=dim)
        for dim in ((middle,) if quick else setting.coordinates)
    ]
    methods += [
        Rows("eigenbasis", "diagonal", "eigen", coordinates=dim, moments="sequence")
        for dim in (() if quick else setting.coordinates)
    ]
    methods += [
        Rows("eigenbasis, shrunk", "shrunk", "eigen", coordinates=dim)
        for dim in (() if quick else setting.coordinates[:2])
    ]
    methods += [
        Rows("eigenbasis, sign", "diagonal", "eigen", coordinates=dim, dtype="sign")
        for dim in ((middle,) if quick else (*setting.coordinates, 2 * setting.coordinates[-1]))
    ]
    if not quick:
        methods += [
            Rows(f"eigenbasis, {codec}", "diagonal", "eigen", coordinates=middle, dtype=codec)
            for codec in ("int8", "int4", "int2")
        ]
    methods.append(Rows("eigenbasis", "diagonal", "eigen", coordinates=middle, pilot=0.1))
    methods += [Rows("PCA, EKFAC", "ekfac", "pca", rank=rank) for rank in quick_ranks]
    methods += [Rows("random, raw", "raw", rank=rank) for rank in quick_ranks]
    if not quick:
        methods.append(Rows("random, raw", "raw", rank=ranks[1], damping_scale="auto"))
        methods += [Rows("PCA, raw", "raw", "pca", rank=rank) for rank in ranks[:2]]
        methods += [Rows("random, EKFAC", "ekfac", rank=rank) for rank in ranks]
        methods.append(kronfluence)
    return [*methods, trak, similarity, bm25, chance]
