"""Blocks of a store, read ahead: the same rows whichever way, errors by name, nothing left."""

import errno
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import append, refused, wide_store, writer_of
from system_state import evict, left_behind

from logra_kernels.store import (
    BlockReader,
    Module,
    RowBlock,
    Store,
    StoreError,
    StoreFormatError,
    StoreWriter,
    codec_names,
    read_ahead,
)
from logra_kernels.store.files import DATA_OFFSET_BYTES
from logra_kernels.store.maps import cached_bytes
from logra_kernels.store.read_ahead import BLOCKS_AHEAD
from logra_kernels.store.reader import ShardFile


def all_rows(store: Store) -> np.ndarray:
    def whole(file: ShardFile) -> np.ndarray:
        return np.fromfile(file.path, file.dtype, offset=DATA_OFFSET_BYTES).reshape(file.shape)

    return np.concatenate([np.hstack([whole(f) for f in shard.files]) for shard in store.shards])


def read(store: Store, block_rows: int, **options: Any) -> np.ndarray:
    """Every row, copied out of its block; checks that blocks come in order, and where they lie."""
    parts, expected = [], []
    for index, shard in enumerate(store.shards):
        expected += [(index, start) for start in range(0, shard.num_rows, block_rows)]
    got = []
    with BlockReader(store, block_rows, **options) as blocks:
        for block in blocks:
            got.append((block.shard, block.start))
            parts.append(np.array(block.rows))
            block.release()
    assert got == expected
    return np.concatenate(parts)


def drain(blocks: Iterable[RowBlock], last: tuple[int, int]) -> None:
    """Go through the blocks, none of which may lie behind the last one named (shard, start)."""
    for block in blocks:
        assert (block.shard, block.start) <= last
        block.release()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return wide_store(tmp_path / "s")


WAYS = {
    "streamed": {},
    "kept": {"keep": True},
    "buffers": {"in_place": False},
    "kept in buffers": {"keep": True, "in_place": False},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", codec_names())
@pytest.mark.parametrize("cold", [True, False])
def test_every_way_gives_the_rows(tmp_path: Path, dtype: str, options: Any, cold: bool) -> None:
    store = wide_store(tmp_path / "s", dtype)
    want = all_rows(store)
    for block_rows in (1, 3, 7, 100):
        if cold:
            evict(store)
        assert np.array_equal(read(store, block_rows, **options), want)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_large_blocks_in_many_reads(
    tmp_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "READ_BYTES", 8192)
    for shard_rows in (4, 23):
        store = wide_store(tmp_path / f"s{shard_rows}", shard_rows=shard_rows)
        want = all_rows(store)
        for block_rows in (2, 5, 23):
            evict(store)
            assert np.array_equal(read(store, block_rows, **options), want)


def test_an_empty_store_and_some_shards_only(tmp_path: Path) -> None:
    with StoreWriter.create(tmp_path / "empty", modules=[Module("m", 1, 2)], dtype="float32"):
        pass
    with BlockReader(Store.open(tmp_path / "empty"), 4) as blocks:
        assert list(blocks) == []
    store = wide_store(tmp_path / "s")
    with BlockReader(store, 4, shards=[1, 3]) as blocks:
        seen = []
        for block in blocks:
            seen.append((block.shard, block.start))
            block.release()
    assert seen == [(1, 0), (1, 4), (3, 0)]
    refused("block_rows: expected at least 1, got 0", BlockReader, store, 0)


def test_streaming_leaves_the_page_cache_as_it_was(tmp_path: Path) -> None:
    store = wide_store(tmp_path / "s", dim=1 << 16, shard_rows=10)  # 3 MB
    if evict(store):
        pytest.skip("this file system keeps its files in memory")
    read(store, 4)
    assert sum(cached_bytes(shard.path) for shard in store.shards) == 0
    read(store, 4, keep=True)
    size = sum(shard.file_bytes for shard in store.shards)
    kept = sum(cached_bytes(shard.path) for shard in store.shards)
    assert kept >= size - 3 * 4096  # the headers
    read(store, 4)
    assert sum(cached_bytes(shard.path) for shard in store.shards) == kept


def test_without_direct_reads_the_page_cache_is_emptied_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_DIRECT", 0)
    store = wide_store(tmp_path / "s", dim=1 << 16, shard_rows=10)
    want = all_rows(store)
    left = []
    for _ in range(3):  # under load the system's own read-ahead may end after the file is closed
        if evict(store):
            pytest.skip("this file system keeps its files in memory")
        assert np.array_equal(read(store, 4), want)
        left.append(sum(cached_bytes(shard.path) for shard in store.shards))
    assert min(left) == 0


def refuse_direct_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)


def refuse_direct_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if oct(int(flags_of(descriptor), 8) & os.O_DIRECT)[2:] != "0":
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)


def flags_of(descriptor: int) -> str:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("flags"))


@pytest.mark.parametrize("refuse", [refuse_direct_open, refuse_direct_read])
def test_a_file_system_that_refuses_direct_reads(
    store: Store, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    want = all_rows(store)
    evict(store)
    refuse(monkeypatch)
    assert np.array_equal(read(store, 3, in_place=False), want)


def test_a_store_in_memory(tmp_path: Path) -> None:
    """tmpfs: O_DIRECT is refused, or taken and ignored; pages are always cached."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        store = wide_store(Path(name) / "s")
        want = all_rows(store)
        for options in WAYS.values():
            assert np.array_equal(read(store, 3, **options), want)


def test_short_reads_are_continued(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may give less than it was asked for, also in the middle of a page."""
    want = all_rows(store)
    evict(store)
    real = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        return real(descriptor, [buffer[: max(4096, len(buffer) // 8192 * 4096)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert np.array_equal(read(store, 5), want)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("cold", [True, False])
def test_a_file_cut_short_while_it_is_read(store: Store, options: Any, cold: bool) -> None:
    for shard in store.shards:
        _ = shard.rows  # mapped before it is cut
    if cold:
        evict(store)
    before = left_behind()
    last = store.shards[-1].path
    message = f"{last}: expected {last.stat().st_size} bytes, got 5000: the file was cut short"
    with BlockReader(store, 1, **options) as blocks:
        stream = iter(blocks)
        next(stream).release()
        os.truncate(last, 5000)
        with pytest.raises(StoreFormatError) as error:
            drain(stream, last=(len(store.shards) - 1, 0))
        assert message in str(error.value)
    assert left_behind() == before


@pytest.mark.parametrize("options", [{}, {"in_place": False}], ids=["in place", "buffers"])
def test_an_error_of_the_disk_is_raised_in_the_caller(
    store: Store, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    evict(store)
    if options == {} and evict(store):
        pytest.skip("this file system keeps its files in memory")
    before = left_behind()
    bad = store.shards[2].path
    real = os.preadv

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(bad):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    message = f"{bad}: cannot be read: Input/output error"
    with BlockReader(store, 3, **options) as blocks, pytest.raises(StoreError, match=message):
        drain(blocks, last=(1, 6))
    assert left_behind() == before


def test_a_file_that_is_gone(store: Store) -> None:
    bad = store.shards[1].path
    bad.unlink()
    message = f"{bad}: cannot be read: No such file"
    with BlockReader(store, 3) as blocks, pytest.raises(StoreFormatError, match=message):
        drain(blocks, last=(0, 6))


def test_an_interrupt_leaves_nothing_behind(store: Store) -> None:
    evict(store)
    before = left_behind()

    def interrupted() -> None:
        with BlockReader(store, 1, in_place=False) as blocks:
            for number, block in enumerate(blocks):
                if number == 5:
                    assert left_behind() != before
                    raise KeyboardInterrupt
                block.release()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert left_behind() == before


def test_blocks_are_read_before_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = wide_store(tmp_path / "s", shard_rows=23)
    evict(store)
    begun = threading.Semaphore(0)
    real = os.preadv

    def count(*args: Any) -> int:
        begun.release()
        return real(*args)

    monkeypatch.setattr(os, "preadv", count)
    with BlockReader(store, 1, in_place=False) as blocks:
        first = next(iter(blocks))
        for _ in range(BLOCKS_AHEAD):  # while the first block is in use
            assert begun.acquire(timeout=60)
        assert not begun.acquire(blocking=False)  # nor more than there are buffers
        first.release()


def test_a_buffer_in_use_is_not_filled_again(tmp_path: Path) -> None:
    store = wide_store(tmp_path / "s", shard_rows=23)
    want = all_rows(store)
    held = []
    with BlockReader(store, 1, in_place=False) as blocks:
        for block in blocks:
            held.append(block)
            if len(held) == BLOCKS_AHEAD:  # one less is held when the next is asked for
                old = held.pop(0)
                assert np.array_equal(old.rows[0], want[old.start])
                old.release()
                old.release()  # twice is once
    with BlockReader(store, 1, in_place=False) as blocks:
        stream = iter(blocks)
        keep = [next(stream) for _ in range(BLOCKS_AHEAD)]
        refused("more than 3 blocks are held unreleased", next, stream, error=RuntimeError)
        assert [block.start for block in keep] == [0, 1, 2, 3]


def test_a_file_of_someone_else_is_not_taken_for_cached(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that it may not write, a process is told that every page is in memory."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with BlockReader(store, 3) as blocks:
        for block in blocks:
            assert not np.shares_memory(block.rows, store.shards[block.shard].rows)
            block.release()


def test_blocks_of_a_store_that_is_kept_are_used_in_place(tmp_path: Path) -> None:
    with writer_of(tmp_path / "s") as writer:
        append(writer, list(range(8)))
    store = Store.open(tmp_path / "s")
    _ = all_rows(store)
    allocate: Any = pytest.fail  # never called
    with BlockReader(store, 3, keep=True, allocate=allocate) as blocks:
        for block in blocks:
            assert np.shares_memory(block.rows, store.shards[block.shard].rows)
            block.release()


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_more_shards_than_a_process_may_open_files(tmp_path: Path, options: Any) -> None:
    store = wide_store(tmp_path / "s", shard_rows=1, dim=8)  # 23 shards
    want = all_rows(store)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    try:
        # two descriptors a shard, for as many as are read ahead, and the file that is mapped
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2 * (BLOCKS_AHEAD + 2), before[1]))
        evict(store)
        assert np.array_equal(read(store, 1, **options), want)
        assert all(shard.rows.shape == (1, 8) for shard in store.shards)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
