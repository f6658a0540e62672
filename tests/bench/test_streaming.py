"""The bench of streaming: its disk rate is that of all bytes, and its memory is seen."""

import numpy as np
import pytest
import torch
from test_read_ahead import wide_store

from bench import _page_cache, bench_streaming
from bench._page_cache import cached, evict, growth


def test_the_rate_of_the_disk_is_that_of_all_bytes(tmp_path, monkeypatch):
    store = wide_store(tmp_path / "s")
    evict(store)
    bench_streaming.read_directly(store, 2, 8192)
    monkeypatch.setattr(bench_streaming.os, "preadv", lambda *_: 1)
    with pytest.raises(AssertionError):
        bench_streaming.read_directly(store, 2, 8192)


def test_pages_are_evicted_and_counted(tmp_path):
    store = wide_store(tmp_path / "s", dim=1 << 16, shard_rows=10)
    evict(store)
    if cached(store):
        pytest.skip("this file system keeps its files in memory")
    for shard in store.shards:
        assert np.isfinite(shard.rows).all()
    assert cached(store) >= 23 * (1 << 17)
    evict(store)
    assert cached(store) == 0


def test_growth_sees_what_a_call_takes():
    def take() -> None:
        _page_cache.threading.Event().wait(0.05)
        held = np.ones(64 << 20, np.uint8)
        _page_cache.threading.Event().wait(0.2)
        assert held[0]

    anonymous, _ = growth(take)
    assert 60 << 20 <= anonymous <= 100 << 20


@pytest.mark.filterwarnings("ignore:the curvature is of 2048 rows")
def test_a_wrong_answer_stops_the_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_streaming, "MODULES", bench_streaming.MODULES[:2])
    monkeypatch.setattr(bench_streaming, "SIZES", bench_streaming.SIZES[:2])
    monkeypatch.setattr(bench_streaming, "DIM", 512)
    store = bench_streaming.make_store(tmp_path / "s", 2100)
    queries = {count: torch.randn(count, 512) / 512 / 64 for count in (1, 16)}
    calls = bench_streaming.providers(store, queries)
    assert set(bench_streaming.check(store, queries, calls)) == set(calls)
    wrong = {"logra streamed, Q=1": lambda: calls["logra streamed, Q=1"]() * 1.0001}
    with pytest.raises(AssertionError, match="other bits than the mapped way"):
        bench_streaming.check(store, queries, wrong)
