"""Peak memory, sizes of folders, and a clock that waits for the device."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

SAMPLE_SECONDS = 0.005


class PeakMemory:
    """How far memory rose above what it was when this was made; for a process that does one thing.

    `anonymous` is what the process has allocated, sampled every 5 ms. `resident` is the kernel's
    own maximum; it counts the mapped pages of files too, which the kernel may drop at any time.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._before = _status_bytes()
        self._most = self._before["RssAnon"]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._on_device = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._on_device = torch.cuda.memory_allocated(self.device)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        """{"anonymous", "resident", "device"}: bytes above the start."""
        self._stop.set()
        self._thread.join()
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        on_device = 0
        if self.device.type == "cuda":
            on_device = torch.cuda.max_memory_allocated(self.device) - self._on_device
        return {
            "anonymous": self._most - self._before["RssAnon"],
            "resident": max(0, peak_bytes - self._before["VmRSS"]),
            "device": on_device,
        }

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._most = max(self._most, _status_bytes()["RssAnon"])


def _status_bytes() -> dict[str, int]:
    """RssAnon and VmRSS of /proc; 0 where there is no /proc."""
    found = {"RssAnon": 0, "VmRSS": 0}
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found


def now(device: str) -> float:
    """Seconds, after what the device was told to do is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def folder_bytes(path: Path) -> int:
    """The sizes of all files in a folder, or of one file."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextmanager
def timed(module: Any, name: str, device: str) -> Iterator[list[float]]:
    """Inside, calls of module.name are timed: a list that grows by their seconds."""
    seconds: list[float] = []
    function: Callable[..., Any] = getattr(module, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = now(device)
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(now(device) - start)

    with patch.object(module, name, wrapper):
        yield seconds
