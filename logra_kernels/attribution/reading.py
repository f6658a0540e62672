"""How a store's rows come to the device: the way, the size of blocks, the rows that stay there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logra_kernels.attribution.memory import SHARE_FOR_ROWS, available_bytes
from logra_kernels.attribution.pipeline import ALIGN_BYTES, HostLanes, Lanes, feed
from logra_kernels.capture.short_examples import ShortRows
from logra_kernels.rows import PlaneRows, elements, scanned, share
from logra_kernels.store import BlockReader, Store, huge_buffer

READINGS = ("auto", "mapped", "streamed", "resident")

# A block of this size takes longer than the call, and is still in cache for the scores after sigma.
BLOCK_BYTES = 32 << 20
SMALLEST_BLOCK_ROWS, LARGEST_BLOCK_ROWS = 256, 1 << 16
# Streamed blocks lie in buffers, four at a time.
STREAMED_BYTES, SMALLEST_STREAMED_ROWS = 8 << 20, 16
# Queries are packed for each block: with this many rows a query, packing is little of the work.
ROWS_PER_QUERY = 4


def in_module_columns(rows: Tensor | PlaneRows) -> Tensor:
    """Rows [R, D] that are in the modules' columns already."""
    assert isinstance(rows, Tensor)
    return rows


@dataclass
class ShardRows:
    """What the blocks of one shard have in common during a scan."""

    index: int
    first_row: int
    num_rows: int
    row_scale: np.ndarray | None = None  # [r] float32 powers of two; None: all are one
    # Stored rows, [R, W] for each file, and their exponents -> [R, D], for the scan.
    scanned: Callable[[Sequence[Tensor], Tensor | None], Tensor | PlaneRows] = lambda parts, _: (
        parts[0]
    )
    # Those -> [R, D] in the modules' columns, for norms.
    elements: Callable[[Tensor | PlaneRows], Tensor] = in_module_columns
    row_exponents: np.ndarray | None = None  # [r, M] int16; None: all are zero
    # [r, W] for each file, on the device, for rows that are to stay there
    held: list[Tensor] | None = None

    def block(
        self,
        start: int,
        parts: Sequence[Tensor],
        upload: Callable[[np.ndarray], Tensor] = share,
    ) -> Block:
        """Stored rows, [R, W] for each file, from `start` on; kept first, if they are to stay.

        `upload` brings a small array from the host to the device.
        """
        here = slice(start, start + parts[0].shape[0])
        if self.held is not None:
            kept = zip(self.held, parts, strict=True)
            parts = [room[here].copy_(part) for room, part in kept]
        own = None if self.row_exponents is None else upload(self.row_exponents[here])
        return Block(self, start, self.scanned(parts, own))


@dataclass
class Block:
    """Rows [start, start + R) of a shard, on the scan's device."""

    shard: ShardRows
    start: int
    # [R, D] or bit planes: the stored elements, times the powers of two of rows that have some
    rows: Tensor | PlaneRows
    # Module's name -> the tokens of some of the rows, where they are known.
    short: Callable[[str], ShortRows | None] = lambda name: None

    def some(self, start: int, stop: int) -> Tensor | PlaneRows:
        """Rows start … stop of the block."""
        if isinstance(self.rows, PlaneRows):
            planes = tuple(plane[start:stop] for plane in self.rows.planes)
            return self.rows._replace(planes=planes)
        return self.rows[start:stop]

    @property
    def here(self) -> slice:
        """The block's place in its shard."""
        return slice(self.start, self.start + self.rows.shape[0])

    @property
    def numbers(self) -> slice:
        """The store's numbers of the block's rows."""
        return slice(self.first_row, self.first_row + self.rows.shape[0])

    @property
    def first_row(self) -> int:
        """The store's number of the block's first row."""
        return self.shard.first_row + self.start

    @property
    def last(self) -> bool:
        """Whether the shard ends with the block."""
        return self.start + self.rows.shape[0] == self.shard.num_rows


class Reading:
    """The way to a store's rows. Every way and every size of block gives the same bits.

    Args:
        store: the store.
        device: where the rows are used.
        way: one of READINGS, as `Attributor` describes them.
        memory_bytes: what the rows may take, for "auto" and "resident"; None: most of what is left.
        block_rows: rows of a block; None: chosen by their bytes.

    Raises:
        ValueError: an unknown way, a number that does not go with it, or rows that do not fit.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        way: str = "auto",
        *,
        memory_bytes: int | None = None,
        block_rows: int | None = None,
    ) -> None:
        if block_rows is not None and block_rows < 1:
            raise ValueError(f"block_rows: expected at least 1, got {block_rows}")
        self._store = store
        self._device = device
        self._row_bytes = store.row_bytes
        self.way = self._choose(way, memory_bytes)
        on_gpu = device.type == "cuda"
        small = self.way == "streamed" and not on_gpu
        least = SMALLEST_STREAMED_ROWS if small or on_gpu else SMALLEST_BLOCK_ROWS
        num_bytes = STREAMED_BYTES if small else BLOCK_BYTES
        self.block_rows = block_rows or block_rows_of(num_bytes, self._row_bytes, least)
        # For many queries, blocks that were chosen small may grow up to this.
        self._most_rows = BLOCK_BYTES // self._row_bytes if small and not block_rows else 0
        self._held: dict[int, list[Tensor]] = {}  # shard -> [r, W] for each file, on the device

    def block_rows_for(self, num_queries: int) -> int:
        """Rows of a block for a scan with so many queries."""
        return max(self.block_rows, min(self._most_rows, ROWS_PER_QUERY * num_queries))

    def shard(self, index: int) -> ShardRows:
        """A shard's place in the store, its scales and exponents."""
        shard = self._store.shards[index]
        store = self._store
        rows = ShardRows(index, shard.first_row, shard.num_rows)
        rows.scanned = lambda parts, own: scanned(store.codec, parts, store.layout, own)
        rows.elements = lambda rows: elements(store, rows)
        if self._store.codec.scaled:
            streamed = self.way == "streamed"
            rows.row_scale = shard.read_row_scale() if streamed else shard.row_scale
            rows.row_exponents = shard.read_row_exponents() if streamed else shard.row_exponents
        return rows

    def open_shard(self, index: int) -> ShardRows:
        """A shard before the first of its blocks is used, with room for rows that stay."""
        rows = self.shard(index)
        if self.way == "resident" and index not in self._held:
            shard = self._store.shards[index]
            rows.held = [self._room(file.shape, file.dtype) for file in shard.files]
        return rows

    def close_shard(self, rows: ShardRows) -> None:
        """A shard after the last of its blocks was used: rows that stay are not read again."""
        if rows.held is not None:
            self._held[rows.index] = rows.held

    def feed(
        self,
        use: Callable[[int, int, Sequence[Tensor]], None],
        lanes: Lanes | HostLanes,
        shards: Sequence[int],
        block_rows: int,
    ) -> None:
        """use(shard, start, parts on the device) for each block: first of shards held there.

        Parts are the stored rows, [R, W] for each file.

        Raises:
            StoreFormatError, StoreError: a file was cut short, or cannot be read.
        """
        for index in shards:
            if index in self._held:
                held = self._held[index]
                for start in range(0, len(held[0]), block_rows):
                    use(index, start, [part[start : start + block_rows] for part in held])
        away = [index for index in shards if index not in self._held]
        if not away:
            return
        allocate = None if isinstance(lanes, HostLanes) else lanes.host_buffer
        with BlockReader(
            self._store,
            block_rows,
            shards=away,
            keep=self.way == "mapped",
            in_place=allocate is None and self.way == "mapped",
            allocate=allocate,
        ) as blocks:
            files = self._store.shards[away[0]].files
            num_bytes = block_rows * self._row_bytes + len(files) * ALIGN_BYTES
            feed(blocks, lanes, lambda at, parts: use(at.shard, at.start, parts), num_bytes)

    def _choose(self, way: str, memory_bytes: int | None) -> str:
        """The way that was asked for, or, for "auto", the one for which the memory is enough."""
        if way not in READINGS:
            raise ValueError(f"reading: expected one of {', '.join(READINGS)}, got {way!r}")
        if memory_bytes is not None and memory_bytes < 0:
            raise ValueError(f"memory_bytes: expected at least 0, got {memory_bytes}")
        if way in ("mapped", "streamed"):
            if memory_bytes is not None:
                raise ValueError(f"memory_bytes: expected none with reading='{way}', got one")
            return way
        needed = self._store.num_rows * self._row_bytes
        if memory_bytes is None:
            on_gpu = way == "resident" and self._device.type == "cuda"
            left = torch.cuda.mem_get_info(self._device)[0] if on_gpu else available_bytes()
            memory_bytes = int(SHARE_FOR_ROWS * left)
        if needed <= memory_bytes:
            return "mapped" if way == "auto" else "resident"
        if way == "resident":
            raise ValueError(
                f"reading: 'resident' needs {needed / 1e9:.2f} GB for the rows of "
                f"{self._store.path}, and may take {memory_bytes / 1e9:.2f} GB of the memory of "
                f"'{self._device}'; 'auto' streams what does not fit"
            )
        return "streamed"

    def _room(self, shape: tuple[int, int], dtype: np.dtype) -> Tensor:
        """Memory [r, W] for a resident shard as it is stored; on the CPU in huge pages."""
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=getattr(torch, dtype.name), device=self._device)
        return share(huge_buffer(shape[0] * shape[1] * dtype.itemsize).view(dtype).reshape(shape))


def block_rows_of(num_bytes: int, row_bytes: int, least: int = SMALLEST_BLOCK_ROWS) -> int:
    """Rows of a block of so many bytes, within bounds."""
    return max(least, min(LARGEST_BLOCK_ROWS, num_bytes // row_bytes))
