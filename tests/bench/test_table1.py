"""Table 1: our half on a toy model, the arithmetic of the table, and kronfluence's where it is."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the bench's models are Hugging Face's")

from bench.harness import results
from bench.harness.memory import folder_bytes
from bench.table1 import __main__ as command
from bench.table1 import check, ekfac, logra
from bench.table1 import setting as given
from bench.table1.setting import Setting, windows
from logra_kernels.attribution import Attributor

NUM_TRAIN, NUM_QUERIES, LENGTH = 12, 4, 8
EKFAC, LOGRA = command.EKFAC, command.LOGRA


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("table1")
    model = given.random_llama(folder / "model", width=16, inner=24, blocks=2)
    tokens = windows(None, model, NUM_TRAIN + NUM_QUERIES, LENGTH)
    return Setting(model, tokens, NUM_TRAIN, given.module_names(model))


def test_what_is_watched_and_what_is_a_query(setting: Setting) -> None:
    assert len(setting.modules) == 6
    assert setting.train.shape == (NUM_TRAIN, LENGTH)
    assert setting.queries.shape == (NUM_QUERIES, LENGTH)
    assert f"{6 * 16 * 24 / 1e6:.1f}M in 6 watched layers, 12 examples of 8" in setting.title


def test_windows_are_the_text(setting: Setting, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(40)))
    assert torch.equal(windows(text, setting.model, 4, 10), torch.arange(40).reshape(4, 10))
    with pytest.raises(ValueError, match="expected 5 windows of 10 tokens, got 4"):
        windows(text, setting.model, 5, 10)


def test_windows_of_a_tokenizer(tmp_path: Path) -> None:
    from tiny_lm import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "abcdef"}\n{"text": "ghijkl"}\n')
    found = windows(tmp_path / "text.jsonl", tmp_path, 3, 4)
    tokens = make_tokenizer()("abcdefghijkl", add_special_tokens=False)["input_ids"]
    assert found.flatten().tolist() == tokens


def test_our_half(setting: Setting, tmp_path: Path) -> None:
    store, large = tmp_path / "toy", tmp_path / "large"
    logged = logra.log(setting, store, rank=4, batch=5)
    # rows of fp16 after a header of 4,096 bytes, and what the store keeps beside them
    assert logged["storage_bytes"] == folder_bytes(store) >= 4096 + NUM_TRAIN * 96 * 2
    assert logra.enlarge(store, large, 100 * 96 * 2) == 108  # whole copies of 12 rows
    measured = logra.query(setting, store, large, 3, 2, 3)  # checks the scores itself
    assert measured["num_train"] == 108
    assert measured["query_s"] > 0
    assert measured["once_s"] > 0


def test_scan_that_is_wrong_is_not_timed(setting: Setting, tmp_path: Path) -> None:
    logra.log(setting, tmp_path / "toy", rank=4, batch=4)
    known = Attributor(tmp_path / "toy")
    queries = torch.randn(2, known.store.dim, generator=torch.Generator().manual_seed(0))
    scores = known.scores(queries, "dot").scores
    assert scores is not None
    repeated = scores.repeat(1, 3)
    logra.check_scores(known, queries, repeated)
    repeated[1, -1] += 1e-3 * scores.abs().max()
    with pytest.raises(RuntimeError, match=r"scan: off by 1\.0e-03 of the largest score"):
        logra.check_scores(known, queries, repeated)


def test_whole_gradients_are_autograd_s(setting: Setting, tmp_path: Path) -> None:
    ours = check.our_scores(setting, tmp_path)
    assert check.compare(ours, None)["ours - autograd"] <= check.TOLERANCE
    ours["whole, none"] = ours["whole, none"] * (1 + 3 * check.TOLERANCE)
    with pytest.raises(RuntimeError, match="ours - autograd: plain products"):
        check.compare(ours, None)


def test_kronfluence_that_differs_is_refused() -> None:
    scores = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    names = ("autograd", "whole, none", "whole, raw", "projected, raw")
    ours = dict.fromkeys(names, scores)
    found = check.compare(ours, {"identity": scores, "ekfac": -scores})
    assert found["rank correlation of EKFAC and whole, none"] == pytest.approx(-1)
    with pytest.raises(RuntimeError, match="kronfluence - autograd"):
        check.compare(ours, {"identity": scores + 1, "ekfac": scores})


def test_rank_correlation() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    b = torch.tensor([[10.0, 20.0, 30.0, 40.0], [4.0, 3.0, 2.0, 1.0]])
    assert check.rank_correlation(a, a) == pytest.approx(1)
    assert check.rank_correlation(a, b) == pytest.approx(0)  # +1 and -1
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 0, 1, -1
    c = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    assert check.rank_correlation(a[:1], c) == pytest.approx(0.8)


def test_pairs_per_second() -> None:
    found = command.pairs({"num_train": 50, "train_s": 2.0, "query_s": 6.0, "memory_bytes": 0}, 4)
    assert found["pairs_per_s"] == 100
    # 10^6 examples take 40,000 s, the queries 6 s however many the examples are
    assert found["with_queries"] == pytest.approx(4e6 / 40_006)


def influence(
    system: str, variant: str, test_batch: int, pairs: float, whole: float
) -> dict[str, Any]:
    row = {"system": system, "variant": variant, "train_batch": 16, "test_batch": test_batch}
    return {**row, "pairs_per_s": pairs, "with_queries": whole}


def test_ratios_and_what_falls_short() -> None:
    rows = [
        influence(EKFAC, "fp32", 4, 50.0, 40.0),
        influence(EKFAC, "fp32", 64, 800.0, 700.0),
        influence(EKFAC, "bf16", 64, 1000.0, 500.0),
        influence(LOGRA, "rank 16", 4, 1e6, 8e5),
        influence(LOGRA, "rank 16", 64, 4e6, 1.4e6),
        influence(LOGRA, "rank 64", 64, 9e6, 9e6),  # another rank: not in the ratios
    ]
    found = command.ratios(rows)
    assert found == {
        "largest over smallest batch": 4e6 / 50,
        "best over best": 4e6 / 1000,
        "best over best, with queries": 1.4e6 / 700,
    }
    record = {"case": "toy", "check": {}, "logging": [], "influence": rows, "ratios": found}
    best = next(line for line in command.show(record).splitlines() if "best: " in line)
    assert best.endswith("best over best: 4,000, below the target of 6,500")
    assert command.ratios(rows[3:]) == {}
    alone = command.show({**record, "influence": rows[3:], "ratios": {}})
    assert "EKFAC is left out: kronfluence is not installed" in alone


def test_rows_as_words() -> None:
    assert command.ekfac_row("16x256:bf16") == (16, 256, "bfloat16")
    assert command.ekfac_row("4x4") == (4, 4, None)
    for wrong in ("16", "16x", "0x4", "4x4:fp8"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected TRAINxTEST"):
            command.ekfac_row(wrong)


def test_timed_puts_the_function_back() -> None:
    before = given.reference_text
    with ekfac.timed(given, "reference_text", "cpu") as seconds:
        given.reference_text()
        given.reference_text()
    assert len(seconds) == 2
    assert given.reference_text is before


@pytest.mark.slow
def test_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kronfluence where it is installed: its plain products are autograd's."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    words = ["--quick", "--num-train", "8", "--length", "8", "--logra", "2", "--ranks", "4"]
    command.main([*words, "--ekfac", "4x2", "--rounds", "2", "--json"])
    out = capfd.readouterr().out
    assert "LoGra   rank 4" in out
    (record,) = results.read("table1")
    json.dumps(record, allow_nan=False)
    if importlib.util.find_spec("kronfluence"):
        assert record["check"]["kronfluence - autograd"] <= check.TOLERANCE
        assert record["ratios"]["best over best"] > 0
    else:
        assert "EKFAC is left out" in out
