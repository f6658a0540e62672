"""Rows by their numbers, for a second look at some of a store's rows: of a store, or computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.norms import Norms, ShardNorms
from logra_kernels.attribution.pipeline import HostLanes
from logra_kernels.attribution.plan import check_rows
from logra_kernels.attribution.reading import BLOCK_BYTES, Block, ShardRows, block_rows_of
from logra_kernels.attribution.sinks import GroupScores
from logra_kernels.attribution.streamed import use
from logra_kernels.curvature import Preconditioner
from logra_kernels.rows import elements, scanned
from logra_kernels.store import RowLayout, Store
from logra_kernels.store.basis import Basis

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


class StoredRows:
    """Rows of a store, as its own scan multiplies them: so their scores have the same bits."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store = store
        self._upload = HostLanes(device).upload
        self.basis = store.basis
        self.kind = store.dtype
        self.row_bytes: int | None = store.row_bytes

    def blocks(self, numbers: np.ndarray) -> Iterator[Block]:
        """As in FinerRows; a row is read from the disk once."""
        store, codec = self._store, self._store.codec
        widths = [file.shape[1] for file in store.shards[0].files]
        step = block_rows_of(BLOCK_BYTES, store.row_bytes)
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


class FinerNorms:
    """One kind of norm for rows by their numbers: those beside their store, where they are known.

    Args:
        preconditioner, norm, device: as in `Norms`.
        rows: the rows.
        store: which holds the rows; None for computed ones.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        norm: str,
        rows: FinerRows,
        device: torch.device,
        store: Store | None,
    ) -> None:
        self.computed = Norms(preconditioner, norm, rows.basis.exponents, device)
        self._stored: Norms | None = None
        if store is not None:
            self._stored = Norms(preconditioner, norm, store.module_exponents, device, store)
            self._stored.settle()

    def of(self, numbers: np.ndarray, rows: ShardRows) -> ShardNorms:
        """The norms of the rows `numbers`, ascending, or room for those that are not known."""
        found = None
        if self._stored is not None:
            self._stored.look_again()
            found = self._stored.of_rows(numbers, rows.row_scale)
        return self.computed.of_shard(rows) if found is None else found


def score_rows(
    rows: FinerRows,
    numbers: np.ndarray,
    norms: FinerNorms | None,
    sinks: Sequence[GroupScores],
) -> None:
    """Give every sink the rows `numbers`, ascending, under their places in `numbers`."""
    for block in rows.blocks(numbers):
        if norms is None:
            use(block, None, None, sinks)
            continue
        first = block.first_row
        found = norms.of(numbers[first : first + block.shard.num_rows], block.shard)
        use(block, norms.computed, found, sinks)
