"""Tests of the GPU kernels: on the GPU if there is one, else under Triton's interpreter.

The interpreter is chosen when a kernel is decorated, so it needs a process of its own: without a
GPU `tests/triton/test_triton_interpreter.py` runs this folder again with TRITON_INTERPRET=1.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

collect_ignore_glob = (
    ["test_*.py"]
    if importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available())
    else []
)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """What a test makes is where the kernels run."""
    with torch.device("cpu" if INTERPRETED else "cuda"):
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a launcher allocates holds NaN, or a large integer."""
    empty: Callable[..., torch.Tensor] = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max - 1)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
