"""Rows by their numbers, for a second look at some of a store's rows: of a store, or computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.attributor import Attributor
from logra_kernels.attribution.norms import NORM_OF_MODE, Norms, ShardNorms
from logra_kernels.attribution.pipeline import HostLanes
from logra_kernels.attribution.plan import Plan, check_rows
from logra_kernels.attribution.reading import BLOCK_BYTES, Block, ShardRows, block_rows_of
from logra_kernels.attribution.sinks import GroupScores
from logra_kernels.attribution.streamed import use
from logra_kernels.curvature import Preconditioner
from logra_kernels.rows import elements, scanned
from logra_kernels.store import RowLayout
from logra_kernels.store.basis import Basis

# Of a block: it stays in cache between reading and scoring, and its memory is used again.
GATHERED_BYTES = 4 << 20

ComputeRows = Callable[[np.ndarray], Tensor]  # numbers [n] int64, ascending -> rows [n, D] float32


class FinerRows(Protocol):
    """Where rows come from by their numbers."""

    basis: Basis
    """In which blocks hold the rows."""
    kind: str
    """What they are, in a word."""
    row_bytes: int | None
    """What is read for a row; None where nothing is."""

    def blocks(self, numbers: np.ndarray) -> Iterator[Block]:
        """The rows `numbers` [n] int64, ascending; a block's first row is its place in them."""

    def known_norms(self, numbers: np.ndarray, plan: Plan) -> ShardNorms | None:
        """What the plan's mode divides the rows `numbers` by; None where it is to be computed."""


class StoredRows:
    """Rows of a store, as its own scan multiplies them: so their scores have the same bits."""

    def __init__(self, scan: Attributor) -> None:
        self._scan, self._store = scan, scan.store
        store = scan.store
        self._upload = HostLanes(scan.device).upload
        self._starts = np.array([shard.first_row for shard in store.shards])
        self.basis = store.basis
        self.kind = store.dtype
        self.row_bytes: int | None = store.row_bytes

    def blocks(self, numbers: np.ndarray) -> Iterator[Block]:
        """As in FinerRows; a row is read from the disk once."""
        store, codec = self._store, self._store.codec
        widths = [file.shape[1] for file in store.shards[0].files]
        step = block_rows_of(GATHERED_BYTES, store.row_bytes)
        for start in range(0, len(numbers), step):
            stored, scale, own = store.gather(numbers[start : start + step])
            shard = ShardRows(
                0,
                start,
                len(stored),
                scale if codec.scaled else None,
                lambda parts, exponents: scanned(codec, parts, store.layout, exponents),
                lambda rows: elements(store, rows),
                own,
            )
            parts = np.split(stored, np.cumsum(widths)[:-1], axis=1)
            yield shard.block(0, [self._upload(part) for part in parts], self._upload)

    def known_norms(self, numbers: np.ndarray, plan: Plan) -> ShardNorms | None:
        """As in FinerRows: those that the store's scans divide by."""
        norm = NORM_OF_MODE[plan.mode]
        if norm is None:
            return None
        of_shard = np.searchsorted(self._starts, numbers, side="right") - 1
        shards = [
            (self._scan.shard_rows(index), numbers[of_shard == index] - self._starts[index])
            for index in np.unique(of_shard).tolist()
        ]
        norms = self._scan.norms_of(norm)
        return norms.of_rows(shards, plan.members, bias=plan.mode == "l2")


class ComputedRows:
    """Rows that a function gives, such as gradients that the model makes again."""

    def __init__(self, compute: ComputeRows, layout: RowLayout, device: torch.device) -> None:
        self._compute = compute
        self._layout = layout
        self._device = device
        self.basis = Basis(layout)
        self.kind = "computed"
        self.row_bytes: int | None = None

    def blocks(self, numbers: np.ndarray) -> Iterator[Block]:
        """As in FinerRows.

        Raises:
            TypeError, ValueError: the function gave no finite rows [n, D].
        """
        step = block_rows_of(BLOCK_BYTES, 4 * self._layout.dim)
        for start in range(0, len(numbers), step):
            some = numbers[start : start + step]
            rows = self._compute(some)
            check_rows("rerank", rows, self._layout, [str(number) for number in some])
            if len(rows) != len(some):
                raise ValueError(f"rerank: expected {len(some)} rows, got {len(rows)}")
            shard = ShardRows(0, start, len(rows))
            yield shard.block(0, [rows.detach().float().to(self._device)])

    def known_norms(self, numbers: np.ndarray, plan: Plan) -> ShardNorms | None:
        """As in FinerRows: none are."""
        return None


def score_rows(
    rows: FinerRows,
    numbers: np.ndarray,
    preconditioner: Preconditioner,
    sinks: Sequence[GroupScores],
    device: torch.device,
) -> None:
    """Give every sink the rows `numbers`, ascending, under their places in `numbers`."""
    plan = sinks[0].plan
    norm, norms = NORM_OF_MODE[plan.mode], None
    for block in rows.blocks(numbers):
        found = rows.known_norms(numbers[block.numbers], plan)
        if found is None and norm is not None:
            norms = norms or Norms(preconditioner, norm, rows.basis.exponents, device)
            found = norms.of_shard(block.shard)
        use(block, norms, found, sinks)
