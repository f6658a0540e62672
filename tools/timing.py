# mypy: allow-untyped-calls
# torch's CUDA events have no types.
"""How long a call takes on a GPU."""

import statistics
from collections.abc import Callable
from typing import Any

import torch


class Timer:
    """Medians of CUDA events, with cold caches. The tests put another timer in its place."""

    def __init__(self, repeats: int = 20) -> None:
        self.repeats = repeats
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def median_s(self, call: Callable[[], Any]) -> float:
        """The median of the call's seconds on the GPU, its inputs out of the L2 cache."""
        for _ in range(3):
            call()
        events = []
        for _ in range(self.repeats):
            self.flush.zero_()  # leaves nothing of the inputs in the L2 cache
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return float(statistics.median(s.elapsed_time(e) for s, e in events)) / 1e3
