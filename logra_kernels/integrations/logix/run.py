"""What a run can be asked once its rows are stored: influence, in LogIX's words."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from logra_kernels.attribution import (
    Attributor,
    Groups,
    InfluenceResult,
    find_groups,
    influence_between,
)
from logra_kernels.curvature import IdentityPreconditioner, Preconditioner, RawCurvature
from logra_kernels.integrations.logix.logs import (
    Log,
    LogDataset,
    collate_logs,
    log_of_rows,
    reads_whole_store,
    rows_of_log,
)
from logra_kernels.progress import Progress
from logra_kernels.run.config import Config
from logra_kernels.run.recorder import Recorder
from logra_kernels.store import Module, Store

HESSIANS = ("auto", "raw")


class Queries:
    """The half of a Run that reads: its store, its curvature, its last log."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self._recorder: Recorder | None = None
        self._store: Store | None = None
        self._curvature: RawCurvature | None = None
        self._attributors: dict[tuple[Any, ...], Attributor] = {}
        self._log: tuple[list[str], Tensor] | None = None

    @property
    def modules(self) -> list[Module]:
        """The layout of a row."""
        return list(self._opened("modules").modules)

    @property
    def influence(self) -> Queries:
        """LogIX's run.influence, whose methods are the run's own here."""
        return self

    def get_log(self, copy: bool = False) -> Log:
        """The last batch: (ids, {module: {"grad": [N, Ko, Ki]}}), as computed, before packing.

        Inside `with run(...)`, after backward(), it is that batch.
        """
        if self._log is None:
            raise RuntimeError("get_log: nothing was logged yet; run a pass inside `with run(...)`")
        ids, rows = self._log
        return log_of_rows(ids, rows.clone() if copy else rows, self.modules)

    def build_log_dataset(self, flatten: bool = False) -> LogDataset:
        """The stored rows as a torch Dataset of (id, {module: {"grad": [Ko, Ki]}})."""
        return LogDataset(self._opened("build_log_dataset").path, flatten)

    def build_log_dataloader(
        self,
        batch_size: int = 16,
        num_workers: int = 0,
        pin_memory: bool = False,
        flatten: bool = False,
    ) -> DataLoader[Any]:
        """Batches (ids, {module: {"grad": [n, Ko, Ki]}}) of the stored rows, in their order."""
        return DataLoader(
            self.build_log_dataset(flatten),
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=collate_logs,
        )

    def get_covariance_state(self) -> dict[str, dict[str, Tensor]]:
        """{module: {"grad": H = (1/N) Σ g gᵀ, [K, K] float64}}."""
        curvature = self._raw_curvature()
        sums = curvature.covariances
        return {name: {"grad": total / max(curvature.count, 1)} for name, total in sums.items()}

    def attributor(
        self,
        precondition: bool = True,
        *,
        damping: float | None = None,
        damping_scale: float | None = None,
    ) -> Attributor:
        """What scans the store; the same one for the same damping."""
        store = self._opened("influence")
        damping, damping_scale = self._dampings(damping, damping_scale)
        key = (precondition, damping, damping_scale) if precondition else (False,)
        if key not in self._attributors:
            if precondition:
                made = Attributor(
                    store, self._raw_curvature(), damping=damping, damping_scale=damping_scale
                )
            else:
                made = Attributor(store, "none")
            self._attributors = {key: made}  # one: its factors are as large as the curvature
        return self._attributors[key]

    def precondition(
        self,
        src_log: Any = None,
        damping: float | None = None,
        hessian: str = "auto",
        *,
        damping_scale: float | None = None,
    ) -> Log:
        """(H + λI)⁻¹ g of each example of a log (None: the last batch), as a log.

        compute_influence preconditions by itself; this is for products of one's own.
        """
        _check_hessian(hessian)
        ids, rows = self._source(src_log)
        preconditioner = self._preconditioner(True, damping, damping_scale)
        return log_of_rows(ids, preconditioner.precondition(rows), self.modules)

    def compute_influence_all(
        self,
        src_log: Any = None,
        loader: Any = None,
        mode: str | None = None,
        precondition: bool = True,
        hessian: str = "auto",
        influence_groups: Groups = None,
        damping: float | None = None,
        *,
        damping_scale: float | None = None,
        top_k: int | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """Influence of every stored example on the logged queries (Eq. 3).

        Args:
            src_log: the queries, from get_log; None: the last batch.
            loader: None or build_log_dataloader(): the store is scanned in place. The logs of any
                other loader are read into memory first.
            mode: "dot", "l-relatif" (LogIX calls it "cosine"), "l2", "theta-relatif" or
                "whitened-cosine"; None: the configuration's ("dot").
            precondition: False leaves the curvature out, of the norms too (LogIX keeps it in
                those): plain products of gradients.
            hessian: "auto" or "raw".
            influence_groups: substrings of module names; each group is scored besides the total.
            damping: λ; damping_scale: λ relative to the mean eigenvalue. Neither: the
                configuration's, or 0.1 · mean eigenvalue.
            top_k: only the k most and least influential; the memory then does not grow with N.
            progress: True for a bar.

        Returns: an InfluenceResult, also a mapping with LogIX's keys src_ids, tgt_ids, influence.
        """
        _check_hessian(hessian)
        mode = self.config.mode if mode is None else mode
        store = self._opened("compute_influence_all")
        query_ids, queries = self._source(src_log)
        if loader is not None and not reads_whole_store(loader, store):
            if top_k is not None:
                raise ValueError("top_k: only over the store itself; leave loader out")
            preconditioner = self._preconditioner(precondition, damping, damping_scale)
            row_ids: list[str] = []
            blocks = []
            for log in loader:
                ids, rows = rows_of_log("loader", log, self.modules)
                row_ids += ids
                blocks.append(rows.float())
            if not blocks:
                raise ValueError("loader: expected logs, got none")
            return influence_between(
                queries, torch.cat(blocks), preconditioner, mode, influence_groups,
                query_ids, row_ids,
            )  # fmt: skip
        attributor = self.attributor(precondition, damping=damping, damping_scale=damping_scale)
        if top_k is None:
            return attributor.scores(queries, mode, influence_groups, query_ids, progress)
        return attributor.top_k(queries, top_k, mode, influence_groups, query_ids, progress)

    def compute_influence(
        self,
        src_log: Any,
        tgt_log: Any,
        mode: str | None = None,
        precondition: bool = True,
        hessian: str = "auto",
        influence_groups: Groups = None,
        damping: float | None = None,
        *,
        damping_scale: float | None = None,
    ) -> InfluenceResult:
        """Influence of the examples of tgt_log on the queries src_log, both logs in memory.

        Arguments as in compute_influence_all.
        """
        _check_hessian(hessian)
        query_ids, queries = self._source(src_log)
        row_ids, rows = rows_of_log("tgt_log", tgt_log, self.modules)
        return influence_between(
            queries,
            rows.float(),
            self._preconditioner(precondition, damping, damping_scale),
            self.config.mode if mode is None else mode,
            influence_groups,
            query_ids,
            row_ids,
        )

    def compute_self_influence(
        self,
        src_log: Any = None,
        precondition: bool = True,
        hessian: str = "auto",
        influence_groups: Groups = None,
        damping: float | None = None,
        *,
        damping_scale: float | None = None,
    ) -> dict[str, Any]:
        """gᵀ (H + λI)⁻¹ g of each example of a log (None: the last batch), float64.

        Returns: {"src_ids", "influence": [N]}, or {"total": [N], group: [N], …} with groups.
        For the stored examples: attributor().self_influence().
        """
        _check_hessian(hessian)
        ids, rows = self._source(src_log)
        modules = self.modules
        preconditioner = self._preconditioner(precondition, damping, damping_scale)
        products = rows.double() * preconditioner.precondition(rows.double())  # [N, D]
        sizes = [module.size for module in modules]
        parts = torch.stack([part.sum(1) for part in products.split(sizes, dim=1)])  # [M, N]
        groups = find_groups(influence_groups, modules)
        values: Any = parts.sum(0)
        if groups:
            values = {"total": values, **{name: parts[i].sum(0) for name, i in groups.items()}}
        return {"src_ids": ids, "influence": values}

    def _use_store(self, store: Store, curvature: RawCurvature | None = None) -> None:
        self._store, self._curvature = store, curvature
        self._attributors = {}

    def _opened(self, caller: str) -> Store:
        if self._recorder is not None:
            raise RuntimeError(f"{caller}: rows are still being logged; call finalize() first")
        if self._store is None:
            raise RuntimeError(f"{caller}: no store is open; call initialize_from_log() first")
        return self._store

    def _raw_curvature(self) -> RawCurvature:
        if self._recorder is not None and self._recorder.curvature is not None:
            return self._recorder.curvature
        if self._curvature is None:
            store = self._opened("curvature")
            saved = store.curvatures.get(RawCurvature.kind)
            if saved is not None and (saved["rows"] == store.num_rows or store.num_rows == 0):
                self._curvature = RawCurvature.load(store)
            else:
                warnings.warn(
                    f"{store.path}: holds no curvature of its {store.num_rows} rows; it is "
                    "computed from them now and kept there",
                    stacklevel=4,
                )
                self._curvature = RawCurvature.rebuild(store)
                self._curvature.save(store)
        return self._curvature

    def _preconditioner(
        self, precondition: bool, damping: float | None, damping_scale: float | None
    ) -> Preconditioner:
        damping, damping_scale = self._dampings(damping, damping_scale)
        if not precondition:
            return IdentityPreconditioner(self.modules)
        return self._raw_curvature().damped(damping=damping, damping_scale=damping_scale)

    def _dampings(
        self, damping: float | None, damping_scale: float | None
    ) -> tuple[float | None, float | None]:
        if damping is None and damping_scale is None:
            return self.config.damping, self.config.damping_scale
        return damping, damping_scale

    def _source(self, src_log: Any) -> tuple[list[str], Tensor]:
        return rows_of_log("src_log", self.get_log() if src_log is None else src_log, self.modules)


def _check_hessian(hessian: str) -> None:
    if hessian not in HESSIANS:
        raise ValueError(f"hessian: expected one of {', '.join(HESSIANS)}, got {hessian!r}")
