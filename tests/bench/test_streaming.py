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

from bench.harness.page_cache import cached, evict
from bench.paths import streaming


def test_the_rate_of_the_disk_is_that_of_all_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = wide_store(tmp_path / "s")
    evict(store)
    streaming.read_directly(store, 2, 8192)
    monkeypatch.setattr(os, "preadv", lambda *_: 1)
    with pytest.raises(AssertionError):
        streaming.read_directly(store, 2, 8192)


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
print(memory.stop()["anonymous"])
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
def test_a_wrong_answer_stops_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MODULES", streaming.MODULES[:2])
    monkeypatch.setattr(streaming, "SIZES", streaming.SIZES[:2])
    monkeypatch.setattr(streaming, "DIM", 512)
    store = streaming.make_store(tmp_path / "s", 2100)
    queries = {count: torch.randn(count, 512) / 512 / 64 for count in (1, 16)}
    calls = streaming.providers(store, queries)
    assert set(streaming.check(store, queries, calls)) == set(calls)
    wrong = {"logra streamed, Q=1": lambda: calls["logra streamed, Q=1"]() * 1.0001}
    with pytest.raises(AssertionError, match="other bits than the mapped way"):
        streaming.check(store, queries, wrong)
