"""Scores of rows in memory: of all at once, or of rows that a pass makes and lets go of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logra_kernels.attribution.influence_result import InfluenceResult
from logra_kernels.attribution.norms import NORM_OF_MODE, Norms, ShardNorms
from logra_kernels.attribution.pipeline import HostLanes
from logra_kernels.attribution.plan import (
    Groups,
    PreparedQueries,
    check_mode,
    check_rows,
    check_top_k,
    plan_scan,
)
from logra_kernels.attribution.reading import BLOCK_BYTES, Block, ShardRows, block_rows_of
from logra_kernels.attribution.sinks import FullMatrix, GroupScores, Sink, TokenShares, TopK
from logra_kernels.capture.short_examples import ShortExamples
from logra_kernels.curvature import Preconditioner
from logra_kernels.defaults import MATRIX_MODE
from logra_kernels.store.basis import Basis


class StreamedScores:
    """Scores of rows that come a batch at a time; no row is kept.

    The memory is that of the queries, of one batch, and of the result: [Q, N], or k of each end.

    Args:
        queries: [Q, D] float32 or float64, or what `PreparedQueries.of` made of them.
        preconditioner: (H + λI)⁻¹.
        mode, groups, query_ids: as in `Attributor.scores`.
        top_k: keep the k best and the k worst rows; None: all scores.
        ids: rows of other ids are left out; None: none are.
        tokens: keep of every row what its tokens add to its scores, [Q, T].
        device: where rows and queries meet.

    Raises:
        TypeError, ValueError: as `Attributor.scores` and `Attributor.top_k`; tokens in mode "l2",
            whose score is no sum over them.
    """

    def __init__(
        self,
        queries: Tensor | PreparedQueries,
        preconditioner: Preconditioner,
        mode: str = MATRIX_MODE,
        *,
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        top_k: int | None = None,
        ids: Collection[Any] | None = None,
        tokens: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        mode = check_mode(mode)
        if top_k is not None:
            check_top_k("top_k", top_k)
        if tokens and mode == "l2":
            raise ValueError("tokens: expected another mode than 'l2', which is no sum over them")
        self._preconditioner = preconditioner
        self._device = torch.device(device)
        self._top_k = top_k
        prepared = PreparedQueries.of(queries, query_ids, preconditioner)
        self._query_ids = prepared.names
        layout = preconditioner.layout
        exponents = [0] * len(layout)
        plans = plan_scan(prepared, mode, groups, Basis(layout), self._device)
        upload = HostLanes(self._device).upload
        self._sinks: list[GroupScores] = [
            FullMatrix(plan, upload) if top_k is None else TopK(plan, upload, top_k)
            for plan in plans
        ]
        # Of all modules; the queries are those that a capture of tokens takes.
        self._tokens = TokenShares(plans[0], upload) if tokens else None
        self.token_queries = plans[0].queries if tokens else None
        norm = NORM_OF_MODE[mode]
        self._norms = None if norm is None else Norms(preconditioner, norm, exponents, self._device)
        # {module name: tokens}: of rows of no more than these, `add` takes the tokens too.
        self.short_limits: dict[str, int] = {}
        if self._norms is not None:
            limits = [whitening.token_limit for whitening in self._norms.whitenings]
            each = zip(layout.names, limits, strict=True)
            self.short_limits = {name: limit for name, limit in each if limit}
        self._count = 0  # rows scored
        self._row_ids: dict[str, None] = {}  # in the order they came
        self._wanted = None if ids is None else {str(name) for name in ids}

    def add(
        self,
        row_ids: Sequence[Any],
        rows: Tensor,
        products: Tensor | None = None,
        short: ShortExamples | None = None,
        places: Sequence[int] = (),
    ) -> None:
        """Score finite rows [R, D] float32 or float64, used as float32.

        Args:
            row_ids: R different names.
            rows: [R, D].
            products: [Q, R, T] of `token_queries` and the rows' tokens, if `tokens` were asked for.
            short: a pass's examples of few tokens, by `short_limits`: their rows' norms are found
                in less time.
            places: the rows' places in that pass.

        Raises:
            ValueError: an id that was scored already.
        """
        names = [str(name) for name in row_ids]
        if self._wanted is not None:
            wanted = [n for n, name in enumerate(names) if name in self._wanted]
            names, rows = [names[n] for n in wanted], rows[wanted]
            products = None if products is None else products[:, wanted]
            places = [places[n] for n in wanted] if places else ()
        twice = next((name for name in names if name in self._row_ids), None)
        if twice is not None:
            raise ValueError(f"data_id: expected new ids, got {twice!r}, which was scored already")
        if self._tokens is not None:
            assert products is not None
            self._tokens.products = products
        self._score(rows, short, places)
        self._row_ids.update(dict.fromkeys(names))

    def result(self) -> InfluenceResult:
        """The scores of all rows so far; `top_k` of them, or as many as there are.

        Raises:
            ValueError: `ids` were given, and one did not come.
            RuntimeError: no row came.
        """
        missing = sorted((self._wanted or set()).difference(self._row_ids))
        if missing:
            raise ValueError(
                f"ids: {len(missing)} were not passed: {', '.join(missing[:8])}"
                f"{', …' if missing[8:] else ''}"
            )
        if not self._row_ids:
            raise RuntimeError("no example was scored: pass some inside the `with`")
        result = self._result(list(self._row_ids))
        result.token_scores = None if self._tokens is None else self._tokens.shares
        return result

    def _score(
        self, rows: Tensor, short: ShortExamples | None = None, places: Sequence[int] = ()
    ) -> None:
        """Score finite rows [R, D] whose names the caller knows."""
        shard = ShardRows(0, self._count, rows.shape[0])
        self._count += rows.shape[0]
        found = None if self._norms is None else self._norms.of_shard(shard)
        rows = rows.detach().to(self._device).float()
        sinks = [*self._sinks, *([self._tokens] if self._tokens else [])]
        step = block_rows_of(BLOCK_BYTES, 4 * rows.shape[1])
        for start in range(0, rows.shape[0], step):
            here = slice(start, start + step)
            block = shard.block(start, [rows[here]])
            if short is not None:
                block.short = partial(short.of, places=places[here])
            use(block, self._norms, found, sinks)

    def _result(self, row_ids: Sequence[str]) -> InfluenceResult:
        """The scores of all rows so far, under these names."""
        return result_of(self._sinks, self._query_ids, row_ids, self._preconditioner.dampings)


def influence_between(
    queries: Tensor,
    rows: Tensor,
    preconditioner: Preconditioner,
    mode: str = MATRIX_MODE,
    *,
    groups: Groups = None,
    query_ids: Sequence[Any] | None = None,
    row_ids: Sequence[Any] | None = None,
) -> InfluenceResult:
    """Scores [Q, R] float32 of rows in memory, without a store.

    Args:
        queries: [Q, D] float32 or float64.
        rows: [R, D] float32 or float64; used as float32, on the device they are on.
        preconditioner: what RawCurvature.damped gives, or an IdentityPreconditioner.
        mode, groups, query_ids: as in Attributor.scores.
        row_ids: names for the rows; their numbers by default.

    Raises:
        TypeError, ValueError: as Attributor.scores, or another number of row_ids than of rows.
    """
    check_rows("rows", rows, preconditioner.layout, None)
    count = rows.shape[0]
    names = [str(name) for name in (range(count) if row_ids is None else row_ids)]
    if len(names) != count:
        raise ValueError(f"row_ids: expected {count}, got {len(names)}")
    scores = StreamedScores(
        queries, preconditioner, mode, groups=groups, query_ids=query_ids, device=rows.device
    )
    scores._score(rows)
    return scores._result(names)


def use(block: Block, norms: Norms | None, found: ShardNorms | None, sinks: Sequence[Sink]) -> None:
    """Find the block's norms if they are not known, then give it to every sink."""
    if norms and found:
        norms.compute(block, found)
    for sink in sinks:
        sink.add(block, found)


def result_of(
    sinks: Sequence[GroupScores],
    query_ids: list[str],
    row_ids: Sequence[str],
    dampings: dict[str, float],
) -> InfluenceResult:
    """The result of all modules' sink, with the groups' after it."""
    total, *parts = (sink.result(query_ids, row_ids, dampings) for sink in sinks)
    total.groups = {s.plan.name: part for s, part in zip(sinks[1:], parts, strict=True)}
    return total
