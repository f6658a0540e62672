"""A store's rows in order, block by block, read before they are asked for.

Threads read a block while the caller works on those before it. A store that is to stay in memory
is read into the page cache, and its blocks are handed out mapped, without a copy. Blocks of another
come into a ring of buffers, around the page cache (O_DIRECT) unless they lie there already, so that
neither this process nor the page cache grows with the store. No map is read for them: a file that
is cut short meanwhile is an error, where a map would end the process.

Large requests are what makes a disk fast, and a request is as large as the memory behind it is
contiguous: the buffers lie in huge pages where the system has them (bench/NOTES.md).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from logra_kernels.store.errors import StoreError, StoreFormatError
from logra_kernels.store.files import DATA_OFFSET_BYTES, check_mapped, open_regular
from logra_kernels.store.maps import HUGE_PAGE_BYTES, huge_buffer, is_cached, populate
from logra_kernels.store.reader import ShardFile, Store, joined

READ_BYTES = 4 << 20  # one request of one thread
DIRECT_THREADS = 2
CACHED_THREADS = 1  # with two the system would not notice that the file is read in order
BLOCKS_AHEAD = 4  # buffers of the ring: one in use, the others read or being read
ALIGN_BYTES = 4096  # of O_DIRECT's addresses, offsets and lengths, on every disk in use

Allocate = Callable[[int], np.ndarray]

_DIRECT: int = getattr(os, "O_DIRECT", 0)


class RowBlock:
    """Rows [start, start + r) of a shard."""

    def __init__(
        self, shard: int, start: int, parts: Sequence[np.ndarray], free: Callable[[], None]
    ) -> None:
        self.shard = shard  # index in store.shards
        self.start = start
        # [r, W] for each file of stored rows, bit planes or all columns; valid until release()
        self.parts = parts
        self._free: Callable[[], None] | None = free

    @property
    def rows(self) -> np.ndarray:
        """[r, W], as stored; a copy if the rows lie in several files."""
        return joined(self.parts)

    def release(self) -> None:
        """Say that the rows are not used any more, so that their buffer may be filled again."""
        free, self._free = self._free, None
        if free is not None:
            free()


class BlockReader:
    """Reads a store's blocks in order; iterate over it once, inside a with block.

    Args:
        store: the store.
        block_rows: rows of a block; the last one of a shard may be shorter.
        shards: indices of the shards to read, ascending; all by default.
        keep: the store fits into memory: what is read stays in the page cache. Otherwise the
            pages that were not there before do not stay, and memory is bounded by the ring:
            `BLOCKS_AHEAD` times a block.
        in_place: with `keep`, hand out mapped memory. If not, every block comes in a buffer from
            `allocate`.
        allocate: memory for the ring, [n] uint8 aligned to 4,096 bytes; huge pages by default.

    At most `BLOCKS_AHEAD - 1` blocks may be held unreleased when the next one is asked for.

    Raises (while iterating):
        StoreFormatError: a file was removed or cut short meanwhile.
        StoreError: the system refuses to read a file.
    """

    def __init__(
        self,
        store: Store,
        block_rows: int,
        *,
        shards: Sequence[int] | None = None,
        keep: bool = False,
        in_place: bool = True,
        allocate: Allocate | None = None,
    ) -> None:
        if block_rows < 1:
            raise StoreError(f"block_rows: expected at least 1, got {block_rows}")
        self._store = store
        self._block_rows = block_rows
        self._shards = range(len(store.shards)) if shards is None else shards
        self._keep = keep
        self._in_place = in_place and keep
        self._allocate = allocate or huge_buffer
        self._free: list[np.ndarray] = []
        self._num_buffers = 0
        self._files: dict[int, list[_File]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the threads, close the files, let go of the buffers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        for index in list(self._files):
            self._close(index)
        self._free.clear()

    def __iter__(self) -> Iterator[RowBlock]:
        plan = deque(
            (index, start)
            for index in self._shards
            for start in range(0, self._store.shards[index].num_rows, self._block_rows)
        )
        ahead: deque[tuple[RowBlock, list[Future[None]]]] = deque()
        while plan or ahead:
            while plan and len(ahead) < BLOCKS_AHEAD and self._may_begin():
                ahead.append(self._begin(*plan.popleft()))
            if not ahead:
                raise RuntimeError(f"more than {BLOCKS_AHEAD - 1} blocks are held unreleased")
            block, reads = ahead.popleft()
            for read in reads:
                read.result()
            for file in self._files[block.shard]:
                file.check_size()
            if not plan or plan[0][0] != block.shard:
                self._close_behind(block.shard, ahead)
            yield block

    def _may_begin(self) -> bool:
        return bool(self._free) or self._num_buffers < BLOCKS_AHEAD

    def _begin(self, index: int, start: int) -> tuple[RowBlock, list[Future[None]]]:
        """A block, and the reads that must have ended before it is used."""
        shard = self._store.shards[index]
        here = slice(start, min(start + self._block_rows, shard.num_rows))
        if index not in self._files:
            self._files[index] = [_File(file, self._keep) for file in shard.files]
        files = self._files[index]
        if self._in_place:
            reads = [read for file in files for read in self._populate(file, here)]
            parts = [file.of.rows[here] for file in files]
            return RowBlock(index, start, parts, lambda: None), reads
        buffer, reads, parts, place = self._buffer(), [], [], 0
        for file in files:
            room = self._room(file.of.row_bytes)
            part, some = self._fill(file, here, buffer[place : place + room])
            parts.append(part)
            reads += some
            place += room
        return RowBlock(index, start, parts, lambda: self._free.append(buffer)), reads

    def _populate(self, file: _File, here: slice) -> list[Future[None]]:
        """The reads that bring a file's rows into the page cache."""
        first, last = here.start * file.of.row_bytes, here.stop * file.of.row_bytes
        file.check_size()
        whole = file.of.rows
        if file.tells_cached and is_cached(whole, first, last):
            return []
        return [self._submit(_populate, file, whole, *part) for part in _parts(first, last)]

    def _fill(
        self, file: _File, here: slice, buffer: np.ndarray
    ) -> tuple[np.ndarray, list[Future[None]]]:
        """A file's rows in an aligned buffer, and the reads that bring them there."""
        first, last = here.start * file.of.row_bytes, here.stop * file.of.row_bytes
        file.check_size()
        cached = file.tells_cached and is_cached(file.of.rows, first, last)
        # The file's offset and the buffer's are equal modulo a page: what O_DIRECT asks for.
        first, last = first + DATA_OFFSET_BYTES, last + DATA_OFFSET_BYTES
        base = first // ALIGN_BYTES * ALIGN_BYTES
        reads = [
            self._submit(file.read, buffer.data, base, *part, cached) for part in _parts(base, last)
        ]
        raw = buffer[first - base : last - base]
        return raw.view(file.of.dtype).reshape(-1, file.of.shape[1]), reads

    def _room(self, row_bytes: int) -> int:
        """The bytes of a buffer that a block of one file's rows may need."""
        return -(-self._block_rows * row_bytes // ALIGN_BYTES) * ALIGN_BYTES + 2 * ALIGN_BYTES

    def _buffer(self) -> np.ndarray:
        if self._free:
            return self._free.pop()
        self._num_buffers += 1
        files = self._store.shards[0].files
        return self._allocate(sum(self._room(file.row_bytes) for file in files))

    def _close_behind(self, index: int, ahead: deque[tuple[RowBlock, list[Future[None]]]]) -> None:
        if all(block.shard != index for block, _ in ahead):
            self._close(index)

    def _close(self, index: int) -> None:
        for file in self._files.pop(index):
            file.close()

    def _submit(self, work: Callable[..., None], *args: object) -> Future[None]:
        if self._pool is None:
            threads = DIRECT_THREADS if _DIRECT and not self._keep else CACHED_THREADS
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="logra-read")
        return self._pool.submit(work, *args)


class _File:
    """A shard's file, open for reading: around the page cache where that is possible."""

    def __init__(self, of: ShardFile, keep: bool) -> None:
        self.of = of
        self.path = of.path
        self._want_bytes = of.file_bytes
        self._keep = keep
        self._descriptor = self._open(0)
        # If the process may not write the file, the system says of every page that it is cached.
        owned = os.fstat(self._descriptor).st_uid == os.geteuid()
        self.tells_cached = owned or os.access(self.path, os.W_OK)
        self._streamed: list[tuple[int, int]] = []  # parts read through the page cache
        self._direct: int | None = None
        if _DIRECT and not keep:
            with contextlib.suppress(StoreError):  # tmpfs and others have no O_DIRECT
                self._direct = self._open(_DIRECT)

    def check_size(self) -> None:
        check_mapped(self.path, self._want_bytes, self._descriptor)

    def read(self, buffer: memoryview, base: int, first: int, last: int, cached: bool) -> None:
        """The file's bytes [first, last) to buffer[first - base:]; first is aligned."""
        length = -(-(last - first) // ALIGN_BYTES) * ALIGN_BYTES
        place = buffer[first - base : first - base + length]
        try:
            if self._direct is not None and not cached:
                try:
                    return self._fill(self._direct, place, first, last - first)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # EINVAL: no O_DIRECT here, read as usual
                        raise
            self._fill(self._descriptor, place, first, last - first)
            if not (self._keep or cached):
                self._streamed.append((first, last))
                self._forget(first, last)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _fill(self, descriptor: int, place: memoryview, offset: int, least: int) -> None:
        """Read until `least` bytes are there; more may lie behind the file's end."""
        got = 0
        while got < least:
            from_here = got // ALIGN_BYTES * ALIGN_BYTES
            read = os.preadv(descriptor, [place[from_here:]], offset + from_here)
            if from_here + read <= got:
                self.check_size()
                raise StoreError(f"{self.path}: cannot be read: nothing came at {offset + got}")
            got = from_here + read

    def _forget(self, first: int, last: int) -> None:
        """Drop [first, last) from the page cache, by whole huge pages: a part of one would stay."""
        if not hasattr(os, "posix_fadvise"):
            return
        first -= first % HUGE_PAGE_BYTES
        length = last - last % HUGE_PAGE_BYTES - first
        if last == self._want_bytes:
            length = 0  # to the end
        if length or last == self._want_bytes:
            os.posix_fadvise(self._descriptor, first, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for part in self._streamed:  # once more: the system may have read ahead into it
            self._forget(*part)
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def _open(self, flags: int) -> int:
        try:
            return open_regular(self.path, os.O_RDONLY | flags)
        except OSError as error:
            raise StoreFormatError(f"{self.path}: cannot be read: {error.strerror}") from None


def _parts(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, READ_BYTES):
        yield start, min(start + READ_BYTES, last)


def _populate(file: _File, rows: np.ndarray, first: int, last: int) -> None:
    """Read a part of a map into the page cache."""
    code = populate(rows, first, last)
    if code:
        file.check_size()
        raise StoreError(f"{file.path}: cannot be read: {os.strerror(code)}")
