"""From a store and queries to influence: plan -> blocks -> norms -> sinks -> result.

score = g_teᵀ (H + λI)⁻¹ g_tr (Eq. 3). The inverse is applied to the query once, so that a row costs
one dot product; a normaliser such as l-RelatIF's 1 / sqrt(sigma) is one factor per row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from logra_kernels._checks import expect_shape
from logra_kernels.attribution.influence_result import TOTAL, InfluenceResult, StoredIds
from logra_kernels.attribution.norms import NORM_OF_MODE, Norms, ShardNorms
from logra_kernels.attribution.pipeline import lanes_of
from logra_kernels.attribution.plan import (
    Groups,
    PreparedQueries,
    check_mode,
    check_rows,
    check_top_k,
    chosen_modules,
    plan_scan,
)
from logra_kernels.attribution.reading import Reading, ShardRows
from logra_kernels.attribution.sinks import (
    FullMatrix,
    GroupScores,
    SelfInfluence,
    Sink,
    TopK,
    Upload,
)
from logra_kernels.attribution.streamed import result_of, use
from logra_kernels.curvature import (
    Curvature,
    DampingScale,
    Preconditioner,
    curvature_of,
    preconditioner_of,
)
from logra_kernels.defaults import MATRIX_MODE, RANKING_MODE
from logra_kernels.progress import Progress, track
from logra_kernels.rows import stored_rows
from logra_kernels.store import Module, Store


class Attributor:
    """Influence of every row of a store on queries.

    Threads may share an Attributor: it scans for one call at a time, each on all of the caller's
    threads, and the others wait. Every call looks first whether the store is still the one that was
    opened.

    Args:
        store: a Store, or the path of one.
        curvature: a Curvature; a Preconditioner; the name of a registered kind that the store
            holds; None for the one that the store holds; or "none" for plain dot products.
        damping_scale: λ relative to the mean eigenvalue; `defaults.DAMPING_SCALE` where neither
            is given; or "auto", see Curvature.damped.
        damping: λ itself; only one of the two.
        solver: "cholesky" or "eigh" (pseudo-inverse), see RawCurvature.damped.
        device: where the scan runs; the CPU by default, which reads the mapped file in place.
        block_rows: rows per step of the scan; None for about 32 MiB, or, if streamed on the CPU,
            8 MiB (up to 32 MiB for many queries), but at least 16 rows.
        reading: how the rows come from the disk.
            "mapped": through the page cache, where they stay for the next query; on the CPU they
            are used in place.
            "streamed": around the page cache, through a ring of four blocks, so that memory does
            not grow with the store; what the page cache has already is used from there.
            "auto": mapped if the rows take at most `memory_bytes`, else streamed.
            "resident": the first scan copies the rows to the device's memory (on the CPU: to this
            process's), where they stay as long as the Attributor does.
        memory_bytes: what the rows may take, in "auto" and "resident"; by default 0.7 of what the
            machine (and the control group) has left, or the GPU.

    Raises:
        ValueError: an empty store, no curvature, a damping that is not a number >= 0, an unknown
            reading, a resident store that does not fit.
    """

    def __init__(
        self,
        store: Store | str | PathLike[str],
        curvature: Curvature | Preconditioner | str | None = None,
        *,
        damping_scale: DampingScale | None = None,
        damping: float | None = None,
        solver: str = "cholesky",
        device: torch.device | str | None = None,
        block_rows: int | None = None,
        reading: str = "auto",
        memory_bytes: int | None = None,
    ) -> None:
        self.store = store if isinstance(store, Store) else Store.open(Path(store))
        if self.store.num_rows == 0:
            raise ValueError(f"{self.store.path}: the store holds no rows; log some first")
        self.modules: list[Module] = list(self.store.layout)
        self.device = torch.device(device or "cpu")
        self._reading = Reading(
            self.store, self.device, reading, memory_bytes=memory_bytes, block_rows=block_rows
        )
        self._curvature, self._solver = curvature, solver
        self.preconditioner = preconditioner_of(
            self.store, curvature, damping_scale=damping_scale, damping=damping, solver=solver
        )
        self.dampings = self.preconditioner.dampings  # λ of each module
        self._exponents = self.store.module_exponents
        self.reading, self.block_rows = self._reading.way, self._reading.block_rows
        self._norms: dict[str, Norms] = {}
        # One scan at a time: two would share the norms, the resident rows and the memory's
        # bandwidth. Held again by the same thread, whose progress callback may ask something.
        self._scanning = threading.RLock()

    def precondition(self, queries: Tensor) -> Tensor:
        """(H + λI)⁻¹ g for queries [Q, D] float32 or float64; [Q, D] of the same dtype."""
        check_rows("queries", queries, self.store.layout, None)
        return self.preconditioner.precondition(queries)

    def prepare(self, queries: Tensor, query_ids: Sequence[Any] | None = None) -> PreparedQueries:
        """Queries checked and preconditioned, for several modes or calls of `scores` and `top_k`.

        Args and errors as in `scores`.
        """
        return PreparedQueries.of(queries, query_ids, self.preconditioner)

    def scores(
        self,
        queries: Tensor | PreparedQueries,
        mode: str = MATRIX_MODE,
        *,
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        row_weights: Tensor | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """The scores of all rows, [Q, N] float32.

        Args:
            queries: projected gradients of what is to be explained, [Q, D] float32 or float64, or
                what `prepare` made of them.
            mode: "dot" (Eq. 3), "l-relatif" (/ sqrt(sigma) of the row; LogIX calls it "cosine"),
                "l2" (score - sigma / 2), "theta-relatif" (/ |(H + λI)⁻¹g| of the row),
                "whitened-cosine" (/ sqrt(sigma) of the row and of the query). The default is
                "dot": a matrix's scores are added up, and only influences sum over examples.
            groups: {name: substrings of module names}, or a list of substrings; each group is
                scored, and normalised, by its own modules.
            query_ids: names for the queries; their numbers by default.
            row_weights: [N], 0 to 1, by which each row's scores are multiplied; a row of weight 0
                scores 0. A filter of rows, such as `concentration() > threshold`.
            progress: True for a bar, or a callback (rows done, rows in all).

        Raises:
            TypeError: queries that are no float32 or float64 tensor.
            ValueError: an unknown mode, a group without modules, a query that is not finite or
                has another D than the store, queries prepared for another curvature or damping,
                row_weights of another shape or outside 0 to 1.
            StoreError: the store was replaced or deleted since it was opened, or cannot be read.
        """
        return self._influence(queries, None, mode, groups, query_ids, row_weights, progress)

    def top_k(
        self,
        queries: Tensor | PreparedQueries,
        k: int = 10,
        mode: str = RANKING_MODE,
        *,
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        row_weights: Tensor | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """The k most and the k least influential rows; memory does not grow with the store.

        Equal scores are ordered by the lower row. Arguments as in `scores`, but the default mode
        is "l-relatif": under "dot" the rows of the largest gradients lead every ranking.

        Raises:
            ValueError: k < 1, k above the number of rows, or as in `scores`.
        """
        self._check_k(k)
        return self._influence(queries, k, mode, groups, query_ids, row_weights, progress)

    def sweep(
        self,
        queries: Tensor,
        *,
        damping_scales: Sequence[DampingScale] | None = None,
        dampings: Sequence[float] | None = None,
        preconditioners: Sequence[Preconditioner] | None = None,
        k: int | None = None,
        mode: str | None = None,
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        row_weights: Tensor | None = None,
        progress: Progress = None,
    ) -> list[InfluenceResult]:
        """`scores`, or with `k` `top_k`, under several dampings; the rows are read once.

        Each result is that of an Attributor with the damping. A mode without norms scans once for
        all dampings' queries; in the others each block is scored under one damping after another.

        Args:
            queries: [Q, D] float32 or float64.
            damping_scales, dampings, preconditioners: λ relative to the mean eigenvalue ("auto"
                too), λ itself, or what `Curvature.damped` made of one; one of the three, in the
                results' order.
            k: as in `top_k`; None for the scores of all rows.
            mode: "dot" by default, with `k` "l-relatif".
            groups, query_ids, row_weights, progress: as in `scores`.

        Raises:
            ValueError: several or none of the three lists, no damping in it, dampings for an
                Attributor without a curvature, preconditioners of other modules than the store's,
                or as in `scores` and `top_k`.
            TypeError, StoreError: as in `scores`.
        """
        mode = check_mode(mode or (MATRIX_MODE if k is None else RANKING_MODE))
        if k is not None:
            self._check_k(k)
        given = [damping_scales, dampings, preconditioners]
        if not any(given) or sum(values is not None for values in given) > 1:
            raise ValueError(
                "sweep: expected damping_scales, dampings or preconditioners, one of the three"
            )
        each = preconditioners or self._damped(damping_scales, dampings)
        weights = _checked_weights(row_weights, self.store.num_rows)
        norm = NORM_OF_MODE[mode]
        with self._scanning:
            self.store.check_unchanged()
            asked: list[_Asked] = []
            for one in each:
                preconditioner_of(self.store, one)  # of the store's modules
                prepared = PreparedQueries.of(queries, query_ids, one)
                norms = None if norm is None else self._new_norms(one, norm)
                asked.append(_Asked(prepared, norms, one.dampings))
            if norm is not None:
                return self._scan(asked, k, mode, groups, progress, weights)
            joined = PreparedQueries.joined([one.queries for one in asked])
            of_all = replace(asked[0], queries=joined)
            (result,) = self._scan([of_all], k, mode, groups, progress, weights)
        count = len(asked[0].queries.names)
        return [
            result.of_queries(slice(n * count, (n + 1) * count), one.dampings)
            for n, one in enumerate(asked)
        ]

    def _damped(
        self, damping_scales: Sequence[DampingScale] | None, dampings: Sequence[float] | None
    ) -> Iterator[Preconditioner]:
        curvature = curvature_of(self.store, self._curvature)
        if not isinstance(curvature, Curvature):
            raise ValueError(
                "sweep: expected an Attributor of a curvature, got one of no curvature or of a "
                "preconditioner, which has its own damping"
            )
        for scale in damping_scales or ():
            yield curvature.damped(damping_scale=scale, solver=self._solver)
        for damping in dampings or ():
            yield curvature.damped(damping=damping, solver=self._solver)

    def _check_k(self, k: int) -> None:
        check_top_k("k", k)
        if k > self.store.num_rows:
            raise ValueError(
                f"k: expected at most {self.store.num_rows}, the rows in the store, got {k}"
            )

    @overload
    def self_influence(self, groups: None = None, progress: Progress = None) -> Tensor: ...
    @overload
    def self_influence(
        self, groups: Mapping[str, str | Sequence[str]] | Sequence[str], progress: Progress = None
    ) -> dict[str, Tensor]: ...

    def self_influence(
        self, groups: Groups = None, progress: Progress = None
    ) -> Tensor | dict[str, Tensor]:
        """sigma = gᵀ(H + λI)⁻¹g of every row, [N] float64; with groups {name: [N]}.

        float64 holds the square of what float32 gradients can be; the accuracy is float32's.

        Raises:
            ValueError: a group without modules, a norm that is not finite.
            StoreError: as in `scores`.
        """
        with self._scanning:
            return self._self_influence(groups, progress)

    def module_norms(self) -> np.ndarray:
        """√sigma of every row in each module, [N, M] float64.

        Raises:
            ValueError, StoreError: as in `self_influence`.
        """
        with self._scanning:
            self._self_influence(None, None)
            norms = self.norms_of("sigma")
            rows = [self._reading.shard(index) for index in range(len(self.store.shards))]
            return np.concatenate([norms.of_shard(shard).of_modules(slice(None)) for shard in rows])

    def concentration(self) -> Tensor:
        """‖g‖₂ / ‖g‖₁ of every row as stored, [N] float64; 0 for a row of zeros.

        From 1/√D, where all coordinates are of one size, to 1, where a single one holds all. The
        paper suggests to filter by it against outliers, texts that make no sense. It depends on
        the basis of the rows, so a threshold is one store's.

        Raises:
            StoreError: as in `scores`.
        """
        self.store.check_unchanged()
        found = []
        for _, block, row_scale, own in self.store.blocks(self.block_rows):
            rows = stored_rows(self.store, block, row_scale, own).double()  # [R, D]
            sums = rows.abs().sum(dim=1)
            found.append(torch.where(sums > 0, rows.norm(dim=1) / sums, 0.0))
        return torch.cat(found)

    def complete(self, norms: Norms, progress: Progress = None) -> Norms:
        """Norms of this store's rows, after those that are not known were computed and kept."""
        with self._scanning:
            self.store.check_unchanged()
            norms.look_again()
            missing = [i for i in range(len(self.store.shards)) if not norms.known(i)]
            rows = sum(self.store.shards[index].num_rows for index in missing)
            if missing:
                done = track(progress, rows, "norms")
                self._visit([(norms, [])], missing, self.block_rows, done)
            return norms

    def visit(
        self, sink: Sink, norms: Norms | None, num_queries: int, progress: Progress = None
    ) -> None:
        """Give a sink all rows in order, a block at a time, with their norms.

        Args:
            sink: gets the blocks.
            norms: of this store's rows; computed where they are not known.
            num_queries: that the sink has, by which blocks are chosen.
            progress: as in `scores`.
        """
        with self._scanning:
            self.store.check_unchanged()
            block_rows = self._reading.block_rows_for(num_queries)
            done = track(progress, self.store.num_rows, "scan")
            self._visit([(norms, [sink])], range(len(self.store.shards)), block_rows, done)

    def shard_rows(self, index: int) -> ShardRows:
        """A shard's place in the store, its scales and exponents, as scans read them."""
        return self._reading.shard(index)

    def _visit(
        self,
        tasks: Sequence[tuple[Norms | None, Sequence[Sink]]],
        shards: Sequence[int],
        block_rows: int,
        done: Callable[[int], None],
    ) -> None:
        with closing(lanes_of(self.device)) as lanes:
            scan = _Scan(self._reading, tasks, done, lanes.upload)
            self._reading.feed(scan.take, lanes, shards, block_rows)

    def _self_influence(self, groups: Groups, progress: Progress) -> Tensor | dict[str, Tensor]:
        self.store.check_unchanged()
        sink = SelfInfluence(chosen_modules(groups, self.modules), self.store.num_rows)
        norms = self.norms_of("sigma")
        done = track(progress, self.store.num_rows, "scan")
        missing = []
        for index in range(len(self.store.shards)):
            if norms.known(index):
                rows = self._reading.shard(index)
                sink.put(rows.first_row, norms.of_shard(rows), slice(0, rows.num_rows))
                done(rows.num_rows)
            else:
                missing.append(index)
        self._visit([(norms, [sink])], missing, self.block_rows, done)
        return sink.values if groups else sink.values[TOTAL]

    def _influence(
        self,
        queries: Tensor | PreparedQueries,
        k: int | None,
        mode: str,
        groups: Groups,
        query_ids: Sequence[Any] | None,
        row_weights: Tensor | None,
        progress: Progress,
    ) -> InfluenceResult:
        mode = check_mode(mode)
        weights = _checked_weights(row_weights, self.store.num_rows)
        prepared = PreparedQueries.of(queries, query_ids, self.preconditioner)
        with self._scanning:
            self.store.check_unchanged()
            norm = NORM_OF_MODE[mode]
            norms = None if norm is None else self.norms_of(norm)
            asked = _Asked(prepared, norms, self.dampings)
            return self._scan([asked], k, mode, groups, progress, weights)[0]

    def _scan(
        self,
        asked: Sequence[_Asked],
        k: int | None,
        mode: str,
        groups: Groups,
        progress: Progress,
        weights: np.ndarray | None = None,
    ) -> list[InfluenceResult]:
        """One result for each of what is asked, from one pass over the rows of a checked store."""
        num_rows = self.store.num_rows
        block_rows = self._reading.block_rows_for(len(asked[0].queries.names))
        with closing(lanes_of(self.device)) as lanes:
            tasks: list[tuple[Norms | None, list[GroupScores]]] = []
            for one in asked:
                plans = plan_scan(one.queries, mode, groups, self.store.basis, self.device)
                sinks: list[GroupScores] = [
                    FullMatrix(plan, lanes.upload, num_rows, weights)
                    if k is None
                    else TopK(plan, lanes.upload, k, weights)
                    for plan in plans
                ]
                tasks.append((one.norms, sinks))
            done = track(progress, num_rows, "scan")
            scan = _Scan(self._reading, tasks, done, lanes.upload)
            self._reading.feed(scan.take, lanes, range(len(self.store.shards)), block_rows)
            results = [
                result_of(sinks, one.queries.names, StoredIds(self.store), one.dampings)
                for one, (_, sinks) in zip(asked, tasks, strict=True)
            ]
            for one, result in zip(asked, results, strict=True):
                result.normalised_by = None if one.norms is None else one.norms.said
            return results

    def norms_of(self, norm: str) -> Norms:
        """What this store's scans divide by, "sigma" or "theta", as far as it is known."""
        if norm not in self._norms:
            self._norms[norm] = self._new_norms(self.preconditioner, norm)
        else:
            self._norms[norm].look_again()
        return self._norms[norm]

    def _new_norms(self, preconditioner: Preconditioner, norm: str) -> Norms:
        remember = self.reading != "streamed"
        norms = Norms(preconditioner, norm, self._exponents, self.device, self.store, remember)
        norms.settle()
        return norms


@dataclass(frozen=True)
class _Asked:
    """Queries under one damping, and the rows' norms under it (None: the mode has none)."""

    queries: PreparedQueries
    norms: Norms | None
    dampings: dict[str, float]


def _checked_weights(row_weights: Tensor | None, num_rows: int) -> np.ndarray | None:
    """The weights as the sinks take them, [N] float32."""
    if row_weights is None:
        return None
    expect_shape("row_weights", row_weights, N=num_rows)
    weights = row_weights.detach().cpu().float()
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError("row_weights: expected numbers from 0 to 1")
    return weights.numpy()


class _Scan:
    """One pass over a store's rows: each block gets its norms, and every sink takes it.

    `tasks` are norms (or None) and the sinks that are scored with them.
    """

    def __init__(
        self,
        reading: Reading,
        tasks: Sequence[tuple[Norms | None, Sequence[Sink]]],
        done: Callable[[int], None],
        upload: Upload,
    ) -> None:
        self._upload = upload
        self._reading = reading
        self._tasks = tasks
        self._done = done
        self._shard: ShardRows  # of the blocks that are coming
        self._found: list[ShardNorms | None]  # of the shard, for each task

    def take(self, index: int, start: int, parts: Sequence[Tensor]) -> None:
        """Use stored rows, [R, W] for each file, from `start` on of the shard `index`.

        A shard's blocks come in order.
        """
        if start == 0:
            self._shard = self._reading.open_shard(index)
            self._found = [
                None if norms is None else norms.of_shard(self._shard) for norms, _ in self._tasks
            ]
        block = self._shard.block(start, parts, self._upload)
        for (norms, sinks), found in zip(self._tasks, self._found, strict=True):
            use(block, norms, found, sinks)
        self._done(parts[0].shape[0])
        if block.last:
            for (norms, _), found in zip(self._tasks, self._found, strict=True):
                if norms and found:
                    norms.keep(index, found)
            self._reading.close_shard(self._shard)
