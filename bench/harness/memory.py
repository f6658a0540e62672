"""Memory of this process, sizes of folders, and a page cache that is empty or too small."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from logra_kernels.store import Store
from logra_kernels.store.maps import cached_bytes
from logra_kernels.store.reader import ShardFile

SAMPLE_S = 0.005
GROUPS = Path("/sys/fs/cgroup")


class PeakMemory:
    """How far this process's own memory rises above what it was when this was made.

    What it has allocated on the CPU, sampled every 5 ms; on a GPU, what torch has allocated there.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.before = self.most = self._now()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def stop(self) -> int:
        """Bytes above the start."""
        self.ended.set()
        self.thread.join()
        return (torch.cuda.max_memory_allocated() if self.on_gpu else self.most) - self.before

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else allocated_bytes()

    def _sample(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            self.most = max(self.most, self._now())


def allocated_bytes() -> int:
    """What this process has allocated, without the pages of files that it maps; 0 without /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def folder_bytes(path: Path) -> int:
    """The sizes of all files in a folder, or of one file."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def evict(store: Store) -> None:
    """Drop the shards from the page cache. Pages that this process has mapped would stay."""
    for file in _files(store):
        file.__dict__.pop("_rows", None)
        descriptor = os.open(file.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached(store: Store) -> int:
    """Bytes of the shards in the page cache."""
    return sum(cached_bytes(file.path) for file in _files(store))


def _files(store: Store) -> list[ShardFile]:
    """Every file of rows: codecs of bit planes have several for a shard."""
    return [file for shard in store.shards for file in shard.files]


@contextlib.contextmanager
def limited(num_bytes: int) -> Iterator[str]:
    """Put this process in a control group with `num_bytes` more memory than it has allocated.

    Pages that it reads through the page cache count, so a larger store is evicted as it is read.
    Gives the group's kind, or "no limit" where this process may not make a group.
    """
    most = num_bytes + allocated_bytes()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, name = (GROUPS, "memory.max") if controllers == "" else (
            GROUPS / "memory", "memory.limit_in_bytes"
        )  # fmt: skip
        folder = top / path.lstrip("/") / f"logra-bench-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / name).write_text(str(most))
            (folder / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            yield f"control group {'v1' if controllers else 'v2'}"
        finally:
            (folder.parent / "cgroup.procs").write_text(str(os.getpid()))
            with contextlib.suppress(OSError):
                folder.rmdir()
        return
    yield "no limit"
