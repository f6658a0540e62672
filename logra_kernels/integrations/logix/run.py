"""LogIX's run: its methods, with its arguments and results, over this package's Run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from logra_kernels.attribution import Groups, InfluenceResult, find_groups, influence_between
from logra_kernels.curvature import DampingScale, RawCurvature
from logra_kernels.integrations.logix.logs import (
    Log,
    LogDataset,
    collate_logs,
    log_of_rows,
    read_logs,
    reads_whole_store,
    rows_of_log,
)
from logra_kernels.integrations.logix.names import check_lora_arguments, refused
from logra_kernels.progress import Progress
from logra_kernels.run import LoggedPass, Run


class LogixPass(LoggedPass):
    """A pass that gives its gradients as a log of LogIX's, too."""

    def get_log(self) -> Log:
        """(ids, {module: {"grad": [N, Ko, Ki]}}), once backward() ran."""
        return log_of_rows(self.ids, self.rows().detach(), self.layout)


class LogixRun(Run):
    """What init returns: a Run with LogIX's methods, which have LogIX's meaning.

    A log is (ids, {module: {"grad": G [N, Ko, Ki]}}). `damping` is λ, `damping_scale` is λ relative
    to the mean eigenvalue; with neither, the configuration's, or 0.1 · mean eigenvalue. `hessian`
    is "auto" or the name of the store's curvature. These hold for every method below.
    """

    pass_type = LogixPass

    if TYPE_CHECKING:

        def __call__(
            self,
            data_id: Any,
            mask: Tensor | Mapping[str, Tensor | None] | None = None,
            *,
            cu_seqlens: Any = None,
            position_ids: Any = None,
            save: bool | None = None,
            metadata: Sequence[Mapping[str, Any] | None] | None = None,
            weight_gradients: bool = False,
            averaged_loss: str | None = None,
            allow_unused: bool | None = None,
            loss_scale: float | Tensor | None = None,
        ) -> LogixPass:
            """As `Run.__call__`; the pass has LogIX's methods too."""
    else:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(refused(name) or f"a run has no attribute {name!r}")

    def add_lora(
        self,
        /,
        rank: int | tuple[int, int] | nn.Module | None = None,
        init: str | None = None,
        *,
        coordinates: int | None = None,
        seed: int | None = None,
        type_filter: Sequence[type[nn.Module]] | None = None,
        name_filter: Sequence[str] | None = None,
        model: nn.Module | None = None,
        **logix: Any,
    ) -> None:
        """Run.add_lora, which takes the model in the first place too, as LogIX does.

        Args: logix: LogIX's other arguments, with the values that say what is done here.

        Raises: TypeError for an argument that LogIX has not, ValueError for another value.
        """
        check_lora_arguments(logix)
        if isinstance(rank, nn.Module):
            rank, model = None, rank
        super().add_lora(
            rank,
            init,
            coordinates=coordinates,
            seed=seed,
            type_filter=type_filter,
            name_filter=name_filter,
            model=model,
        )

    def log(self, data_id: Any, mask: Tensor | None = None) -> None:
        """LogIX's logging after the fact, which is refused: nothing is hooked between passes."""
        raise RuntimeError(
            "log: the model is hooked only inside `with run(data_id, mask)`, or between "
            "start(data_id, mask) and end(); use one of them"
        )

    @property
    def influence(self) -> LogixRun:
        """LogIX's run.influence, whose methods are the run's own here."""
        return self

    def get_log(self, copy: bool = False) -> Log:
        """The last batch: (ids, {module: {"grad": [N, Ko, Ki]}}), as computed, before packing.

        Inside `with run(...)`, after backward(), it is that batch.

        Raises: RuntimeError if nothing was logged yet.
        """
        ids, rows = self.last_rows()
        return log_of_rows(ids, rows.clone() if copy else rows, self.layout)

    def build_log_dataset(self, flatten: bool = False) -> LogDataset:
        """The stored rows as a torch Dataset of (id, {module: {"grad": [Ko, Ki]}})."""
        return LogDataset(self.store.path, flatten)

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
        """{module: {"grad": H = (1/N) Σ g gᵀ, [K, K] float64}}.

        Raises: ValueError if the run's curvature is no covariance.
        """
        curvature = self.curvature
        if not isinstance(curvature, RawCurvature):
            raise ValueError(f"get_covariance_state: the run's curvature is {curvature.kind!r}")
        sums = curvature.covariances
        return {name: {"grad": total / max(curvature.count, 1)} for name, total in sums.items()}

    def precondition(
        self,
        src_log: Any = None,
        damping: float | None = None,
        hessian: str = "auto",
        *,
        damping_scale: DampingScale | None = None,
    ) -> Log:
        """(H + λI)⁻¹ g of each example of a log (None: the last batch), as a log.

        compute_influence preconditions by itself; this is for products of one's own.
        """
        self._check_hessian(hessian)
        ids, rows = self._source(src_log)
        preconditioner = self.preconditioner(damping=damping, damping_scale=damping_scale)
        return log_of_rows(ids, preconditioner.precondition(rows), self.layout)

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
        damping_scale: DampingScale | None = None,
        top_k: int | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """Influence of every stored example on the logged queries (Eq. 3).

        Args:
            src_log: the queries, from get_log; None: the last batch.
            loader: None or build_log_dataloader(): the store is scanned in place. The logs of any
                other loader are read into memory first.
            mode: "dot", "l-relatif" (LogIX calls it "cosine"), "l2", "theta-relatif" or
                "whitened-cosine"; None: the configuration's, or "dot" for the whole matrix and
                "l-relatif" for the top k.
            precondition: False leaves the curvature out, of the norms too (LogIX keeps it in
                those): plain products of gradients.
            influence_groups: substrings of module names; each group is scored besides the total.
            top_k: only the k most and least influential; the memory then does not grow with N.
            progress: True for a bar, or a callback (rows done, rows in all).

        Returns: an InfluenceResult, also a mapping with LogIX's keys src_ids, tgt_ids, influence.

        Raises: ValueError for an argument or a log that does not fit; RuntimeError if no store is
            open.
        """
        self._check_hessian(hessian)
        mode = mode or self.config.mode_for(top_k)
        store = self.store
        query_ids, queries = self._source(src_log)
        if loader is not None and not reads_whole_store(loader, store):
            if top_k is not None:
                raise ValueError("top_k: only over the store itself; leave loader out")
            row_ids, rows = read_logs(loader, self.layout)
            preconditioner = self.preconditioner(
                precondition, damping=damping, damping_scale=damping_scale
            )
            return influence_between(
                queries, rows, preconditioner, mode, groups=influence_groups,
                query_ids=query_ids, row_ids=row_ids,
            )  # fmt: skip
        attributor = self.attributor(precondition, damping=damping, damping_scale=damping_scale)
        options: Any = {"groups": influence_groups, "query_ids": query_ids, "progress": progress}
        if top_k is None:
            return attributor.scores(queries, mode, **options)
        return attributor.top_k(queries, top_k, mode, **options)

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
        damping_scale: DampingScale | None = None,
    ) -> InfluenceResult:
        """Influence of the examples of tgt_log on the queries src_log, both logs in memory.

        Arguments, result and errors as in compute_influence_all.
        """
        self._check_hessian(hessian)
        query_ids, queries = self._source(src_log)
        row_ids, rows = rows_of_log("tgt_log", tgt_log, self.layout)
        return influence_between(
            queries,
            rows.float(),
            self.preconditioner(precondition, damping=damping, damping_scale=damping_scale),
            mode or self.config.mode_for(None),
            groups=influence_groups,
            query_ids=query_ids,
            row_ids=row_ids,
        )

    def compute_self_influence(
        self,
        src_log: Any = None,
        precondition: bool = True,
        hessian: str = "auto",
        influence_groups: Groups = None,
        damping: float | None = None,
        *,
        damping_scale: DampingScale | None = None,
    ) -> dict[str, Any]:
        """gᵀ (H + λI)⁻¹ g of each example of a log (None: the last batch), float64.

        Returns: {"src_ids", "influence": [N]}, or {"total": [N], group: [N], …} with groups.
        For the stored examples: attributor().self_influence().
        """
        self._check_hessian(hessian)
        ids, rows = self._source(src_log)
        preconditioner = self.preconditioner(
            precondition, damping=damping, damping_scale=damping_scale
        )
        products = rows.double() * preconditioner.precondition(rows.double())  # [N, D]
        parts = torch.stack([part.sum(1) for part in self.layout.split(products)])  # [M, N]
        groups = find_groups(influence_groups, self.modules)
        values: Any = parts.sum(0)
        if groups:
            values = {"total": values, **{name: parts[i].sum(0) for name, i in groups.items()}}
        return {"src_ids": ids, "influence": values}

    def _source(self, src_log: Any) -> tuple[list[str], Tensor]:
        return rows_of_log("src_log", self.get_log() if src_log is None else src_log, self.layout)

    def _check_hessian(self, hessian: str) -> None:
        if hessian != "auto" and hessian != self.curvature.kind:
            raise ValueError(
                f"hessian: expected auto or the store's, {self.curvature.kind}, got {hessian!r}"
            )
