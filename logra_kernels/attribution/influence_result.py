"""The scores of a store's rows for queries, ranked, under this package's names and LogIX's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, overload

from torch import Tensor

from logra_kernels.store import Store

TOTAL = "total"


@dataclass(frozen=True)
class Answer:
    """How a result's rows were found; `str` gives a sentence.

    "scan": every row was scored. "re-ranked": the rows that lead a scan of coarser rows were scored
    again, so that each score is exact, and a row may be missed. "certified": so many were scored
    again that none can be missed: the result is that of the finer rows alone, ties included.
    """

    method: str = "scan"
    rows: int = 0  # of the store
    finer: str | None = None  # what the second stage read: a dtype, or "computed"
    candidates: tuple[int, ...] = ()  # rows of each query that its second stage needed, both ends
    reranked_rows: int = 0  # of all queries together, each once
    reranked_bytes: int | None = None  # read for them; None where they are computed
    recall: float | None = None  # the estimated part of the k best and k worst that were found
    recall_interval: tuple[float, float] | None = None  # 95 %

    def __str__(self) -> str:
        if self.method == "scan":
            return "every row was scored"
        size = "" if self.reranked_bytes is None else f", {self.reranked_bytes / 1e6:,.1f} MB"
        again = (
            f"{self.reranked_rows:,} of {self.rows:,} rows were scored again ({self.finer}{size})"
        )
        if self.method == "certified":
            return f"certified, the ranking of all {self.finer} rows: {again}"
        text = f"re-ranked: {again}"
        if self.recall is not None and self.recall_interval is not None:
            low, high = self.recall_interval
            text += f"; estimated recall {self.recall:.3f} (95 %: {low:.3f} to {high:.3f})"
        return text


@dataclass
class InfluenceResult(Mapping[str, Any]):
    """Scores of stored rows for queries; a positive one: more training on the row helps the query.

    A full result has `scores` [Q, N]. A top-k result has `top_scores` and `top_rows`, best first,
    and `bottom_scores` and `bottom_rows`, worst first, each [Q, k]; equal scores are ordered by the
    lower row. `groups` holds a result of its own for each group of modules. As a mapping it has
    LogIX's keys `src_ids` (queries), `tgt_ids` (rows) and `influence`.
    """

    mode: str
    query_ids: list[str]
    row_ids: Sequence[str]  # all rows of the store
    dampings: dict[str, float]  # lambda per module; empty without a curvature
    zero_rows: int | None  # rows that score 0 because their normaliser is 0; None for "dot"
    # Which of these are None follows from the call that made the result, so type checkers take
    # `attributor.scores(queries).scores` for a tensor.
    scores: Tensor | Any = None  # [Q, N] float32
    top_scores: Tensor | Any = None
    top_rows: Tensor | Any = None  # int64
    bottom_scores: Tensor | Any = None
    bottom_rows: Tensor | Any = None
    groups: dict[str, InfluenceResult] = field(default_factory=dict)
    # Of each row what its tokens add to its scores, [Q, T] float32, where that was asked for.
    token_scores: list[Tensor] | None = None
    answer: Answer = Answer()
    # What the rows' scores were divided by, where rows of few bits do not tell it for this damping.
    normalised_by: str | None = None

    @property
    def top_ids(self) -> list[list[str]]:
        """The ids of the most influential rows, best first, per query."""
        return self._ids(self.top_rows, "top_ids")

    @property
    def bottom_ids(self) -> list[list[str]]:
        """The ids of the least influential rows, worst first, per query."""
        return self._ids(self.bottom_rows, "bottom_ids")

    def rows(self, query: int) -> list[dict[str, Any]]:
        """One query's rows, best first: dicts with rank, row, id, score and, for a top k, end."""
        if self.scores is not None:
            order = self.scores[query].sort(descending=True, stable=True).indices
            return self._ranked(self.scores[query][order], order)
        ends = (
            ("top", self.top_scores, self.top_rows),
            ("bottom", self.bottom_scores, self.bottom_rows),
        )
        ranked = []
        for end, scores, rows in ends:
            if scores is not None and rows is not None:
                ranked += self._ranked(scores[query], rows[query], end)
        return ranked

    def of_queries(self, part: slice, dampings: dict[str, float]) -> InfluenceResult:
        """The result of some of the queries, under the dampings that were theirs."""
        groups = {name: one.of_queries(part, dampings) for name, one in self.groups.items()}
        result = replace(self, query_ids=self.query_ids[part], dampings=dampings, groups=groups)
        for name in ("scores", "top_scores", "top_rows", "bottom_scores", "bottom_rows"):
            values = getattr(self, name)
            setattr(result, name, None if values is None else values[part])
        return result

    def to_json(self) -> str:
        """Everything in the result, rows ranked, as a JSON text."""
        return json.dumps(self._plain(), indent=2)

    def __getitem__(self, key: str) -> Any:
        if key == "src_ids":
            return self.query_ids
        if key == "tgt_ids":
            return list(self.row_ids) if self.scores is not None else self.top_ids
        if key == "influence":
            if not self.groups:
                return self._values()
            return {TOTAL: self._values(), **{k: g._values() for k, g in self.groups.items()}}
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("src_ids", "tgt_ids", "influence"))

    def __len__(self) -> int:
        return 3

    def _values(self) -> Tensor:
        values = self.scores if self.scores is not None else self.top_scores
        assert values is not None
        return values

    def _ids(self, rows: Tensor | None, name: str) -> list[list[str]]:
        if rows is None:
            raise AttributeError(f"{name}: only a top-k result has it; this one has all scores")
        return [[self.row_ids[row] for row in line if row >= 0] for line in rows.tolist()]

    def _ranked(self, scores: Tensor, rows: Tensor, end: str | None = None) -> list[dict[str, Any]]:
        extra = {} if end is None else {"end": end}
        pairs = zip(rows.tolist(), scores.tolist(), strict=True)
        # A place that no row fills has the row -1: scores that are not a number are never selected.
        return [
            {"rank": rank, "row": row, "id": self.row_ids[row], "score": score, **extra}
            for rank, (row, score) in enumerate(pairs, 1)
            if row >= 0
        ]

    def _plain(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "dampings": self.dampings,
            "zero_rows": self.zero_rows,
            "answer": asdict(self.answer),
            "queries": [
                {"id": query_id, "rows": self.rows(q)} for q, query_id in enumerate(self.query_ids)
            ],
            "groups": {name: group._plain() for name, group in self.groups.items()},
        }


class StoredIds(Sequence[str]):
    """A store's ids; one is read from its shard when it is asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __len__(self) -> int:
        return self._store.num_rows

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            self._store.check_unchanged()
            return [str(name) for name in self._store.ids[index].to_pylist()]
        count = self._store.num_rows
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count}")
        self._store.check_unchanged()
        return self._store.id_of(index % count)
