"""The ops' quick tables under pytest-benchmark: pytest bench/test_ops.py --benchmark-save NAME

For comparing runs (--benchmark-compare). `python -m bench` takes providers in turns instead, which
is fairer where neighbours disturb. A provider that is wrong fails and is not timed.
"""

import importlib
import random
from typing import Any

import pytest
import torch

from bench.__main__ import PARTS

OPS = [part.module for part in PARTS if part.module.startswith("bench.ops.")]


@pytest.mark.parametrize("module", OPS)
@pytest.mark.parametrize("number", range(2))
def test_op(benchmark: Any, module: str, number: int) -> None:
    """Our kernel on the op's first two quick tables."""
    torch.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        case = list(importlib.import_module(module).cases(quick=True))[number]
        call = case.providers["logra"]
        error = case.error("logra", call())
        assert error <= case.allowed("logra"), f"logra is wrong by {error:.1e}"
        benchmark.group = f"{case.op}: {case.title}"
        benchmark.extra_info.update(error=error)
        benchmark(call)
