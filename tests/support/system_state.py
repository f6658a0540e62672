"""What the system holds for a test: pages of files, open descriptors, threads."""

import os
import threading

from logra_kernels.store import Store
from logra_kernels.store.maps import cached_bytes


def evict(store: Store) -> int:
    """Drop the shards from the page cache; the bytes that stayed (a tmpfs keeps all)."""
    for shard in store.shards:
        shard.__dict__.pop("_rows", None)  # pages that a process has mapped stay
        descriptor = os.open(shard.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return sum(cached_bytes(shard.path) for shard in store.shards)


def left_behind() -> tuple[int, list[str]]:
    """The number of open descriptors, and the names of the package's threads."""
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("logra")]
    return len(os.listdir("/proc/self/fd")), names
