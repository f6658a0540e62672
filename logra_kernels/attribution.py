"""From a store and queries to influence: precondition the queries, stream the rows, keep scores.

score = g_te^T (H + lambda I)^-1 g_tr (Eq. 3). The inverse is folded into the query once, so that a
row costs one dot product; a normaliser such as l-RelatIF's 1 / sqrt(sigma) is a scale per row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from logra_kernels.curvature import RawCurvature
from logra_kernels.influence_result import TOTAL, InfluenceResult, StoredIds
from logra_kernels.preconditioner import IdentityPreconditioner, Preconditioner
from logra_kernels.progress import Progress, track
from logra_kernels.rows import layout, share
from logra_kernels.scan import (
    NORM_OF_MODE,
    Block,
    Groups,
    Norms,
    Sink,
    check_mode,
    check_query_ids,
    check_rows,
    collect,
    find_groups,
    plan_queries,
    true_norm,
)
from logra_kernels.store import Module, Store

__all__ = ["Attributor", "Groups", "InfluenceResult", "find_groups", "influence_between"]

# A block this large outweighs a call, and still leaves the shard hot between sigma and the scores.
BLOCK_BYTES = 32 << 20
SMALLEST_BLOCK_ROWS, LARGEST_BLOCK_ROWS = 256, 1 << 16


class Attributor:
    """Influence of every row of a store on queries.

    Args:
        store: a Store, or the path of one.
        curvature: a RawCurvature, a Preconditioner, "raw" or None (the store's own), or "none"
            for plain dot products of gradients.
        damping_scale: lambda relative to the mean eigenvalue; 0.1 where neither is given.
        damping: lambda itself; only one of the two.
        solver: "cholesky" or "eigh" (pseudo-inverse), see RawCurvature.damped.
        device: where the scan runs; the CPU by default, which reads the mapped file in place.
        block_rows: rows per step of the scan; None for about 32 MiB.

    Raises:
        ValueError: an empty store, no curvature, a damping that is not a number >= 0.
    """

    def __init__(
        self,
        store: Store | str | PathLike[str],
        curvature: RawCurvature | Preconditioner | str | None = None,
        *,
        damping_scale: float | None = None,
        damping: float | None = None,
        solver: str = "cholesky",
        device: torch.device | str | None = None,
        block_rows: int | None = None,
    ) -> None:
        self.store = store if isinstance(store, Store) else Store.open(Path(store))
        if self.store.num_rows == 0:
            raise ValueError(f"{self.store.path}: the store holds no rows; log some first")
        if block_rows is not None and block_rows < 1:
            raise ValueError(f"block_rows: expected at least 1, got {block_rows}")
        self.modules: list[Module] = list(self.store.modules)
        self.device = torch.device(device or "cpu")
        row_bytes = self.store.dim * np.dtype(self.store.dtype).itemsize
        self.block_rows = block_rows or _block_rows(row_bytes)
        self.preconditioner = self._preconditioner(curvature, damping_scale, damping, solver)
        self.dampings = self.preconditioner.dampings
        self._exponents = self.store.module_exponents
        self._norms: dict[str, Norms] = {}

    def precondition(self, queries: Tensor) -> Tensor:
        """(H + lambda I)^-1 g for queries [Q, D]; [Q, D] of the same dtype."""
        check_rows("queries", queries, self.modules, None)
        return self.preconditioner.precondition(queries)

    def scores(
        self,
        queries: Tensor,
        mode: str = "l-relatif",
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """The scores of all rows, [Q, N].

        Args:
            queries: projected gradients of what is to be explained, [Q, D] float32 or float64.
            mode: "dot" (Eq. 3), "l-relatif" (/ sqrt(sigma) of the row; LogIX calls it "cosine"),
                "l2" (score - sigma / 2), "theta-relatif" (/ |(H + lambda I)^-1 g|),
                "whitened-cosine" (/ sqrt(sigma) of the row and of the query).
            groups: {name: substrings of module names}, or a list of substrings; each group is
                scored, and normalised, by its own modules.
            query_ids: names for the queries; their numbers by default.
            progress: True for a bar, or a callback (rows done, rows in all).

        Raises:
            ValueError: an unknown mode, a group without modules, a query that is not finite or
                has another D than the store.
        """
        return self._run(queries, None, mode, groups, query_ids, progress)

    def top_k(
        self,
        queries: Tensor,
        k: int = 10,
        mode: str = "l-relatif",
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """The k most and the k least influential rows; memory does not grow with the store.

        Ties go to the lower row. Arguments as in `scores`.

        Raises:
            ValueError: k < 1, k above the number of rows, or as in `scores`.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
        if k > self.store.num_rows:
            raise ValueError(
                f"k: expected at most {self.store.num_rows}, the rows in the store, got {k}"
            )
        return self._run(queries, k, mode, groups, query_ids, progress)

    @overload
    def self_influence(self, groups: None = None, progress: Progress = None) -> Tensor: ...
    @overload
    def self_influence(
        self, groups: Mapping[str, str | Sequence[str]] | Sequence[str], progress: Progress = None
    ) -> dict[str, Tensor]: ...

    def self_influence(
        self, groups: Groups = None, progress: Progress = None
    ) -> Tensor | dict[str, Tensor]:
        """sigma = g^T (H + lambda I)^-1 g of every row, [N] float64; with groups {name: [N]}.

        float64 holds the square of what float32 gradients can be; the accuracy is float32's.
        """
        chosen = {TOTAL: list(range(len(self.modules))), **find_groups(groups, self.modules)}
        out = {name: torch.empty(self.store.num_rows, dtype=torch.float64) for name in chosen}
        for block in self._blocks("sigma", progress, rows_needed=False):
            for name, members in chosen.items():
                sigma = true_norm(block, members) ** 2
                out[name][block.first_row : block.first_row + len(sigma)] = share(sigma)
        return out if groups else out[TOTAL]

    def _preconditioner(
        self,
        curvature: RawCurvature | Preconditioner | str | None,
        damping_scale: float | None,
        damping: float | None,
        solver: str,
    ) -> Preconditioner:
        fixed = isinstance(curvature, Preconditioner) or curvature == "none"
        if fixed and (damping_scale is not None or damping is not None):
            what = "no curvature" if curvature == "none" else "a preconditioner, which has its own"
            raise ValueError(f"damping: expected none with {what}, got one")
        if curvature == "none":
            return IdentityPreconditioner(self.modules)
        if curvature is None or curvature == "raw":
            curvature = RawCurvature.load(self.store)
        if not isinstance(curvature, (RawCurvature, Preconditioner)):
            raise ValueError(
                "curvature: expected 'raw', 'none', a RawCurvature or a Preconditioner, "
                f"got {curvature!r}"
            )
        theirs = layout(curvature.modules)
        if theirs != layout(self.modules):
            raise ValueError(
                f"curvature: expected the store's modules {[m.name for m in self.modules]}, "
                f"got {[name for name, _ in theirs]} (names or sizes differ)"
            )
        if isinstance(curvature, Preconditioner):
            return curvature
        if curvature.count != self.store.num_rows:
            warnings.warn(
                f"the curvature is of {curvature.count} rows, the store has {self.store.num_rows}; "
                "RawCurvature.rebuild(store).save(store) brings it up to date",
                stacklevel=3,
            )
        return curvature.damped(damping_scale, damping, solver)

    def _run(
        self,
        queries: Tensor,
        k: int | None,
        mode: str,
        groups: Groups,
        query_ids: Sequence[Any] | None,
        progress: Progress,
    ) -> InfluenceResult:
        mode = check_mode(mode)
        names = check_query_ids(query_ids, queries)
        plans = plan_queries(
            queries, names, mode, groups, self.modules, self._exponents, self.preconditioner
        )
        sinks = [Sink(plan.to(self.device), self.store.num_rows, k) for plan in plans]
        for block in self._blocks(NORM_OF_MODE[mode], progress):
            for sink in sinks:
                sink.add(block, mode)
        row_ids = StoredIds(self.store.ids)
        return collect(sinks, mode, names, row_ids, self.dampings)

    def _blocks(
        self, kind: str | None, progress: Progress, rows_needed: bool = True
    ) -> Iterator[Block]:
        """The store's rows, block by block, with the norms of that kind.

        Norms that no earlier pass left are computed here, while the block is in cache, and
        committed shard by shard: an interrupted pass keeps the shards it finished.
        """
        done = track(progress, self.store.num_rows, "scan")
        norms = self._norms_of(kind) if kind else None
        for index, shard in enumerate(self.store.shards):
            count = shard.num_rows
            known = norms.load(index) if norms else None
            fresh = None
            if norms and known is None:
                fresh = np.empty((count, len(self.modules)), np.float32)
            for start in range(0, count, self.block_rows):
                end = min(start + self.block_rows, count)
                rows = share(shard.rows[start:end])
                if rows_needed or fresh is not None:
                    rows = rows.to(self.device)
                scale = None
                if self.store.dtype != "float32":  # whose scales are ones
                    scale = shard.row_scale[start:end]
                first_row = shard.first_row + start
                block = Block(first_row, rows, scale, None, norms.units if norms else [])
                if norms and known is not None:
                    block.norms = known[start:end]
                elif norms and fresh is not None:
                    block.norms = norms.compute(rows, self.modules)
                    self._check_norms(block.norms, first_row)
                    fresh[start:end] = block.norms
                yield block
                done(end - start)
            if norms and fresh is not None:
                norms.keep(index, fresh)

    def _norms_of(self, kind: str) -> Norms:
        if kind not in self._norms:
            self._norms[kind] = Norms(
                self.preconditioner, kind, self._exponents, self.device, self.store
            )
        return self._norms[kind]

    def _check_norms(self, norms: np.ndarray, first_row: int) -> None:
        finite = np.isfinite(norms)
        if finite.all():
            return
        row, module = (int(v) for v in np.argwhere(~finite)[0])
        raise ValueError(
            f"row '{self.store.ids[first_row + row].as_py()}': its self-influence in module "
            f"'{self.modules[module].name}' is not finite"
        )


def influence_between(
    queries: Tensor,
    rows: Tensor,
    preconditioner: Preconditioner,
    mode: str = "l-relatif",
    groups: Groups = None,
    query_ids: Sequence[Any] | None = None,
    row_ids: Sequence[Any] | None = None,
) -> InfluenceResult:
    """Scores [Q, R] of rows in memory, without a store.

    Args:
        queries: [Q, D] float32 or float64.
        rows: [R, D] float32.
        preconditioner: what RawCurvature.damped gives, or an IdentityPreconditioner.
        mode, groups, query_ids: as in Attributor.scores.
        row_ids: names for the rows; their numbers by default.
    """
    modules = preconditioner.modules
    mode = check_mode(mode)
    check_rows("rows", rows, modules, None)
    rows = rows.detach().float()
    ids = [str(i) for i in (range(rows.shape[0]) if row_ids is None else row_ids)]
    if len(ids) != rows.shape[0]:
        raise ValueError(f"row_ids: expected {rows.shape[0]}, got {len(ids)}")
    names = check_query_ids(query_ids, queries)
    exponents = [0] * len(modules)
    plans = plan_queries(queries, names, mode, groups, modules, exponents, preconditioner)
    sinks = [Sink(plan.to(rows.device), rows.shape[0], None) for plan in plans]
    kind = NORM_OF_MODE[mode]
    norms = Norms(preconditioner, kind, exponents, rows.device) if kind else None
    block_rows = _block_rows(4 * rows.shape[1])
    for first_row in range(0, rows.shape[0], block_rows):
        part = rows[first_row : first_row + block_rows]
        block = Block(first_row, part, None, None, [])
        if norms:
            block.norms, block.units = norms.compute(part, modules), norms.units
        for sink in sinks:
            sink.add(block, mode)
    return collect(sinks, mode, names, ids, preconditioner.dampings)


def _block_rows(row_bytes: int) -> int:
    rows = BLOCK_BYTES // row_bytes
    return max(SMALLEST_BLOCK_ROWS, min(LARGEST_BLOCK_ROWS, rows))
