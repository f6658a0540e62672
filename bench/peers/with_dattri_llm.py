"""dattri-llm 0.1.0: HookManager around the loop. No curvature of rows.

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
    GradientStorageManager,
    HookManager,
    HookManagerConfig,
    OffloadCallback,
)
from dattri_llm.gradient import ops as their_ops
from torch import Tensor

from bench.harness.models import summed_loss
from bench.peers import silenced
from bench.peers.setting import LoggingSetting

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

    def __call__(self, folder: Path) -> None:
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

    def rows(self, folder: Path) -> Tensor:
        """The logged rows [N, D]."""
        store = GradientStorageManager(str(folder))
        rows = []
        for path, _ in store.iter_steps(store.available_steps()):
            for record in store.load_records(path):
                data, types = record.gradient.data, record.gradient.layer_types
                parts = [
                    their_ops.materialize(data[name], types[name]).flatten(1)
                    for name in self.setting.names
                ]
                rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)
