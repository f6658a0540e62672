"""Bergson 2.5.1: projection in the forward hook, one flat file of float32 rows, FAISS or a copy.

- The projection matrices of its processor are set to ours, so that its rows equal ours; it gets
  our batches too. The model is frozen but for its embedding, as `bergson build` does.
- With curvature, one pass builds the index and the Gram matrices (an in-memory collector that is
  given a builder on disk); its command line makes two passes of it.
- FAISS with a Hessian is wrong in both modes: with one side H^-1 is applied to the rows and to the
  query; with two (unit norm) rows are normalised before they are preconditioned, not after. The
  dot product is right if the query is preconditioned by hand and the index is not.
- It asks faiss for a GPU class that faiss-cpu lacks; a patch answers that nothing is on a GPU.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson import (
    Attributor,
    Builder,
    FaissConfig,
    GradientProcessor,
    IndexConfig,
    InMemoryCollector,
    PreprocessConfig,
    Scorer,
    load_gradients,
)
from bergson.collection import collect_gradients
from bergson.collector.collector import CollectorComputer
from bergson.data import column_offsets
from bergson.hessians.preconditioner import load_preconditioner
from bergson.score.score import _make_split_hessian
from bergson.score.score_writer import ScoreWriter
from datasets import Dataset
from torch import Tensor

from bench.peers import replaced, silenced
from bench.peers.setting import LoggingSetting
from logra_kernels.store import Module


def prepared(setting: LoggingSetting, names: list[str]) -> GradientProcessor:
    """A GradientProcessor with our projections; `names` are Bergson's names of our modules."""
    processor = GradientProcessor(projection_dim=setting.rank)
    for name, ours in zip(names, setting.names, strict=True):
        proj_out, proj_in = setting.matrices(ours)
        processor._projection_matrices[name, "left", torch.device("cpu")] = proj_out
        processor._projection_matrices[name, "right", torch.device("cpu")] = proj_in
    return processor


class Logger:
    """What `bergson build` does in its worker, once model and data are loaded."""

    row_files = "gradients.bin"

    def __init__(self, setting: LoggingSetting, curvature: bool) -> None:
        self.setting, self.curvature = setting, curvature
        self.model = setting.probe()
        self.names = [name.removeprefix("model.") for name in setting.names]
        ids = setting.ids.tolist()
        self.data = Dataset.from_dict({"input_ids": ids, "length": [len(i) for i in ids]})
        self.batches = [indices for indices, _ in setting.batches()]

    def __call__(self, folder: Path) -> None:
        """Log every example into the folder."""
        config = IndexConfig(
            run_path=str(folder), projection_dim=self.setting.rank, loss_reduction="sum"
        )
        config.partial_run_path.mkdir(parents=True)
        processor = prepared(self.setting, self.names)
        common: dict[str, Any] = {"data": self.data, "target_modules": set(self.names)}
        with silenced(), torch.enable_grad():
            if self.curvature:
                sizes = dict.fromkeys(self.names, self.setting.rank**2)
                path, how = config.partial_run_path, PreprocessConfig()
                collector = InMemoryCollector(
                    model=self.model.base_model,
                    cfg=config,
                    processor=processor,
                    skip_hessians=False,
                    builder=Builder(self.data, sizes, torch.float32, how, path=path),
                    **common,
                )
                CollectorComputer(
                    self.model, self.data, collector=collector, batches=self.batches, cfg=config
                ).run_with_collector_hooks()
                processor.save(path)
            else:
                collect_gradients(
                    self.model, processor=processor, cfg=config, batches=self.batches, **common
                )
        shutil.move(config.partial_run_path, folder)

    def rows(self, folder: Path) -> Tensor:
        """The logged rows [N, D]."""
        return torch.from_numpy(np.array(load_gradients(folder)))


class Kept(ScoreWriter):
    """Scores in memory, [N, Q]."""

    def __init__(self, num_rows: int, num_queries: int) -> None:
        self.scores = torch.empty(num_rows, num_queries)

    def __call__(self, indices: list[int], scores: Tensor, query_offset: int = 0) -> None:
        """Keep the scores of a batch."""
        self.scores[indices] = scores.cpu()

    def flush(self) -> None:
        """Nothing is left to write."""


class Influence:
    """Rows in Bergson's store, and each way that Bergson has to score them.

    Its H + 0.1 mean(eigenvalue) is ours.
    """

    def __init__(
        self, folder: Path, modules: list[Module], rows: Tensor, covariances: dict[str, Tensor]
    ) -> None:
        self.folder, self.modules = folder, modules
        sizes = {module.name: module.size for module in modules}
        self.offsets = column_offsets(sizes)
        with silenced():
            data = Dataset.from_dict({"length": [1] * len(rows)})
            builder = Builder(data, sizes, torch.float32, PreprocessConfig(), path=folder)
            for first in range(0, len(rows), 256):
                block = rows[first : first + 256]
                columns = dict(zip(sizes, block.split(list(sizes.values()), dim=1), strict=True))
                builder(list(range(first, first + len(block))), columns)
            builder.teardown()
            hessians = {name: value.float() for name, value in covariances.items()}
            GradientProcessor(projection_dim=modules[0].ki, hessians=hessians).save(folder)
            self.one_sided = load_preconditioner(folder, power=-1.0)
            self.two_sided = load_preconditioner(folder, power=-0.5)

    def nested(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows [R, D] as {module: its columns}."""
        return {name: rows[:, lo:hi] for name, (lo, hi) in self.offsets.items()}

    def opened(
        self, *, hessian: bool = False, unit_norm: bool = False, factory: str | None = None
    ) -> Attributor:
        """The whole index copied to memory as float32, or a FAISS index made of it and mapped."""
        faiss = FaissConfig(index_factory=factory, mmap_index=True) if factory else None
        no_gpu = {"bergson.query.faiss_index._is_gpu_resident": lambda index: False}
        with silenced(), replaced(no_gpu):
            return Attributor(
                self.folder,
                unit_norm=unit_norm,
                faiss_cfg=faiss,
                hessian_path=self.folder if hessian else None,
            )

    def preconditioned(self, queries: Tensor) -> dict[str, Tensor]:
        """The queries, preconditioned, as {module: its columns}."""
        nested: dict[str, Tensor] = self.one_sided.apply(self.nested(queries))
        return nested

    def search(
        self, index: Attributor, queries: Tensor, k: int, by_hand: bool = False
    ) -> Callable[[], Tensor]:
        """A call of `index` for the k highest scores; by_hand: the query is preconditioned here."""
        nest = self.preconditioned if by_hand else self.nested
        return lambda: index.search(nest(queries), k)[0]

    def stream(self, queries: Tensor, block_rows: int = 256, whitened: bool = False) -> Tensor:
        """[Q, N]: the Scorer, set up as by `bergson score`, gets the mapped gradients.

        `bergson score` itself runs the model again for them.
        """
        names = list(self.offsets)
        mapped = load_gradients(self.folder)
        asked = self.nested(queries)
        transform = None
        if whitened:
            asked = self.two_sided.apply(asked)
            norm = torch.cat(list(asked.values()), dim=1).norm(dim=1, keepdim=True)
            asked = {name: value / norm for name, value in asked.items()}
            transform = _make_split_hessian(
                self.two_sided.h_inv, names, torch.device("cpu"), torch.float32
            )
        else:
            asked = self.one_sided.apply(asked)
        writer = Kept(len(mapped), len(queries))
        scorer = Scorer(
            asked,
            names,
            writer,
            torch.device("cpu"),
            torch.float32,
            unit_normalize=whitened,
            index_transform=transform,
        )
        for first in range(0, len(mapped), block_rows):
            block = torch.from_numpy(np.array(mapped[first : first + block_rows]))
            scorer(list(range(first, first + len(block))), self.nested(block))
        return writer.scores.T
