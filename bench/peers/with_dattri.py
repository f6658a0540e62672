"""dattri 0.3.0: LoGraAttributor, which keeps the rows and a preconditioned copy of them.

- Its projectors are made beforehand and set to our projections (times sqrt(K), by which dattri
  divides), so that its rows equal ours.
- It multiplies by the batch size, to undo a mean over examples: the loss handed to it is the
  summed loss over the number of examples. For queries it takes the model's own `.loss`.
- Rows are kept in memory (offload="cpu", the default): its disk store needs pinned memory, which
  needs a GPU.
- The model is frozen but for its embedding, which dattri does not do by itself.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from dattri.algorithm.logra import LoGraAttributor
from dattri.func.projection import BasicProjector
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.harness.models import summed_loss
from bench.peers import silenced
from bench.peers.setting import LoggingSetting
from logra_kernels.store import Module


class AveragedLoss(nn.Module):
    """A causal LM whose `.loss` is the summed loss over the number of examples."""

    def __init__(self, setting: LoggingSetting) -> None:
        super().__init__()
        self.lm, self.setting = setting.probe(), setting

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """The mean loss of an example, in the form that dattri expects."""
        return SimpleNamespace(loss=summed_loss(self.lm, input_ids) / len(input_ids))


class Logger:
    """`LoGraAttributor.cache`: rows, and with curvature a preconditioned copy of them."""

    row_files = "none: rows are kept in memory"

    def __init__(self, setting: LoggingSetting, curvature: bool) -> None:
        self.setting, self.curvature = setting, curvature
        self.task = AttributionTask(
            loss_func=lambda model, batch, device: model(**batch).loss,
            model=(model := AveragedLoss(setting)),
            checkpoints=model.state_dict(),
        )
        examples: Any = [{"input_ids": ids} for ids in setting.ids]
        self.loader: DataLoader[Any] = DataLoader(examples, batch_size=setting.batch_size)
        self.attributors: dict[Path, LoGraAttributor] = {}
        with silenced(), tempfile.TemporaryDirectory() as folder:
            attributor = self._attributor(Path(folder))
            attributor._setup_compressors(self.loader)
        self.compressors = attributor.compressors
        for name, compressor in zip(setting.names, self.compressors, strict=True):
            sides = compressor.sparsifier.sparsifier_comp
            for project, matrix in zip(sides, setting.matrices(name), strict=True):
                _projector_of(project).proj_matrix = matrix.T.contiguous() * setting.rank**0.5

    def _attributor(self, folder: Path) -> LoGraAttributor:
        return LoGraAttributor(
            self.task,
            layer_names=[f"lm.{name}" for name in self.setting.names],
            hessian="eFIM" if self.curvature else "Identity",
            damping=0.1 if self.curvature else None,
            proj_dim=self.setting.rank**2,
            offload="cpu",
            cache_dir=str(folder),
        )

    def __call__(self, folder: Path) -> None:
        """Log every example into the folder."""
        with silenced(), torch.enable_grad():
            attributor = self._attributor(folder)
            attributor.compressors = self.compressors
            attributor.cache(self.loader)
        self.attributors = {folder: attributor}  # the last one only

    def rows(self, folder: Path) -> Tensor:
        """The logged rows [N, D]."""
        manager = self.attributors[folder].offload_manager
        parts = [manager.retrieve_gradients(index) for index in range(len(self.loader))]
        return torch.cat([torch.cat(part, dim=1) for part in parts])


def _projector_of(project: Any) -> BasicProjector:
    """The projector in the closure of what random_project returned."""
    found = [cell.cell_contents for cell in project.__closure__]
    return next(value for value in found if isinstance(value, BasicProjector))


class Influence:
    """`attribute` on given rows and queries, with our damping; no model is run."""

    def __init__(self, folder: Path, modules: list[Module], rows: Tensor, batch: int = 64) -> None:
        self.sizes = [module.size for module in modules]
        model = nn.Linear(1, 1)
        task = AttributionTask(
            lambda model, batch, device: None, model, checkpoints=model.state_dict()
        )
        numbers: Any = list(range(len(rows)))
        self.loader: DataLoader[Any] = DataLoader(numbers, batch_size=batch)
        with silenced():
            attributor = self.attributor = LoGraAttributor(
                task,
                layer_names=[module.name for module in modules],
                damping=0.1,
                proj_dim=modules[0].size,
                offload="cpu",
                cache_dir=str(folder),
            )
            attributor.full_train_dataloader = self.loader
            attributor.compressors = []
            attributor.metadata.initialize_complete_dataset(self.loader)
            attributor.metadata.set_layer_dims(self.sizes)
            attributor.layer_dims, attributor.total_proj_dim = self.sizes, sum(self.sizes)
            for index, first in enumerate(range(0, len(rows), batch)):
                parts = rows[first : first + batch].split(self.sizes, dim=1)
                attributor.offload_manager.store_gradients(index, list(parts), is_test=False)
            attributor.compute_preconditioners()
            attributor.compute_ifvp()

    def scores(self, queries: Tensor) -> Tensor:
        """[Q, N]."""
        self.attributor._compute_test_gradients = lambda loader: (queries, {})
        with silenced():
            scores: Tensor = self.attributor.attribute(self.loader, self.loader).T
        return scores
