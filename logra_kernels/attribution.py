"""From a store and queries to influence: precondition the queries, stream the rows, keep scores.

score = g_te^T (H + lambda I)^-1 g_tr (Eq. 3). The inverse is folded into the query once, so that a
row costs one dot product; a normaliser such as l-RelatIF's 1 / sqrt(sigma) is a scale per row.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.curvature import (
    IdentityPreconditioner,
    Preconditioner,
    RawCurvature,
    module_of,
    share,
    split_columns,
)
from logra_kernels.progress import Progress, track
from logra_kernels.store import Module, Store, StoreError

MODES = ("dot", "l-relatif", "l2", "theta-relatif", "whitened-cosine")
# What each mode divides by: "sigma" is |W g| = sqrt(sigma), "theta" is |(H + lambda I)^-1 g|.
_NORM = {
    "dot": None,
    "l-relatif": "sigma",
    "l2": "sigma",
    "theta-relatif": "theta",
    "whitened-cosine": "sigma",
}
TOTAL = "total"

# A block this large outweighs a call, and still leaves the shard hot between sigma and the scores.
BLOCK_BYTES = 32 << 20
SMALLEST_BLOCK_ROWS, LARGEST_BLOCK_ROWS = 256, 1 << 16
# Sums of squares outside these have lost bits to float32's range, or are about to.
SMALLEST_SQUARE, LARGEST_SQUARE = 2.0**-90, 2.0**100

Groups = Mapping[str, str | Sequence[str]] | Sequence[str] | None

_warned: set[str] = set()


@dataclass
class InfluenceResult(Mapping[str, Any]):
    """Scores of stored rows for queries; positive: training more on the row helps the query.

    A full result has `scores [Q, N]`; a top-k result has `top_scores`, `top_rows`,
    `bottom_scores`, `bottom_rows`, each [Q, k], best (worst) first, ties by the lower row. Groups
    of modules are results of their own in `groups`. As a mapping it has LogIX's keys `src_ids`
    (queries), `tgt_ids` (rows) and `influence`.
    """

    mode: str
    query_ids: list[str]
    row_ids: Sequence[str]  # all rows of the store
    dampings: dict[str, float]  # lambda per module; empty without a curvature
    zero_rows: int | None  # rows whose normaliser is zero, and so their score; None for "dot"
    scores: Tensor | None = None  # [Q, N] float32
    top_scores: Tensor | None = None
    top_rows: Tensor | None = None  # int64
    bottom_scores: Tensor | None = None
    bottom_rows: Tensor | None = None
    groups: dict[str, InfluenceResult] = field(default_factory=dict)

    @property
    def top_ids(self) -> list[list[str]]:
        """The ids of the most influential rows, best first, per query."""
        return self._ids(self.top_rows, "top_ids")

    @property
    def bottom_ids(self) -> list[list[str]]:
        """The ids of the least influential rows, worst first, per query."""
        return self._ids(self.bottom_rows, "bottom_ids")

    def rows(self, query: int) -> list[dict[str, Any]]:
        """One query's ranked rows: dicts with rank, row, id, score and (for a top k) end."""
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
        return [[self.row_ids[row] for row in line] for line in rows.tolist()]

    def _ranked(self, scores: Tensor, rows: Tensor, end: str | None = None) -> list[dict[str, Any]]:
        extra = {} if end is None else {"end": end}
        return [
            {"rank": rank, "row": row, "id": self.row_ids[row], "score": score, **extra}
            for rank, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), 1)
        ]

    def _plain(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "dampings": self.dampings,
            "zero_rows": self.zero_rows,
            "queries": [
                {"id": query_id, "rows": self.rows(q)} for q, query_id in enumerate(self.query_ids)
            ],
            "groups": {name: group._plain() for name, group in self.groups.items()},
        }


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
        self._norms: dict[str, _Norms] = {}

    def precondition(self, queries: Tensor) -> Tensor:
        """(H + lambda I)^-1 g for queries [Q, D]; [Q, D] of the same dtype."""
        _check_rows("queries", queries, self.modules, None)
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
                sigma = _true_norm(block, members).square().cpu()
                out[name][block.first_row : block.first_row + len(sigma)] = sigma
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
        theirs = [(m.name, m.size) for m in curvature.modules]
        if theirs != [(m.name, m.size) for m in self.modules]:
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
        mode = _check_mode(mode)
        names = _check_query_ids(query_ids, queries)
        plans = _plan(
            queries, names, mode, groups, self.modules, self._exponents, self.preconditioner
        )
        sinks = [_Sink(plan.to(self.device), self.store.num_rows, k) for plan in plans]
        for block in self._blocks(_NORM[mode], progress):
            for sink in sinks:
                sink.add(block, mode)
        row_ids = _Ids(self.store.ids)
        return _collect(sinks, mode, names, row_ids, self.dampings)

    def _blocks(
        self, kind: str | None, progress: Progress, rows_needed: bool = True
    ) -> Iterator[_Block]:
        """The store's rows, block by block, with the norms of that kind.

        Norms that no earlier pass left are computed here, while the block is in cache, and
        committed shard by shard: an interrupted pass keeps the shards it finished.
        """
        done = track(progress, self.store.num_rows, "scan")
        norms = self._norms_of(kind) if kind else None
        for index, shard in enumerate(self.store.shards):
            count = shard.num_rows
            known = norms.load(index) if norms else None
            fresh = np.empty((count, len(self.modules)), np.float32) if known is None else None
            for start in range(0, count, self.block_rows):
                end = min(start + self.block_rows, count)
                rows = share(shard.rows[start:end])
                if rows_needed or known is None:
                    rows = rows.to(self.device)
                scale = None
                if self.store.dtype != "float32":  # whose scales are ones
                    scale = share(shard.row_scale[start:end]).to(self.device)
                first_row = shard.first_row + start
                block = _Block(first_row, rows, scale, None, norms.units if norms else [])
                if norms and known is not None:
                    block.norms = share(known[start:end]).to(self.device)
                elif norms and fresh is not None:
                    block.norms = norms.compute(rows, self.modules)
                    self._check_norms(block.norms, first_row)
                    fresh[start:end] = block.norms.cpu().numpy()
                yield block
                done(end - start)
            if norms and fresh is not None:
                norms.keep(index, fresh)

    def _norms_of(self, kind: str) -> _Norms:
        if kind not in self._norms:
            self._norms[kind] = _Norms(
                self.preconditioner, kind, self._exponents, self.device, self.store
            )
        return self._norms[kind]

    def _check_norms(self, norms: Tensor, first_row: int) -> None:
        finite = norms.isfinite()
        if finite.all():
            return
        row, module = (int(v) for v in (~finite).nonzero()[0])
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
    mode = _check_mode(mode)
    _check_rows("rows", rows, modules, None)
    rows = rows.detach().float()
    names = _check_query_ids(query_ids, queries)
    exponents = [0] * len(modules)
    plans = _plan(queries, names, mode, groups, modules, exponents, preconditioner)
    sinks = [_Sink(plan.to(rows.device), rows.shape[0], None) for plan in plans]
    kind = _NORM[mode]
    norms = _Norms(preconditioner, kind, exponents, rows.device) if kind else None
    block_rows = _block_rows(4 * rows.shape[1])
    for first_row in range(0, rows.shape[0], block_rows):
        part = rows[first_row : first_row + block_rows]
        block = _Block(first_row, part, None, None, [])
        if norms:
            block.norms, block.units = norms.compute(part, modules), norms.units
        for sink in sinks:
            sink.add(block, mode)
    ids = [str(i) for i in (range(rows.shape[0]) if row_ids is None else row_ids)]
    if len(ids) != rows.shape[0]:
        raise ValueError(f"row_ids: expected {rows.shape[0]}, got {len(ids)}")
    return _collect(sinks, mode, names, ids, preconditioner.dampings)


class _Norms:
    """Per row and module the norm |W g| of the row as it lies in the file, [R, M] float32.

    The row's own scale stays out, for it cancels in a normalised score, and a module's norms are in
    units of 2**units[m], so that they fit float32 whatever the size of the gradients. A norm fits
    where its square would not.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        kind: str,
        exponents: Sequence[int],
        device: torch.device,
        store: Store | None = None,
    ) -> None:
        self._preconditioner = preconditioner
        self._kind = kind
        self._device = device
        self._factors: list[Tensor] | None = None
        # W is divided by 2**unit; the file's module exponent is multiplied in afterwards
        self._factor_units = preconditioner.units(kind)
        self.units = [e + u for e, u in zip(exponents, self._factor_units, strict=True)]
        self._memory: dict[int, np.ndarray] = {}
        self._cache = None
        if store is not None:
            meta = {
                "quantity": {"sigma": "sqrt(sigma)", "theta": "|(H + lambda I)^-1 g|"}[kind],
                "unit_exponents": self.units,
                "curvature": preconditioner.kind,
                "dampings": preconditioner.dampings,
            }
            self._cache = store.self_influence_cache(f"{kind}-{preconditioner.key}", meta)
            self._missing = set(self._cache.missing())

    def load(self, shard: int) -> np.ndarray | None:
        """The norms [r, M] an earlier pass left for a shard."""
        assert self._cache is not None
        if shard in self._missing:
            return self._memory.get(shard)
        return self._cache.read(shard)

    def keep(self, shard: int, norms: np.ndarray) -> None:
        """Commit a shard's norms beside the store, or in memory where that cannot be written."""
        assert self._cache is not None
        if not self._memory:  # one refusal is enough
            try:
                self._cache.write(shard, norms)
                self._missing.remove(shard)
                return
            except (OSError, StoreError) as error:
                _warn_once(f"self-influence is not kept beside the store: {error}")
        self._memory[shard] = norms

    def compute(self, rows: Tensor, modules: Sequence[Module]) -> Tensor:
        """[R, M] for rows [R, D] as they lie in the file."""
        if self._factors is None:
            factors = self._preconditioner.scaled_factors(self._kind)
            self._factors = [factor.to(self._device) for factor in factors or []]
        out = torch.empty(rows.shape[0], len(modules), device=rows.device)
        for i, columns in enumerate(split_columns(rows, modules)):
            out[:, i] = _norm(columns, self._factors[i] if self._factors else None)
        return out


@dataclass
class _Block:
    first_row: int
    rows: Tensor  # [R, D], as in the file
    scale: Tensor | None  # [R], the pack's power of two
    norms: Tensor | None  # [R, M], in units of 2**units[m]
    units: list[int]


@dataclass
class _Plan:
    """Queries ready for the scan: inverse and module exponents folded in."""

    name: str
    members: list[int]  # module numbers
    columns: slice  # from the group's first to its last column; others inside it are zero
    queries: Tensor  # [Q, columns] float32, largest element of each in [0.5, 1) (not in "l2")
    exponents: Tensor  # [Q]: the true query is 2**exponent times that

    def to(self, device: torch.device) -> _Plan:
        return _Plan(
            self.name,
            self.members,
            self.columns,
            self.queries.to(device),
            self.exponents.to(device),
        )


class _Sink:
    """Where one group's scores go: the whole matrix, or a running top k."""

    def __init__(self, plan: _Plan, num_rows: int, k: int | None) -> None:
        self.plan = plan
        self.zero_rows: int | None = None
        self._k = k
        self._state: Any = None
        self._unit = 0  # row scales are 2**unit too large
        self._scores = torch.empty(plan.queries.shape[0], num_rows) if k is None else None

    def add(self, block: _Block, mode: str) -> None:
        scale, bias = self._row_scale(block, mode)
        rows = block.rows[:, self.plan.columns]
        if self._scores is None:
            assert self._k is not None
            self._state = ops.topk_scores(
                self.plan.queries, rows, self._k, scale, bias, self._state, block.first_row
            )
            return
        values = ops.scores(self.plan.queries, rows, scale, bias)  # [Q, R]
        values = self._true_scale(values)
        self._scores[:, block.first_row : block.first_row + rows.shape[0]] = values.cpu()

    def result(
        self, mode: str, query_ids: list[str], row_ids: Sequence[str], dampings: dict[str, float]
    ) -> InfluenceResult:
        result = InfluenceResult(mode, query_ids, row_ids, dampings, self.zero_rows, self._scores)
        if self._state is not None:
            top, top_rows, bottom, bottom_rows = self._state
            result.top_scores = self._true_scale(top).cpu()
            result.top_rows = top_rows.cpu()
            result.bottom_scores = self._true_scale(bottom).cpu()
            result.bottom_rows = bottom_rows.cpu()
        return result

    def _row_scale(self, block: _Block, mode: str) -> tuple[Tensor | None, Tensor | None]:
        """row_scale and row_bias of the scan, [R] float32 each."""
        if block.norms is None:
            return block.scale, None
        if mode == "l2":
            norm = _true_norm(block, self.plan.members)  # [R] float64
            self._count_zeros(norm)
            return block.scale, (-0.5 * norm.square()).float()
        # the scale of the pack is in the score and in the norm, and cancels
        self._unit = max(block.units[i] for i in self.plan.members)
        norm = _combine(block, self.plan.members, self._unit)
        self._count_zeros(norm)
        return torch.where(norm == 0, 0.0, 1 / norm).float(), None

    def _count_zeros(self, norm: Tensor) -> None:
        self.zero_rows = (self.zero_rows or 0) + int((norm == 0).sum())

    def _true_scale(self, values: Tensor) -> Tensor:
        return _scale_exponent(values, self.plan.exponents[:, None] - self._unit)


class _Ids(Sequence[str]):
    """Stored ids, read when asked for."""

    def __init__(self, ids: pa.Array | pa.ChunkedArray) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self._ids[index].to_pylist()
        return self._ids[index].as_py()


def _plan(
    queries: Tensor,
    names: list[str],
    mode: str,
    groups: Groups,
    modules: Sequence[Module],
    exponents: Sequence[int],
    preconditioner: Preconditioner,
) -> list[_Plan]:
    _check_rows("queries", queries, modules, names)
    raw = queries.detach().cpu().double()
    solved = preconditioner.precondition(raw)  # [Q, D]
    chosen = {TOTAL: list(range(len(modules))), **find_groups(groups, modules)}
    offsets = np.cumsum([0, *(module.size for module in modules)]).tolist()
    plans = []
    for name, members in chosen.items():
        columns = slice(offsets[members[0]], offsets[members[-1] + 1])
        folded = torch.zeros(raw.shape[0], columns.stop - columns.start, dtype=torch.float64)
        sigma = torch.zeros(raw.shape[0], dtype=torch.float64)  # [Q]
        for i in members:
            module = slice(offsets[i], offsets[i + 1])
            place = slice(module.start - columns.start, module.stop - columns.start)
            folded[:, place] = solved[:, module] * 2.0 ** exponents[i]
            sigma += (raw[:, module] * solved[:, module]).sum(dim=1)
        if mode == "whitened-cosine":
            folded *= torch.where(sigma > 0, sigma.clamp(min=0).rsqrt(), 0.0)[:, None]
        unit = torch.zeros(raw.shape[0], dtype=torch.int32)
        if mode != "l2":  # whose bias is one for all queries
            unit = torch.frexp(folded.abs().amax(dim=1)).exponent
            folded = torch.ldexp(folded, -unit[:, None])
        plans.append(_Plan(name, members, columns, folded.float(), unit))
    return plans


def _collect(
    sinks: list[_Sink],
    mode: str,
    query_ids: list[str],
    row_ids: Sequence[str],
    dampings: dict[str, float],
) -> InfluenceResult:
    total, *parts = [sink.result(mode, query_ids, row_ids, dampings) for sink in sinks]
    total.groups = {s.plan.name: part for s, part in zip(sinks[1:], parts, strict=True)}
    return total


def find_groups(groups: Groups, modules: Sequence[Module]) -> dict[str, list[int]]:
    """{group: module numbers}; a module belongs to a group if its name holds a substring."""
    if groups is None:
        return {}
    if isinstance(groups, str):
        raise TypeError(f"groups: expected a list or a mapping of substrings, got '{groups}'")
    named = groups if isinstance(groups, Mapping) else {part: [part] for part in groups}
    found = {}
    for name, parts in named.items():
        if name == TOTAL:
            raise ValueError(f"groups: the name '{TOTAL}' is taken by the sum over all modules")
        parts = [parts] if isinstance(parts, str) else list(parts)
        members = [i for i, m in enumerate(modules) if any(part in m.name for part in parts)]
        if not members:
            raise ValueError(
                f"groups: '{name}' ({', '.join(parts)}) matches none of the modules "
                f"{', '.join(m.name for m in modules)}"
            )
        found[name] = members
    return found


def _check_mode(mode: str) -> str:
    if mode == "cosine":
        _warn_once(
            "mode 'cosine' is LogIX's name for l-RelatIF: the score is divided by sqrt(sigma) of "
            "the training row only, and is no cosine; 'whitened-cosine' is one"
        )
        return "l-relatif"
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)} or cosine, got {mode!r}")
    return mode


def _check_query_ids(query_ids: Sequence[Any] | None, queries: Tensor) -> list[str]:
    if not isinstance(queries, Tensor):
        raise TypeError(f"queries: expected a tensor [Q, D], got {type(queries).__name__}")
    count = queries.shape[0] if queries.ndim else 0
    names = [str(name) for name in (range(count) if query_ids is None else query_ids)]
    if len(names) != count:
        raise ValueError(f"query_ids: expected {count}, one per query, got {len(names)}")
    return names


def _check_rows(
    argument: str, rows: Tensor, modules: Sequence[Module], names: list[str] | None
) -> None:
    dim = sum(module.size for module in modules)
    if rows.dtype not in (torch.float32, torch.float64):
        got = str(rows.dtype).removeprefix("torch.")
        raise TypeError(f"{argument}: expected float32, got {got}")
    if rows.ndim != 2 or rows.shape[1] != dim:
        letter = "Q" if argument == "queries" else "R"
        raise ValueError(f"{argument}: expected [{letter}, {dim}], got {list(rows.shape)}")
    finite = rows.isfinite()
    if not finite.all():
        row, column = (int(v) for v in (~finite).nonzero()[0])
        name = names[row] if names else str(row)
        raise ValueError(
            f"{argument}: '{name}' is not finite in module '{module_of(modules, column).name}'"
        )


def _norm(columns: Tensor, factor: Tensor | None) -> Tensor:
    """|W g| of g = columns [R, K], [R] float32; exact to rounding whatever the size of g."""
    if factor is not None and not factor.any():
        return torch.zeros(columns.shape[0], device=columns.device)
    square = _squares(columns, factor)
    norm = square.sqrt()
    odd = (~((square > SMALLEST_SQUARE) & (square < LARGEST_SQUARE))).nonzero()[:, 0]
    if odd.numel():
        part = columns[odd].float()  # [odd, K]
        largest = part.abs().amax(dim=1)
        part, odd, largest = part[largest > 0], odd[largest > 0], largest[largest > 0]
        unit = torch.frexp(largest).exponent
        part = _scale_exponent(part, -unit[:, None])
        norm[odd] = _scale_exponent(_squares(part, factor).sqrt(), unit)
    return norm


def _squares(columns: Tensor, factor: Tensor | None) -> Tensor:
    if factor is not None:
        return ops.self_influence(columns, factor)
    if not columns.shape[0]:
        return torch.zeros(0, device=columns.device)
    # halves added to halves: the same additions for a row whatever block or thread it is in
    squares = columns.float() * columns.float()
    while squares.shape[1] > 1:
        half = (squares.shape[1] + 1) // 2
        upper = squares[:, half:]
        squares = squares[:, :half].clone()
        squares[:, : upper.shape[1]] += upper
    return squares[:, 0]


def _combine(block: _Block, members: Sequence[int], unit: int) -> Tensor:
    """The norm over several modules, of the row as in the file, / 2**unit: [R] float64.

    Always added in the same order, so that the bits do not depend on the block.
    """
    assert block.norms is not None
    total = torch.zeros(len(block.norms), dtype=torch.float64, device=block.norms.device)
    for i in members:
        total += (block.norms[:, i].double() * 2.0 ** (block.units[i] - unit)).square()
    return total.sqrt()


def _true_norm(block: _Block, members: Sequence[int]) -> Tensor:
    """sqrt(sigma) over several modules, of the row itself: [R] float64."""
    norm = _combine(block, members, 0)
    return norm if block.scale is None else norm * block.scale.double()


def _scale_exponent(values: Tensor, exponent: Tensor | int) -> Tensor:
    """values * 2**exponent in two steps, each of which float32 can hold."""
    exponent = torch.as_tensor(exponent, device=values.device)
    half = torch.div(exponent, 2, rounding_mode="floor")
    for step in (half, exponent - half):
        values = values * torch.ldexp(torch.ones_like(step, dtype=torch.float32), step)
    return values


def _block_rows(row_bytes: int) -> int:
    rows = BLOCK_BYTES // row_bytes
    return max(SMALLEST_BLOCK_ROWS, min(LARGEST_BLOCK_ROWS, rows))


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
