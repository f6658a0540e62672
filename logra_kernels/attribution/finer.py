"""Rows by their numbers, for a second look at some of a store's rows: of a store, or computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.norms import NORM_OF_MODE, Norms
from logra_kernels.attribution.pipeline import HostLanes
from logra_kernels.attribution.plan import check_rows
from logra_kernels.attribution.reading import BLOCK_BYTES, Block, ShardRows, block_rows_of
from logra_kernels.attribution.sinks import GroupScores
from logra_kernels.attribution.streamed import use
from logra_kernels.curvature import Preconditioner
from logra_kernels.rows import scanned
from logra_kernels.store import RowLayout, Store

ComputeRows = Callable[[np.ndarray], Tensor]  # numbers [n] int64, ascending -> rows [n, D] float32


class FinerRows(Protocol):
    """Where rows come from by their numbers."""

    exponents: list[int]
    """One per module; a true gradient is 2**exponent times what blocks hold."""
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
        self.exponents = store.module_exponents
        self.kind = store.dtype
        self.row_bytes: int | None = store.row_bytes

    def blocks(self, numbers: np.ndarray) -> Iterator[Block]:
        """As in FinerRows; a row is read from the disk once."""
        codec, layout = self._store.codec, self._store.layout
        step = block_rows_of(BLOCK_BYTES, self._store.row_bytes)
        for start in range(0, len(numbers), step):
            stored, scale, own = self._store.gather(numbers[start : start + step])
            shard = ShardRows(
                0,
                start,
                len(stored),
                scale if codec.scaled else None,
                lambda rows, exponents: scanned(codec, rows, layout, exponents),
                own,
            )
            yield shard.block(0, self._upload(stored), self._upload)


class ComputedRows:
    """Rows that a function gives, such as gradients that the model makes again."""

    def __init__(self, compute: ComputeRows, layout: RowLayout, device: torch.device) -> None:
        self._compute = compute
        self._layout = layout
        self._device = device
        self.exponents = [0] * len(layout)
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
            yield shard.block(0, rows.detach().float().to(self._device))


def score_rows(
    rows: FinerRows,
    numbers: np.ndarray,
    preconditioner: Preconditioner,
    sinks: Sequence[GroupScores],
    device: torch.device,
) -> None:
    """Give every sink the rows `numbers`, ascending, under their places in `numbers`."""
    norm = NORM_OF_MODE[sinks[0].plan.mode]
    norms = None if norm is None else Norms(preconditioner, norm, rows.exponents, device)
    for block in rows.blocks(numbers):
        found = None if norms is None else norms.of_shard(block.shard)
        use(block, norms, found, sinks)
