"""A page cache that is too small, or empty: for benches of what reads from a disk."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from logra_kernels.store import Store
from logra_kernels.store.maps import cached_bytes

GROUPS = Path("/sys/fs/cgroup")


def evict(store: Store) -> None:
    """Drop the shards from the page cache; what this process has mapped would stay."""
    for shard in store.shards:
        shard.__dict__.pop("rows", None)
        descriptor = os.open(shard.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached(store: Store) -> int:
    """Bytes of the shards in the page cache."""
    return sum(cached_bytes(shard.path) for shard in store.shards)


@contextlib.contextmanager
def limited(num_bytes: int) -> Iterator[str | None]:
    """This process in a control group with so much memory beside what it has; None: not allowed.

    Pages that it reads through the page cache count, so a larger store is evicted as it is read.
    """
    made = _group(num_bytes + _resident("RssAnon"))
    if made is None:
        yield None
        return
    folder, name = made
    try:
        yield name
    finally:
        (folder.parent / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):
            folder.rmdir()


def _group(num_bytes: int) -> tuple[Path, str] | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, name = GROUPS, "memory.max", "control group v2"
        elif "memory" in controllers.split(","):
            top, limit, name = GROUPS / "memory", "memory.limit_in_bytes", "control group v1"
        else:
            continue
        folder = top / path.lstrip("/") / f"logra-bench-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(num_bytes))
            (folder / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            folder.rmdir()
            continue
        return folder, name
    return None


def growth(call: Callable[[], object]) -> tuple[int, int]:
    """Peak growth of anonymous memory and of mapped files' pages during a call, in bytes."""
    before = _resident("RssAnon"), _resident("RssFile")
    peak = list(before)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(2e-3):
            for i, key in enumerate(("RssAnon", "RssFile")):
                peak[i] = max(peak[i], _resident(key))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        over.set()
        watcher.join()
    return peak[0] - before[0], peak[1] - before[1]


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status: expected {key}, got none")
