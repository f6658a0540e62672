"""LogIX 0.1.1: hooks on inserted LoRA layers, one memory-mapped file, one pass over it for a query.

- Its encoder and decoder weights are set to our projections, so that its rows equal ours.
- `REPAIRED` replaces two functions that are slow by the way they are written, not by LogIX's
  method: the per-sample gradient forms [N,T,Ko,Ki] before it sums over T, and the scores form
  [Q,N,Ko,Ki] before they sum over Ko and Ki.
- initialize_from_log cannot read its own state with torch 2.6 and newer (a pickled class, refused
  by weights_only), so the run that logged answers the queries.
- Its scores need the state's inverse, computed once; what is timed comes after that.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from logix import LogIX
from logix.logging.log_loader import LogDataset
from logix.lora.modules import LoraLinear
from logix.statistic import Covariance, Log
from torch import Tensor, nn

from bench.harness.models import summed_loss
from bench.peers import replaced, silenced
from bench.peers.setting import LoggingSetting
from logra_kernels.store import Module


def _gradient(fwd: Tensor, bwd: Tensor, module: nn.Module) -> Tensor:
    return torch.einsum("nto,nti->noi", bwd, fwd)


def _dot_products(src: Tensor, tgt: Tensor) -> Tensor:
    return src.flatten(1) @ tgt.flatten(1).T


REPAIRED = {
    "logix.logging.logger.compute_per_sample_gradient": _gradient,
    "logix.analysis.influence_function.cross_dot_product": _dot_products,
}


def start(folder: Path, rank: int) -> LogIX:
    """A LogIX run in the folder, with a projection of the rank."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "configured.yaml"
    config.write_text(yaml.safe_dump({"root_dir": str(folder.parent), "lora": {"rank": rank}}))
    return LogIX(folder.name, config=str(config))


class Logger:
    """From init to finalize; the LoRA layers are inserted beforehand."""

    row_files = "*.mmap"

    def __init__(
        self, setting: LoggingSetting, curvature: bool, patches: dict[str, Any] | None = None
    ) -> None:
        self.setting, self.patches = setting, patches or {}
        self.kept = [Log, Covariance] if curvature else [Log]
        self.model = setting.model()
        for name in setting.names:
            proj_out, proj_in = setting.matrices(name)
            lora = LoraLinear(setting.rank, self.model.get_submodule(name))
            lora.logix_lora_A.weight.data.copy_(proj_in)
            lora.logix_lora_C.weight.data.copy_(proj_out.T)
            parent, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(parent), last, lora)

    def __call__(self, folder: Path) -> None:
        """Log every example into the folder."""
        with silenced(), replaced(self.patches):
            run = start(folder, self.setting.rank)
            run.watch(self.model, name_filter=["mlp"])
            run.setup({"grad": list(self.kept)})
            run.save(True)
            for indices, ids in self.setting.batches():
                self.model.zero_grad()
                with torch.enable_grad(), run(data_id=[str(index) for index in indices]):
                    summed_loss(self.model, ids).backward()
            run.finalize()
            run.logger.clear()  # otherwise its hooks stay

    def rows(self, folder: Path) -> Tensor:
        """The logged rows [N, D]."""
        dataset = LogDataset(str(folder), flatten=True)
        return torch.stack([dataset[index][1] for index in range(len(dataset))])


class Influence:
    """compute_influence_all(mode="cosine"), which is l-RelatIF, over rows in LogIX's own store."""

    def __init__(
        self,
        folder: Path,
        modules: list[Module],
        rows: Tensor,
        covariances: dict[str, Tensor],
    ) -> None:
        self.modules = modules
        with silenced():
            run = self.run = start(folder, modules[0].ki)
            path = [(module.name, "grad") for module in modules]
            run.state.set_state("model_module", path=path, path_dim=[m.size for m in modules])
            for first in range(0, len(rows), 256):
                block = rows[first : first + 256]
                run.binfo.clear()
                run.binfo.data_id = [str(first + index) for index in range(len(block))]
                for name, value in self.nested(block).items():
                    run.binfo.log[name]["grad"] = value["grad"]
                run.logger.save_log()
            for name, covariance in covariances.items():
                run.state.covariance_state[name]["grad"] = covariance.float()
            run.logger.finalize()

    def nested(self, rows: Tensor) -> dict[str, dict[str, Tensor]]:
        """Rows [R, D] as LogIX nests them: {module: {"grad": [R, Ko, Ki]}}."""
        parts = rows.split([module.size for module in self.modules], dim=1)
        return {
            module.name: {"grad": part.reshape(-1, module.ko, module.ki)}
            for module, part in zip(self.modules, parts, strict=True)
        }

    def scores(
        self, queries: Tensor, patches: dict[str, Any] | None = None, batch_rows: int = 16
    ) -> Tensor:
        """[Q, N]; LogIX's loader takes 16 rows at a time by default."""
        asked = ([str(index) for index in range(len(queries))], self.nested(queries))
        with silenced(), replaced(patches or {}):
            self.run.log_dataloader = None  # the run would use its first loader again
            loader = self.run.build_log_dataloader(batch_size=batch_rows)
            result = self.run.compute_influence_all(asked, loader, mode="cosine")
        scores: Tensor = result["influence"]
        return scores
