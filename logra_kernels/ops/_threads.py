"""The number of threads that work of the calling thread takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch


def set_own_threads(count: int) -> None:
    """Let OpenMP's and MKL's work that this thread begins from now on take `count` threads.

    `torch.set_num_threads` does the same, and sets besides what every thread takes that uses torch
    for the first time later: what another thread happens to see would stay with it for good. A
    library therefore sets its own, and `torch.get_num_threads()` tells it what there was before.

    Where torch has neither OpenMP nor MKL, nothing is set.
    """
    torch.get_num_threads()  # a thread's first call sets its number: it must not come later
    for set_number in _setters():
        set_number(count)


@cache
def _setters() -> tuple[Callable[[int], object], ...]:
    """The functions of the libraries that torch has loaded."""
    loaded = ctypes.CDLL(torch._C.__file__)
    names = ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")
    return tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))
