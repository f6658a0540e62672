"""A store's passages, ranked for the same queries in one mode after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from logra_kernels.attribution import Attributor, InfluenceResult, PreparedQueries, TwoStage
from logra_kernels.attribution.finer import ComputeRows
from logra_kernels.curvature import (
    DampingScale,
    Preconditioner,
    curvature_of,
    preconditioner_of,
)
from logra_kernels.defaults import DAMPING_SCALE, GRADIENT_DOT, MATRIX_MODE, NO_CURVATURE
from logra_kernels.store import Store

Passage = dict[str, Any]  # rank, row, id, score; later text, title, prompt, tokens
# Columns of equal lengths: query, mode, damping_scale (of several), row, id, score.
Scores = dict[str, list[Any]]
BLOCK_ROWS = 1 << 16  # of scores that are held as columns


@dataclass(frozen=True)
class Ranking:
    """The passages that one mode ranks first and last under one damping, for every query."""

    mode: str
    scale: DampingScale | None  # where several were asked for
    queries: PreparedQueries
    preconditioner: Preconditioner
    top: list[list[Passage]]  # of each query
    bottom: list[list[Passage]]
    expected_ranks: dict[str, int | None]  # {query id: rank of the best expected passage}
    answer: dict[str, Any]  # how the passages were found: the fields of `Answer`, and its text

    @property
    def name(self) -> str:
        """The mode, and of several dampings its own."""
        return self.mode if self.scale is None else f"{self.mode}, damping scale {self.scale}"


@dataclass(frozen=True)
class SecondLook:
    """Finer rows by which the leading rows of a scan are ranked, and how many of these.

    `finer` is what `TwoStage` takes, the others are arguments of its `top_k`.
    """

    finer: Store | ComputeRows
    candidates: int | None = None
    recall: float | None = None
    certified: bool = False


@dataclass(frozen=True)
class _Asked:
    """The queries under one damping."""

    scale: DampingScale | None  # None: the default, or λ itself, or no curvature
    preconditioner: Preconditioner
    queries: PreparedQueries


class Scans:
    """Scans of a store for the same queries; modes with a curvature share one preconditioning.

    Args:
        store: the passages' rows.
        rows: the queries' gradients, [Q, D].
        names: the queries' ids.
        damping_scale, damping: as in `Attributor`; or several scales, which share each scan.
        second: ranks by finer rows, of several scales under one after the other; None: by the
            store's.
    """

    def __init__(
        self,
        store: Store,
        rows: Tensor,
        names: Sequence[str],
        *,
        damping_scale: DampingScale | Sequence[DampingScale] | None,
        damping: float | None,
        second: SecondLook | None = None,
    ) -> None:
        self._store = store
        self._rows = rows
        self._names = names
        self._scales: list[DampingScale | None] = [None]
        if isinstance(damping_scale, str | float | int):
            self._scales = [damping_scale]
        elif damping_scale is not None:
            self._scales = [*damping_scale]
        self._damping = damping
        self._second = second

    @cached_property
    def _curved(self) -> tuple[Attributor, list[_Asked]]:
        curvature = curvature_of(self._store)
        asked = []
        for scale in self._scales:
            damped = preconditioner_of(
                self._store, curvature, damping_scale=scale, damping=self._damping
            )
            queries = PreparedQueries.of(self._rows, self._names, damped)
            asked.append(_Asked(scale, damped, queries))
        return Attributor(self._store, asked[0].preconditioner), asked

    @cached_property
    def _plain(self) -> tuple[Attributor, list[_Asked]]:
        attributor = Attributor(self._store, NO_CURVATURE)
        queries = attributor.prepare(self._rows, self._names)
        return attributor, [_Asked(None, attributor.preconditioner, queries)]

    def rank(
        self,
        mode: str,
        top_k: int,
        expected: Mapping[str, str],
        every: Callable[[Scores], None] | None = None,
    ) -> list[Ranking]:
        """Rank the store's passages in one mode; `every` is given all scores, block by block.

        Returns: a ranking for each damping; one in a mode without a curvature.
        """
        _, asked = self._of(mode)
        results = self._scan(mode, top_k) if self._second is None else self._look(mode, top_k)
        matrices = results if every is None and not expected else self._scan(mode, None)
        rankings = []
        for one, result, matrix in zip(asked, results, matrices, strict=True):
            fixed = {"mode": mode}
            if len(self._scales) > 1:
                fixed["damping_scale"] = "" if one.scale is None else str(one.scale)
            if every is not None:
                for block in _blocks(self._store, fixed, self._names, matrix.scores):
                    every(block)
            ranks: dict[str, int | None] = {}
            if expected:
                ids = self._store.ids.to_pylist()
                for name, of_query in zip(self._names, matrix.scores, strict=True):
                    if name in expected:
                        ranks[name] = _best_rank(ids, of_query, expected[name])
            top, bottom = (_passages(result, end) for end in ("top", "bottom"))
            scale = one.scale if len(self._scales) > 1 else None
            answer = {**asdict(result.answer), "text": str(result.answer)}
            rankings.append(
                Ranking(mode, scale, one.queries, one.preconditioner, top, bottom, ranks, answer)
            )
        return rankings

    def curvature_facts(self, rankings: Sequence[Ranking]) -> dict[str, Any]:
        """What a report says of the curvature and the dampings that the rankings used."""
        if all(ranking.mode == GRADIENT_DOT for ranking in rankings):
            return {"kind": NO_CURVATURE}
        _, asked = self._curved
        dampings = [self._damping_facts(one) for one in asked]
        kind = asked[0].preconditioner.kind
        return {"kind": kind, **(dampings[0] if len(dampings) == 1 else {"dampings": dampings})}

    def _of(self, mode: str) -> tuple[Attributor, list[_Asked]]:
        return self._plain if mode == GRADIENT_DOT else self._curved

    def _scan(self, mode: str, top_k: int | None) -> list[InfluenceResult]:
        """The best and worst passages for each damping, or with no `top_k` the matrices."""
        attributor, asked = self._of(mode)
        scan_mode = MATRIX_MODE if mode == GRADIENT_DOT else mode
        if len(asked) > 1:
            return attributor.sweep(
                self._rows,
                preconditioners=[one.preconditioner for one in asked],
                k=top_k,
                mode=scan_mode,
                query_ids=self._names,
            )
        if top_k is None:
            return [attributor.scores(asked[0].queries, scan_mode)]
        return [attributor.top_k(asked[0].queries, top_k, scan_mode)]

    def _look(self, mode: str, top_k: int) -> list[InfluenceResult]:
        """The best and worst passages for each damping, by finer rows."""
        second = self._second
        assert second is not None
        scan_mode = MATRIX_MODE if mode == GRADIENT_DOT else mode
        return [
            TwoStage(Attributor(self._store, one.preconditioner), second.finer).top_k(
                one.queries,
                top_k,
                scan_mode,
                candidates=second.candidates,
                recall=second.recall,
                certified=second.certified,
            )
            for one in self._of(mode)[1]
        ]

    def _damping_facts(self, asked: _Asked) -> dict[str, Any]:
        facts: dict[str, Any] = {"lambdas": asked.preconditioner.dampings}
        if self._damping is not None:
            return {**facts, "damping": self._damping}
        return {**facts, **scale_facts(DAMPING_SCALE if asked.scale is None else asked.scale)}


def scale_facts(scale: DampingScale) -> dict[str, Any]:
    """A damping scale as a results file holds it: a number, or the name of a rule."""
    return {"damping_rule" if isinstance(scale, str) else "damping_scale": scale}


def _blocks(
    store: Store, fixed: Mapping[str, str], names: Sequence[str], scores: Tensor
) -> Iterator[Scores]:
    """The scores [Q, N] of all rows, query by query; ids are read a block at a time.

    `fixed` are the columns that hold one value, between the query's and the row's.
    """
    for name, of_query in zip(names, scores, strict=True):
        for shard in store.shards:
            for start in range(0, shard.num_rows, BLOCK_ROWS):
                ids = shard.table["id"].slice(start, BLOCK_ROWS).to_pylist()
                first = shard.first_row + start
                yield {
                    "query": [name] * len(ids),
                    **{column: [value] * len(ids) for column, value in fixed.items()},
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
