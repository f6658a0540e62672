"""The bench of streaming: its disk rate is that of all bytes, and its memory is seen."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from store_samples import wide_store
from tree import environment

from bench.harness.cases import check
from bench.harness.memory import cached, evict
from bench.paths import streaming


def test_pages_are_evicted_and_counted(tmp_path: Path) -> None:
    store = wide_store(tmp_path / "s", dim=1 << 16, shard_rows=10)
    evict(store)
    if cached(store):
        pytest.skip("this file system keeps its files in memory")
    for shard in store.shards:
        assert np.isfinite(shard.rows).all()
    assert cached(store) >= 23 * (1 << 17)
    evict(store)
    assert cached(store) == 0


def test_peak_memory_sees_what_was_freed() -> None:
    """In a process of its own, in which nothing that earlier tests held is let go meanwhile."""
    program = """
import time
import numpy as np
from bench.harness.memory import PeakMemory
memory = PeakMemory()
held = np.ones(64 << 20, np.uint8)
time.sleep(0.2)  # some samples
del held
print(memory.stop())
"""
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert 60 << 20 <= int(told.stdout) <= 100 << 20


@pytest.mark.filterwarnings("ignore:the curvature is of 2048 rows")
def test_a_wrong_answer_and_a_short_read_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = streaming.make_store(tmp_path / "s", 2100, num_modules=2)
    case = streaming.from_disk(store, torch.randn(16, store.dim))
    assert check(case)[1] == {}
    case.providers = {n: call for n, call in case.providers.items() if n.startswith("disk")}
    reads = set(case.providers)
    case.providers["logra streamed"] = lambda: case.expected * (1 + 2.0**-20)  # other bits
    monkeypatch.setattr(os, "preadv", lambda *_: 1)
    assert set(check(case)[1]) == {"logra streamed", *reads}
