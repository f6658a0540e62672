"""A page cache that is empty or too small, for benchmarks of what reads from a disk."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bench.harness.memory import status_bytes
from logra_kernels.store import Store
from logra_kernels.store.maps import cached_bytes

GROUPS = Path("/sys/fs/cgroup")


def evict(store: Store) -> None:
    """Drop the shards from the page cache. Pages that this process has mapped would stay."""
    for shard in store.shards:
        shard.__dict__.pop("_rows", None)
        descriptor = os.open(shard.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached(store: Store) -> int:
    """Bytes of the shards in the page cache."""
    return sum(cached_bytes(shard.path) for shard in store.shards)


@contextlib.contextmanager
def limited(num_bytes: int) -> Iterator[str | None]:
    """Put this process in a control group with `num_bytes` more memory than it has allocated.

    Pages that it reads through the page cache count, so a larger store is evicted as it is read.
    Gives the group's kind; None where this process may not make a group.
    """
    made = _group(num_bytes + status_bytes()["anonymous"])
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
