"""Peak memory, sizes of folders, and a clock that waits for the device.

Nothing here imports logra_kernels: an environment of other libraries may lack it.
"""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

SAMPLE_S = 0.005
KINDS = {"RssAnon": "anonymous", "RssFile": "mapped", "VmRSS": "resident"}


class PeakMemory:
    """How far the memory of this process rises above what it was when this was made.

    `anonymous` is what the process has allocated, `mapped` the pages of files that it maps, both
    sampled every 5 ms. `resident` is the system's own maximum of both since the process began.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._before = status_bytes()
        self._most = dict(self._before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._on_device = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._on_device = torch.cuda.memory_allocated(self.device)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        """{"anonymous", "mapped", "resident", "device"}: bytes above the start."""
        self._stop.set()
        self._thread.join()
        self._most["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        risen = {kind: max(0, most - self._before[kind]) for kind, most in self._most.items()}
        risen["device"] = 0
        if self.device.type == "cuda":
            risen["device"] = torch.cuda.max_memory_allocated(self.device) - self._on_device
        return risen

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            for kind, num_bytes in status_bytes().items():
                self._most[kind] = max(self._most[kind], num_bytes)


def status_bytes() -> dict[str, int]:
    """{"anonymous", "mapped", "resident"} of this process now; 0 where there is no /proc."""
    found = dict.fromkeys(KINDS.values(), 0)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if name in KINDS:
            found[KINDS[name]] = int(value.split()[0]) * 1024
    return found


def now(device: str) -> float:
    """Seconds, after the device has done what it was told to do."""
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
    """Inside, calls of module.name are timed: the list grows by their seconds."""
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
