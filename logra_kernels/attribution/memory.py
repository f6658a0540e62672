"""How much memory is left for a store's rows, and how much this process has taken."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

# The part of the memory left that rows may take; the rest is for the caller.
SHARE_FOR_ROWS = 0.7


def available_bytes() -> int:
    """Memory that this process could take without swapping; the page cache counts as free.

    It is the least of the machine's MemAvailable and of what each control group (version 1 or 2)
    above this process has left of its limit.
    """
    return min([_machine(), *_groups()])


def peak_bytes() -> int:
    """The most memory that this process has had, pages of mapped files included."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def forget_peak() -> None:
    """Let `peak_bytes` begin anew from what is taken now; nothing happens where it cannot."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: all of it


def _groups(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """What each group with a limit has left; a group that cannot be read counts as without one."""
    left = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        parts = Path(path).parts[1:]
        # In a container the path may be the host's, of which only the top is mounted.
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            try:
                most = int((folder / limit).read_text())  # "max" is no number: no limit
                used = int((folder / usage).read_text())
                stat = dict(
                    row.split() for row in (folder / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):
                continue
            cache = sum(int(stat.get(f"{prefix}{key}_file", 0)) for key in ("active", "inactive"))
            left.append(max(0, most - used + cache))
    return left
