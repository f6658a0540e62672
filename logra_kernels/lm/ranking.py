"""A store's passages, ranked for the same queries in one mode after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from logra_kernels.attribution import Attributor, InfluenceResult, PreparedQueries, TwoStage
from logra_kernels.attribution.finer import ComputeRows
from logra_kernels.curvature import DampingScale, Preconditioner
from logra_kernels.defaults import DAMPING_SCALE, GRADIENT_DOT, MATRIX_MODE, NO_CURVATURE
from logra_kernels.store import Store

Passage = dict[str, Any]  # rank, row, id, score; later text, title, prompt, tokens
Scores = dict[str, list[Any]]  # columns of equal lengths: query, mode, row, id, score
BLOCK_ROWS = 1 << 16  # of scores that are held as columns


@dataclass(frozen=True)
class Ranking:
    """The passages that one mode ranks first and last, for every query."""

    mode: str
    queries: PreparedQueries
    preconditioner: Preconditioner
    top: list[list[Passage]]  # of each query
    bottom: list[list[Passage]]
    expected_ranks: dict[str, int | None]  # {query id: rank of the best expected passage}
    answer: dict[str, Any]  # how the passages were found: the fields of `Answer`, and its text


@dataclass(frozen=True)
class SecondLook:
    """Finer rows by which the leading rows of a scan are ranked, and how many of these.

    `finer` is what `TwoStage` takes, the others are arguments of its `top_k`.
    """

    finer: Store | ComputeRows
    candidates: int | None = None
    recall: float | None = None
    certified: bool = False


class Scans:
    """Scans of a store for the same queries; modes with a curvature share one preconditioning.

    Args:
        store: the passages' rows.
        rows: the queries' gradients, [Q, D].
        names: the queries' ids.
        damping_scale, damping: as in `Attributor`.
        second: ranks by finer rows; None: by the store's.
    """

    def __init__(
        self,
        store: Store,
        rows: Tensor,
        names: Sequence[str],
        *,
        damping_scale: DampingScale | None,
        damping: float | None,
        second: SecondLook | None = None,
    ) -> None:
        self._store = store
        self._rows = rows
        self._names = names
        self._damping_scale = damping_scale
        self._damping = damping
        self._second = second

    @cached_property
    def _curved(self) -> tuple[Attributor, PreparedQueries]:
        attributor = Attributor(
            self._store, damping_scale=self._damping_scale, damping=self._damping
        )
        return attributor, attributor.prepare(self._rows, self._names)

    @cached_property
    def _plain(self) -> tuple[Attributor, PreparedQueries]:
        attributor = Attributor(self._store, NO_CURVATURE)
        return attributor, attributor.prepare(self._rows, self._names)

    def rank(
        self,
        mode: str,
        top_k: int,
        expected: Mapping[str, str],
        every: Callable[[Scores], None] | None = None,
    ) -> Ranking:
        """Rank the store's passages in one mode; `every` is given all scores, block by block."""
        attributor, queries = self._plain if mode == GRADIENT_DOT else self._curved
        scan_mode = MATRIX_MODE if mode == GRADIENT_DOT else mode
        result = self._top_k(attributor, queries, top_k, scan_mode)
        ranks: dict[str, int | None] = {}
        scores: Tensor | None = None  # [Q, N]
        if expected or every is not None:
            scores = attributor.scores(queries, scan_mode).scores
        if scores is not None and every is not None:
            for block in _blocks(self._store, mode, self._names, scores):
                every(block)
        if scores is not None and expected:
            ids = self._store.ids.to_pylist()
            for name, of_query in zip(self._names, scores, strict=True):
                if name in expected:
                    ranks[name] = _best_rank(ids, of_query, expected[name])
        top, bottom = (_passages(result, end) for end in ("top", "bottom"))
        answer = {**asdict(result.answer), "text": str(result.answer)}
        return Ranking(mode, queries, attributor.preconditioner, top, bottom, ranks, answer)

    def _top_k(
        self, attributor: Attributor, queries: PreparedQueries, top_k: int, mode: str
    ) -> InfluenceResult:
        second = self._second
        if second is None:
            return attributor.top_k(queries, top_k, mode)
        return TwoStage(attributor, second.finer).top_k(
            queries,
            top_k,
            mode,
            candidates=second.candidates,
            recall=second.recall,
            certified=second.certified,
        )

    def curvature_facts(self, rankings: Sequence[Ranking]) -> dict[str, Any]:
        """What a report says of the curvature and the damping that the rankings used."""
        if all(ranking.mode == GRADIENT_DOT for ranking in rankings):
            return {"kind": NO_CURVATURE}
        attributor, _ = self._curved
        facts = {"kind": attributor.preconditioner.kind, "lambdas": attributor.dampings}
        if self._damping is not None:
            return {**facts, "damping": self._damping}
        if isinstance(self._damping_scale, str):
            return {**facts, "damping_rule": self._damping_scale}
        scale = DAMPING_SCALE if self._damping_scale is None else self._damping_scale
        return {**facts, "damping_scale": scale}


def _blocks(store: Store, mode: str, names: Sequence[str], scores: Tensor) -> Iterator[Scores]:
    """The scores [Q, N] of all rows, query by query; ids are read a block at a time."""
    for name, of_query in zip(names, scores, strict=True):
        for shard in store.shards:
            for start in range(0, shard.num_rows, BLOCK_ROWS):
                ids = shard.table["id"].slice(start, BLOCK_ROWS).to_pylist()
                first = shard.first_row + start
                yield {
                    "query": [name] * len(ids),
                    "mode": [mode] * len(ids),
                    "row": list(range(first, first + len(ids))),
                    "id": ids,
                    "score": of_query[first : first + len(ids)].tolist(),
                }


def _passages(result: InfluenceResult, end: str) -> list[list[Passage]]:
    """The passages at one end of the ranking of each query."""
    return [
        [
            {key: item[key] for key in ("rank", "row", "id", "score")}
            for item in result.rows(query)
            if item["end"] == end
        ]
        for query in range(len(result.query_ids))
    ]


def _best_rank(ids: Sequence[str], scores: Tensor, beginning: str) -> int | None:
    """The rank, from 1, of the highest score [N] among the rows whose id begins so."""
    order = scores.sort(descending=True, stable=True).indices.tolist()
    return next((rank for rank, row in enumerate(order, 1) if ids[row].startswith(beginning)), None)
