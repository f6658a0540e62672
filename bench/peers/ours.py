"""Our own logging and scoring, in the form that the peers' have."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import logra_kernels as logra
from bench.harness.models import summed_loss
from bench.paths.attribution import write_store
from bench.peers import replaced, silenced
from bench.peers.setting import LoggingSetting
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.run.statistic import Covariance
from logra_kernels.store import Module, Store


class Logger:
    """`with run(data_id): loss.backward()`, from init to finalize.

    The projections are made beforehand, for this library as for the others.
    """

    row_files = "shard-*"

    def __init__(self, setting: LoggingSetting, curvature: bool) -> None:
        self.setting, self.curvature = setting, curvature
        self.model = setting.model()

    def __call__(self, folder: Path) -> Path:
        """Log every example into a store in the folder."""
        setting = self.setting
        run = logra.init(folder.name, root_dir=str(folder.parent), rank=setting.rank)
        run.watch(self.model, name_filter=["mlp"])
        build = "logra_kernels.projection.spec:ProjectionSpec.build"
        with replaced(**{build: lambda *_: setting.projections}):
            run.add_lora()
        kept = {"log": "grad", "save": "grad"}
        run.setup({**kept, "statistic": {"grad": Covariance}} if self.curvature else kept)
        for indices, ids in setting.batches():
            with torch.enable_grad(), run(data_id=indices):
                summed_loss(self.model, ids).backward()
        run.finalize()
        return folder

    def rows(self, folder: Path) -> Tensor:
        """The logged rows [N, D] float32."""
        store = Store.open(folder)
        return torch.from_numpy(store.take(range(store.num_rows)))


def attributor(folder: Path, modules: list[Module], rows: Tensor, curvature: bool) -> Attributor:
    """An attributor whose preconditioner is factorised; it has not computed the norms."""
    with silenced():
        store = write_store(folder, modules, rows)
        return Attributor(store, RawCurvature.rebuild(store) if curvature else "none")


def scores(asked: Attributor, queries: Tensor, mode: str) -> Callable[[], Tensor | None]:
    """A provider of all scores [Q, N]."""
    return lambda: asked.scores(queries, mode).scores


def top(asked: Attributor, queries: Tensor, k: int, mode: str) -> Callable[[], Tensor | None]:
    """A provider of the best k scores [Q, k]."""
    return lambda: asked.top_k(queries, k, mode).top_scores
