"""Tells how far a long pass over rows has come: by a bar, by a callback, or not at all."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

# True draws a bar on stderr. A callback gets (rows done, rows in all). None and False: silence.
Progress = bool | Callable[[int, int], None] | None


def track(progress: Progress, total: int, label: str, unit: str = "row") -> Callable[[int], None]:
    """A function to call with the number of rows just done."""
    if callable(progress):
        callback, done = progress, 0

        def report(rows: int) -> None:
            nonlocal done
            done += rows
            callback(done, total)

        return report
    bar = tqdm(total=total, desc=label, unit=unit, disable=not progress, dynamic_ncols=True)

    def advance(rows: int) -> None:
        bar.update(rows)
        if bar.n >= total:
            bar.close()

    return advance
