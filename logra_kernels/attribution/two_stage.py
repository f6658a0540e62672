"""A scan of coarse rows, then the exact scores of the rows that may lead: two-stage answers."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.attributor import Attributor
from logra_kernels.attribution.bounds import BoundedScores, FinerTerms, Multiplied
from logra_kernels.attribution.finer import ComputedRows, ComputeRows, FinerRows, StoredRows
from logra_kernels.attribution.finer import score_rows as score_finer
from logra_kernels.attribution.influence_result import Answer, InfluenceResult, StoredIds
from logra_kernels.attribution.norms import NORM_OF_MODE, Norms
from logra_kernels.attribution.pipeline import HostLanes
from logra_kernels.attribution.plan import (
    Plan,
    PreparedQueries,
    check_mode,
    check_top_k,
    plan_scan,
)
from logra_kernels.attribution.reading import Block
from logra_kernels.attribution.recall import CoarseEnd, ErrorModel, poisson_interval
from logra_kernels.attribution.sinks import FullMatrix, TopK
from logra_kernels.curvature import IdentityPreconditioner
from logra_kernels.defaults import RANKING_MODE, RECALL
from logra_kernels.progress import Progress
from logra_kernels.store import Store
from logra_kernels.store.residuals import check_finer, residuals

LISTED_SHARE = 0.02  # of the rows that a scan lists at each end, at first, for a recall
LEAST_LISTED = 256
PROBED = 32  # rows of each end, or 2k, by which a query's coarse errors are judged
SAMPLED = 1024  # random rows whose coarse scores stand for those of the rows not listed
EXACT = ("float16", "float32")  # codecs whose rows are decoded without rounding
TOGETHER = 32  # queries whose first rows are scored at a time


class TwoStage:
    """Top k of finer rows through a scan of coarse ones.

    Every row of the coarse store is scanned. The rows that lead there are scored again by finer
    rows, and the best of those are the answer: scores are the finer rows' own, bit for bit those of
    an Attributor of the finer store under this curvature and damping.

    Args:
        scan: an Attributor of the coarse store.
        finer: a store of finer rows of the same examples, as `compress_store` started from, or
            the store itself whose first planes are scanned; or a function that gives rows: of
            ascending row numbers [n] int64 the gradients [n, D] float32, such as the model makes
            again of those examples.

    Raises:
        StoreMismatchError: the finer store is of other examples, modules or another projection.
    """

    def __init__(self, scan: Attributor, finer: Store | str | PathLike[str] | ComputeRows) -> None:
        self.scan = scan
        self._finer: Store | None = None
        if isinstance(finer, (str, PathLike)):
            finer = Store.open(Path(finer))
        if isinstance(finer, Store):
            check_finer(scan.store, finer)
            self._finer = finer
            self._finer_scan = Attributor(finer, scan.preconditioner, device=scan.device)
            self._exact: FinerRows = StoredRows(self._finer_scan)
        else:
            self._exact = ComputedRows(finer, scan.store.layout, scan.device)
        self._coarse = StoredRows(scan)
        rows = scan.store.num_rows
        self._sample = np.random.default_rng(0).choice(rows, min(rows, SAMPLED), replace=False)
        self._sample.sort()
        self._sampled: list[Block] | None = None  # the coarse rows
        self._sizes: dict[str | None, Tensor] = {}  # of all rows, for each norm of a mode

    def top_k(
        self,
        queries: Tensor | PreparedQueries,
        k: int = 10,
        mode: str = RANKING_MODE,
        *,
        candidates: int | None = None,
        recall: float | None = None,
        certified: bool = False,
        query_ids: Sequence[Any] | None = None,
        progress: Progress = None,
    ) -> InfluenceResult:
        """The k most and the k least influential rows; `result.answer` says how they were found.

        Args:
            queries, k, mode, query_ids, progress: as in `Attributor.top_k`.
            candidates: score this many rows of each end of a query's coarse ranking again.
            recall: as many as it takes to find this part of the k best and k worst, as it is
                estimated from coarse and exact scores of leading rows; 0.98 if nothing else is
                given.
            certified: as many as it takes to prove that none is missed. The result equals
                `Attributor.top_k` of the finer store, ties included. The first call reads both
                stores once, for the rows' residuals, and the finer one once for norms that are not
                known; both are kept beside the stores.

        Raises:
            TypeError, ValueError: as `Attributor.top_k`; more than one of candidates, recall and
                certified; fewer candidates than k; a recall outside (0, 1); certified without a
                finer store.
            StoreError: a store was replaced or deleted, or cannot be read.
        """
        mode = check_mode(mode)
        rows = self.scan.store.num_rows
        check_top_k("k", k)
        if k > rows:
            raise ValueError(f"k: expected at most {rows}, the rows in the store, got {k}")
        given = {"candidates": candidates, "recall": recall, "certified": certified or None}
        if sum(value is not None for value in given.values()) > 1:
            names = " and ".join(name for name, value in given.items() if value is not None)
            raise ValueError(f"expected one of candidates, recall and certified, got {names}")
        if candidates is not None:
            check_top_k("candidates", candidates)
            if candidates < k:
                raise ValueError(f"candidates: expected at least k = {k}, got {candidates}")
        if recall is not None and not 0 < recall < 1:
            raise ValueError(f"recall: expected a number between 0 and 1, got {recall!r}")
        prepared = PreparedQueries.of(queries, query_ids, self.scan.preconditioner)
        if self._finer is not None:
            self._finer.check_unchanged()
        if certified:
            return self._certified(prepared, k, mode, progress)
        return self._ranked(prepared, k, mode, candidates, recall or RECALL, progress)

    def _ranked(
        self,
        prepared: PreparedQueries,
        k: int,
        mode: str,
        candidates: int | None,
        recall: float,
        progress: Progress,
    ) -> InfluenceResult:
        """The best of the candidates, of a given number or as many as the recall takes."""
        rows = self.scan.store.num_rows
        # The score of mode "l2" is a product and a term that has no error.
        sizes = self._sizes_for(None if mode == "l2" else NORM_OF_MODE[mode], progress)
        sample, sampled = self._sample, self._sample_scores(prepared, mode)
        # Some rows behind the candidates show how many are missed.
        least = max(LEAST_LISTED, 8 * k, int(LISTED_SHARE * rows))
        listed = min(rows, least if candidates is None else 2 * candidates)
        coarse = self.scan.top_k(prepared, listed, mode, progress=progress)
        errors, lasts = self._probe(prepared, k, mode, coarse, sizes)
        counts = [torch.full((len(prepared.names),), min(candidates or 0, rows))] * 2
        while candidates is None:
            _, high = errors.stretches()  # the wider spread, so that the recall is kept
            ends = _ends(coarse, sampled, sample, sizes)
            enough = [
                end.missed(errors, end.last(errors, k, least), high) <= (1 - recall) * k
                for end, least in zip(ends, lasts, strict=True)
            ]  # [Q, listed + 1]
            if listed == rows or all(bool(of_end[:, -1].all()) for of_end in enough):
                counts = [of_end.double().argmax(dim=1).clamp(min=k) for of_end in enough]
                break
            listed = min(rows, 4 * listed)
            coarse = self.scan.top_k(prepared, listed, mode, progress=progress)
        chosen = [
            of_query[:count]
            for found, of_end in zip((coarse.top_rows, coarse.bottom_rows), counts, strict=True)
            for of_query, count in zip(found, of_end.tolist(), strict=True)
        ]
        numbers = torch.cat(chosen).unique().numpy()
        result = self._exact_top_k(prepared, k, mode, numbers)
        result.zero_rows = coarse.zero_rows
        ends = _ends(coarse, sampled, sample, sizes, numbers)
        kept = result.top_scores, -result.bottom_scores
        places = 2 * k * len(prepared.names)
        lost = [0.0, 0.0, 0.0]
        if len(numbers) < rows:
            lost = [
                sum(end.lost(errors, one, stretch) for end, one in zip(ends, kept, strict=True))
                for stretch in (1.0, *errors.stretches())
            ]
        few, many = poisson_interval(*lost[1:])
        result.answer = self._answer(
            "re-ranked",
            tuple((counts[0] + counts[1]).tolist()),
            len(numbers),
            recall=1 - lost[0] / places,
            recall_interval=(max(0.0, 1 - many / places), max(0.0, 1 - few / places)),
        )
        return result

    def _certified(
        self, prepared: PreparedQueries, k: int, mode: str, progress: Progress
    ) -> InfluenceResult:
        """The best of all rows whose bounds let them be among the best."""
        if self._finer is None:
            raise ValueError(
                "certified: expected a finer store, whose rows' residuals are known; got a function"
            )
        if self._finer.codec.name not in EXACT or not self._finer.basis.plain:
            raise ValueError(
                f"certified: expected finer rows in {' or '.join(EXACT)}, not rotated, got "
                f"{self._finer.path}"
            )
        scan, norm = self.scan, NORM_OF_MODE[mode]
        finer_scan = self._finer_scan
        norms = None
        if norm is not None:
            norms = finer_scan.complete(finer_scan.norms_of(norm), progress)
        lengths = finer_scan.complete(_lengths(finer_scan), progress)
        kept = residuals(scan.store, self._finer)
        plan = self._plan(self._coarse, prepared, mode)
        exact = self._plan(self._exact, prepared, mode)
        unit = exact.exponents.cpu()[:, None]
        sink = BoundedScores(
            plan,
            Multiplied.of(plan, scan.store, unit),
            Multiplied.of(exact, self._finer, unit),
            unit,
            FinerTerms(finer_scan.shard_rows, norms, lengths, exact, self._finer),
            kept,
            (scan.store, self._finer),
            k,
        )
        scan.visit(sink, None, len(prepared.names), progress)
        ends = sink.top, sink.bottom
        for end in ends:
            end.prune()
        self._raise_bars(prepared, k, mode, sink)
        looked_at = int(sink.every_query.sum())
        needed = [
            looked_at + int(of_top) + int(of_bottom)
            for of_top, of_bottom in zip(*(end.counts() for end in ends), strict=True)
        ]
        sink.every_query[torch.cat([end.rows for end in ends]).numpy()] = True
        numbers = np.flatnonzero(sink.every_query)
        result = self._exact_top_k(prepared, k, mode, numbers)
        result.zero_rows = None if norm is None else sink.zero_rows
        result.answer = self._answer("certified", tuple(needed), len(numbers))
        return result

    def _raise_bars(
        self, prepared: PreparedQueries, k: int, mode: str, sink: BoundedScores
    ) -> None:
        """Score the rows that lead exactly: what cannot reach the k-th of those is left out."""
        count, ends = len(prepared.names), (sink.top, sink.bottom)
        leading = [end.leading() for end in ends]
        # The k-th best of any rows is a bar that the k-th best of all rows reaches.
        bars = torch.full((2, count), -torch.inf, dtype=torch.float64)
        for first in range(0, count, TOGETHER):
            here = slice(first, first + TOGETHER)
            numbers = torch.cat([rows for of_end in leading for rows in of_end[here]]).unique()
            if len(numbers) >= k:
                some = prepared.some(range(count)[here])
                scores = self._exact_scores(some, mode, numbers.numpy()).double()
                bars[0, here] = scores.topk(k, dim=1).values[:, -1]
                bars[1, here] = (-scores).topk(k, dim=1).values[:, -1]
        for end, least in zip(ends, bars, strict=True):
            end.prune(least)

    def _probe(
        self,
        prepared: PreparedQueries,
        k: int,
        mode: str,
        coarse: InfluenceResult,
        sizes: Tensor,
    ) -> tuple[ErrorModel, tuple[Tensor, Tensor]]:
        """How coarse and exact scores of leading rows differ, and the k-th exact of each end."""
        probed = min(max(2 * k, PROBED), coarse.top_rows.shape[1])
        rows = torch.cat([coarse.top_rows[:, :probed], coarse.bottom_rows[:, :probed]], dim=1)
        scores = torch.cat([coarse.top_scores[:, :probed], coarse.bottom_scores[:, :probed]], dim=1)
        exact = torch.empty_like(scores)
        for first in range(0, len(rows), TOGETHER):
            here = slice(first, first + TOGETHER)
            numbers, places = rows[here].unique(return_inverse=True)
            some = prepared.some(range(len(rows))[here])
            exact[here] = self._exact_scores(some, mode, numbers.numpy()).gather(1, places)
        top = exact[:, :probed].topk(k, dim=1).values[:, -1:].double()
        bottom = (-exact[:, probed:]).topk(k, dim=1).values[:, -1:].double()
        return ErrorModel.fit(scores, exact, sizes[rows]), (top, bottom)

    def _sample_scores(self, prepared: PreparedQueries, mode: str) -> Tensor:
        """The coarse scores of the sampled rows, [Q, S] float32."""
        if self._sampled is None:
            self._sampled = list(self._coarse.blocks(self._sample))
        norm = NORM_OF_MODE[mode]
        if norm is not None:
            self.scan.complete(self.scan.norms_of(norm))
        plan = self._plan(self._coarse, prepared, mode)
        sink = FullMatrix(plan, HostLanes(self.scan.device).upload, len(self._sample))
        for block in self._sampled:
            sink.add(block, self._coarse.known_norms(self._sample[block.numbers], plan))
        scores: Tensor = sink.result(prepared.names, (), {}).scores
        return scores

    def _sizes_for(self, norm: str | None, progress: Progress) -> Tensor:
        """What the errors of the coarse rows' scores grow with, [N] float64.

        A row's norm; divided by the norm that the mode divides the score by.
        """
        if norm in self._sizes:
            return self._sizes[norm]
        store, parts = self.scan.store, []
        members = list(range(len(store.layout)))
        # Few bits do not tell |g|; of whitened rows √sigma is the norm.
        scan = self.scan
        base = _lengths(scan) if store.basis.plain else scan.norms_of("sigma")
        lengths = scan.complete(base, progress)
        norms = None if norm is None else scan.complete(scan.norms_of(norm), progress)
        for index, shard in enumerate(store.shards):
            rows, whole = self.scan.shard_rows(index), slice(0, shard.num_rows)
            size = lengths.of_shard(rows).true_norms(members, whole)
            if norms is not None:
                by = norms.of_shard(rows).true_norms(members, whole)
                size = np.divide(size, by, out=np.zeros_like(size), where=by > 0)
            parts.append(size)
        self._sizes[norm] = torch.from_numpy(np.concatenate(parts))
        return self._sizes[norm]

    def _plan(self, rows: FinerRows, prepared: PreparedQueries, mode: str) -> Plan:
        return plan_scan(prepared, mode, None, rows.basis, self.scan.device)[0]

    def _exact_scores(self, prepared: PreparedQueries, mode: str, numbers: np.ndarray) -> Tensor:
        """The finer scores of some rows, [Q, n] float32 on the CPU."""
        upload = HostLanes(self.scan.device).upload
        sink = FullMatrix(self._plan(self._exact, prepared, mode), upload, len(numbers))
        score_finer(self._exact, numbers, self.scan.preconditioner, [sink], self.scan.device)
        scores: Tensor = sink.result(prepared.names, (), {}).scores
        return scores

    def _exact_top_k(
        self, prepared: PreparedQueries, k: int, mode: str, numbers: np.ndarray
    ) -> InfluenceResult:
        """The k best and worst of the rows `numbers`, ascending, by their exact scores."""
        upload = HostLanes(self.scan.device).upload
        sink = TopK(self._plan(self._exact, prepared, mode), upload, k)
        score_finer(self._exact, numbers, self.scan.preconditioner, [sink], self.scan.device)
        ids = StoredIds(self.scan.store)
        result = sink.result(prepared.names, ids, self.scan.dampings)
        norm = NORM_OF_MODE[mode]
        if self._finer is not None and norm is not None:
            result.normalised_by = self._finer_scan.norms_of(norm).said
        # Places among the numbers, of which the lower is the lower row, become rows.
        table = torch.from_numpy(np.append(numbers, -1))
        result.top_rows, result.bottom_rows = table[result.top_rows], table[result.bottom_rows]
        return result

    def _answer(
        self, method: str, candidates: tuple[int, ...], reranked: int, **estimate: Any
    ) -> Answer:
        row_bytes = self._exact.row_bytes
        size = None if row_bytes is None else reranked * row_bytes
        rows, kind = self.scan.store.num_rows, self._exact.kind
        return Answer(method, rows, kind, candidates, reranked, size, **estimate)


def _lengths(scan: Attributor) -> Norms:
    """|g| of a store's rows by module, kept beside the store."""
    store, identity = scan.store, IdentityPreconditioner(scan.store.layout)
    return Norms(identity, "sigma", store.module_exponents, scan.device, store)


def _ends(
    coarse: InfluenceResult,
    sampled: Tensor,
    sample: np.ndarray,
    sizes: Tensor,
    known: np.ndarray | None = None,
) -> tuple[CoarseEnd, CoarseEnd]:
    """Both ends of a scan's rankings, without chances for rows whose exact scores are known.

    Args:
        coarse: a top k of the scan.
        sampled: scores [Q, S] of the rows `sample` [S].
        sizes: of all rows, [N].
        known: numbers of rows.
    """
    out = torch.zeros(len(sizes), dtype=torch.bool)
    if known is not None:
        out[torch.from_numpy(known)] = True
    rows = torch.from_numpy(sample)
    top, bottom = (
        CoarseEnd.of(
            (sign * scores, sizes[found], out[found]),
            (sign * sampled, sizes[rows], out[rows]),
            len(sizes),
        )
        for sign, scores, found in (
            (1, coarse.top_scores, coarse.top_rows),
            (-1, coarse.bottom_scores, coarse.bottom_rows),
        )
    )
    return top, bottom
