"""dattri-llm 0.1.0: HookManager around the loop, TracIn over its cache. No curvature of rows.

- A projector factory, an extension point of dattri-llm, returns our matrices by the seed of layer
  and side, so that its rows equal ours.
- capture_style="auto" keeps what is smaller: token factors, or the product. The model is frozen
  but for its embedding (include_frozen), as its documentation advises for a probe.
- The writer is its asynchronous one, one file a step, its default for a batch.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from dattri_llm import (
    AttributionArguments,
    GradientStorageManager,
    HookManager,
    HookManagerConfig,
    OffloadCallback,
    TracInAttributor,
)
from dattri_llm.gradient import ops as their_ops
from dattri_llm.gradient.gradient import Gradient, GradientRecord
from torch import Tensor

from bench.harness.models import summed_loss
from bench.peers import silenced
from bench.peers.setting import LoggingSetting
from logra_kernels.store import Module

Projector = Callable[[Tensor], Tensor]


class Logger:
    """HookManager.collect() around the loop, with an OffloadCallback."""

    row_files = "batch_*"

    def __init__(self, setting: LoggingSetting) -> None:
        self.setting = setting
        self.model = setting.probe()
        # dattri-llm gives seed 2i to the output side of layer i, and 2i + 1 to its input side
        matrices = [matrix for name in setting.names for matrix in setting.matrices(name)]

        def projector(feature: Tensor, batch: int, *, proj_seed: int, **_: object) -> Projector:
            return lambda x: x @ matrices[proj_seed].T

        self.config = HookManagerConfig(
            hook_types=dict.fromkeys(setting.names, "linear_io"),
            capture_style="auto",
            include_frozen=True,
            projector=projector,
            projection_kwargs={
                name: {"style": "logra", "proj_dim": setting.rank, "proj_seed": 2 * index}
                for index, name in enumerate(setting.names)
            },
        )

    def __call__(self, folder: Path) -> Path:
        """Log every example into the folder."""
        with silenced(), torch.enable_grad():
            store = GradientStorageManager(str(folder))
            hooks = HookManager(
                self.model, self.config, callbacks=[OffloadCallback(1, store, async_write=True)]
            )
            with hooks.collect():
                for _, ids in self.setting.batches():
                    self.model.zero_grad()
                    summed_loss(self.model, ids).backward()
            hooks.remove()
        return folder

    def rows(self, folder: Path) -> Tensor:
        """The logged rows [N, D]."""
        return rows_of(folder, self.setting.names)


def rows_of(folder: Path, names: list[str]) -> Tensor:
    """The rows [N, D] of a folder that dattri-llm wrote."""
    store = GradientStorageManager(str(folder))
    rows = []
    for path, _ in store.iter_steps(store.available_steps()):
        for record in store.load_records(path):
            gradient = record.gradient
            parts = [
                their_ops.materialize(gradient.data[name], gradient.layer_types[name]).flatten(1)
                for name in names
            ]
            rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


class Influence:
    """TracIn's dot products over a cache of given rows."""

    def __init__(self, folder: Path, modules: list[Module], rows: Tensor, batch: int = 64) -> None:
        self.folder, self.modules = folder, modules
        with silenced():
            self.arguments = AttributionArguments(
                output_dir=str(folder / "scores"), per_device_train_batch_size=batch, use_cpu=True
            )
        self._write("train", rows, batch)

    def _write(self, name: str, rows: Tensor, batch: int) -> None:
        sizes = [module.size for module in self.modules]
        store = GradientStorageManager(str(self.folder / name))
        for step, first in enumerate(range(0, len(rows), batch)):
            block = rows[first : first + batch]
            parts = zip(self.modules, block.split(sizes, dim=1), strict=True)
            data = {m.name: part.reshape(-1, m.ko, m.ki).contiguous() for m, part in parts}
            gradient = Gradient(
                representation=dict.fromkeys(data, "materialized"),
                data=data,
                layer_types=dict.fromkeys(data, "nn.Linear"),
            )
            ids = [f"{name}{first + index}" for index in range(len(block))]
            store.save_bulk([GradientRecord(step=step, input_hash=ids, gradient=gradient)])

    def scores(self, queries: Tensor) -> Tensor:
        """[Q, N]; the queries are written first, for dattri-llm takes them from a store."""
        name = f"queries{len(queries)}"
        if not (self.folder / name).exists():
            self._write(name, queries, len(queries))
        with silenced():
            score = TracInAttributor(self.arguments).attribute_from_cache(
                str(self.folder / "train"), str(self.folder / name)
            )
        scores: Tensor = score.agnostic_matrix()[1].T
        return scores
