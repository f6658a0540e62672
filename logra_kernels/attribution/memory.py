"""How much memory is left for a store's rows: the machine's, and the control group's."""

from __future__ import annotations

import os
from pathlib import Path

# Of the memory left, the part that rows may take: the rest is the caller's.
SHARE_FOR_ROWS = 0.7


def available_bytes() -> int:
    """What could be taken without swapping: the page cache counts, for it gives way.

    The least of the machine's MemAvailable and of what each control group above this process has
    left of its limit (both versions).
    """
    return min([_machine(), *_groups()])


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # no Linux: all there is


def _groups(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """What the groups with a limit have left; a group that cannot be read sets none."""
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
        # In a container the path may be the host's: then only the mounted top is there.
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
