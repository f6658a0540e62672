"""The bench of codecs from disk, and of scans beside other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from bench.paths import compressed, streaming
from bench.peers import codecs as beside_peers
from logra_kernels.attribution import Attributor, compress_store


@pytest.mark.filterwarnings("ignore:the curvature is of 2048 rows")
def test_repeated_rows_keep_their_norms_and_scores(tmp_path: Path) -> None:
    few = streaming.make_store(tmp_path / "few", 2048, 4)
    Attributor(few).self_influence()
    made = compress_store(few, tmp_path / "int4", "int4", whiten=False)
    queries = torch.randn(2, few.dim)
    for store in (few, made):
        many = compressed.repeated(store, tmp_path / f"many {store.dtype}", 3)
        once = Attributor(store).scores(queries, "l-relatif").scores
        found = Attributor(many).scores(queries, "l-relatif").scores
        torch.testing.assert_close(found, once.repeat(1, 3), rtol=1e-6, atol=0)
        products = Attributor(store).scores(queries, "dot").scores
        found = Attributor(many).scores(queries, "dot").scores
        scales = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(2048)
        torch.testing.assert_close(found, products.repeat(1, 3) * scales, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:the curvature is of 2048 rows")
def test_every_way_from_disk_is_checked_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"MODULES": 4, "DIM": 1024}.items():
        monkeypatch.setattr(compressed, name, value)
    gib = 2 * 2048 * 2 * 1024 / 2**30
    args = argparse.Namespace(gib=gib, quick=True, folder=tmp_path, rounds=1)
    records = list(compressed.from_disk(args))
    if "nothing to measure" in capsys.readouterr().out:
        pytest.skip("this file system keeps its files in memory")
    assert len(records) == 12
    assert {record["N"] for record in records} == {4096}


def test_our_scans_beside_peers_find_the_best() -> None:
    data, queries = torch.randn(300, 512), torch.randn(8, 512)
    args = argparse.Namespace(rounds=1, quick=True)
    records = beside_peers.compared(data, queries, args)
    recall = {str(record["rows in"]): record["recall@20"] for record in records}
    assert recall["logra float16"] > 0.97
    assert recall["logra int8"] > 0.95
    assert recall["logra int4"] > recall["logra int2"] > recall["logra sign"] > 0.3
