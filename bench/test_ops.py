"""The ops' quick tables under pytest-benchmark: pytest bench/test_ops.py --benchmark-save NAME

For comparing runs (--benchmark-compare). `python -m bench` takes providers in turns instead, which
is fairer where neighbours disturb. A kernel that is wrong fails and is not timed.
"""

from itertools import islice
from typing import Any

import pytest
import torch

from bench.harness.cases import OURS, check, prepare
from bench.ops import TABLES


@pytest.mark.parametrize("op", TABLES)
@pytest.mark.parametrize("number", range(2))
def test_op(benchmark: Any, op: str, number: int) -> None:
    """Our kernel on the op's first two quick tables."""
    prepare()
    with torch.no_grad():
        case = next(islice(TABLES[op](True), number, None))
        case.providers = {OURS: case.providers[OURS]}
        _, left_out = check(case)
        assert not left_out
        benchmark.group = f"{case.op}: {case.title}"
        benchmark(case.providers[OURS])
