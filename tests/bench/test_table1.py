"""Table 1: our half on a toy model, the arithmetic of the table, and kronfluence's where it is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the bench's models are Hugging Face's")

from bench.harness import results
from bench.harness.memory import folder_bytes, timed
from bench.table1 import check, command, logra, prepare
from bench.table1.setting import Setting
from bench.table1.table import (
    EKFAC,
    LOGRA,
    InfluenceRow,
    LoggingRow,
    Table,
    duration,
    memory_bytes,
    pairs_per_s,
    pairs_per_s_with_queries,
    size,
)
from logra_kernels.attribution import Attributor

NUM_TRAIN, NUM_QUERIES, LENGTH = 12, 4, 8


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("table1")
    model = prepare.random_llama(folder / "model", width=16, inner=24, blocks=2)
    tokens = prepare.windows(None, model, NUM_TRAIN + NUM_QUERIES, LENGTH)
    np.save(folder / "tokens.npy", tokens)
    names = prepare.module_names(model, ["mlp"], None)
    return Setting(str(model), str(folder / "tokens.npy"), NUM_TRAIN, names)


def test_setting_survives_a_file(setting: Setting, tmp_path: Path) -> None:
    setting.write(tmp_path / "setting.json")
    assert Setting.read(tmp_path / "setting.json") == setting
    assert setting.train.shape == (NUM_TRAIN, LENGTH)
    assert setting.queries.shape == (NUM_QUERIES, LENGTH)


def test_modules_and_weights(setting: Setting) -> None:
    assert len(setting.modules) == 6
    whole, watched = prepare.parameters(Path(setting.model), setting.modules)
    assert watched == 6 * 16 * 24
    assert whole > watched
    last = prepare.module_names(Path(setting.model), ["mlp"], 1)
    assert last == setting.modules[3:]


def test_windows_are_the_text(setting: Setting, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(40)))
    found = prepare.windows(text, Path(setting.model), 4, 10)
    assert found.tolist() == np.arange(40).reshape(4, 10).tolist()
    with pytest.raises(ValueError, match="expected 5 windows of 10 tokens, got 4"):
        prepare.windows(text, Path(setting.model), 5, 10)


def test_windows_of_a_tokenizer(tmp_path: Path) -> None:
    from tiny_lm import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "abcdef"}\n{"text": "ghijkl"}\n')
    found = prepare.windows(tmp_path / "text.jsonl", tmp_path, 3, 4)
    tokens = make_tokenizer()("abcdefghijkl", add_special_tokens=False)["input_ids"]
    assert found.flatten().tolist() == tokens


def test_our_half(setting: Setting, tmp_path: Path) -> None:
    options = {"batch": 5, "rank": 4, "project": "toy"}
    logged = logra.log(setting, tmp_path, options)
    assert logged["tokens"] == NUM_TRAIN * LENGTH
    assert logged["dim"] == 6 * 4 * 4
    # rows of fp16 after a header of 4,096 bytes, and what the shard keeps beside them
    assert logged["rows_bytes"] >= 4096 + NUM_TRAIN * logged["dim"] * 2
    assert logged["storage_bytes"] == folder_bytes(tmp_path / "toy")

    num_bytes = 100 * logged["dim"] * 2
    options = {"project": "toy", "large": "large", "num_bytes": num_bytes}
    enlarged = logra.enlarge(setting, tmp_path, options)
    assert enlarged["rows"] == 108  # whole copies of 12 rows
    assert enlarged["num_bytes"] >= num_bytes

    options = {
        "project": "toy",
        "large": "large",
        "train_batch": 7,
        "test_batch": 3,
        "query_batch": 2,
        "repeats": 3,
    }
    measured = logra.query(setting, tmp_path, options)  # checks the scores itself
    assert measured["num_train"] == 108
    assert measured["num_queries"] == 3
    assert measured["block_rows"] == 7
    assert len(measured["train_times_s"]) == 3
    assert measured["query_s"] > measured["precondition_s"] > 0
    json.dumps(measured)


def test_scan_that_is_wrong_is_not_timed(setting: Setting, tmp_path: Path) -> None:
    logra.log(setting, tmp_path, {"batch": 4, "rank": 4, "project": "toy"})
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
    check.scores(setting, tmp_path, {"save": str(tmp_path / "ours.pt")})
    ours = torch.load(tmp_path / "ours.pt")
    found = check.compare(ours, None)
    assert found["ours - autograd"] <= check.TOLERANCE
    ours["whole, none"] = ours["whole, none"] * (1 + 3 * check.TOLERANCE)
    with pytest.raises(RuntimeError, match="ours - autograd: plain products"):
        check.compare(ours, None)


def test_kronfluence_that_differs_is_refused(setting: Setting) -> None:
    scores = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    names = ("autograd", "whole, none", "whole, raw", "projected, raw")
    ours = dict.fromkeys(names, scores)
    found = check.compare(ours, {"identity": scores, "ekfac": -scores})
    assert found["rank correlation of EKFAC and no curvature"] == pytest.approx(-1)
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
    measured = {"num_train": 50, "num_queries": 4, "train_s": 2.0, "query_s": 6.0}
    assert pairs_per_s(measured) == 100
    # 1,000 examples take 40 s, the queries 6 s however many the examples are
    assert pairs_per_s_with_queries(measured, 1000) == pytest.approx(4000 / 46)


def test_memory_is_the_device_s_where_there_is_one() -> None:
    assert memory_bytes({"memory": {"anonymous": 3, "resident": 5, "device": 0}}) == 3
    assert memory_bytes({"memory": {"anonymous": 3, "resident": 5, "device": 7}}) == 7
    assert memory_bytes({"memory": {"anonymous": 0, "resident": 5, "device": 0}}) == 5


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 1536, 5 << 20, 3 << 30)] == [
        "0 B", "999 B", "0.977 KB", "1.5 KB", "5 MB", "3 GB",
    ]  # fmt: skip


def test_durations_in_words() -> None:
    assert [duration(s) for s in (0.123, 90, 5400, 200000)] == [
        "0.12 s",
        "1.5 min",
        "1.5 h",
        "2.31 d",
    ]


def test_timed_puts_the_function_back() -> None:
    before = prepare.reference_text
    with timed(prepare, "reference_text", "cpu") as seconds:
        prepare.reference_text()
        prepare.reference_text()
    assert len(seconds) == 2
    assert prepare.reference_text is before


def influence(
    system: str, variant: str, test_batch: int, pairs: float, whole: float
) -> InfluenceRow:
    return InfluenceRow(system, variant, 16, test_batch, 64, pairs, whole, 1.0, 1 << 20)


@pytest.fixture
def table() -> Table:
    logging = [
        LoggingRow(EKFAC, "", 8, 900.0, 1 << 28, 1 << 27, 0.0, "eigendecomposition 3 s", 3.0),
        LoggingRow(LOGRA, "rank 16", 8, 3000.0, 1 << 27, 1 << 22, 6144.0, "", 0.5),
    ]
    rows = [
        influence(EKFAC, "", 4, 50.0, 40.0),
        influence(EKFAC, "", 64, 800.0, 700.0),
        influence(EKFAC, "low-rank 32", 64, 1000.0, 500.0),
        influence(LOGRA, "rank 16", 4, 1e6, 8e5),
        influence(LOGRA, "rank 16", 64, 4e6, 1.4e6),
        influence(LOGRA, "rank 64", 64, 9e6, 9e6),  # another rank: not in the ratios
    ]
    return Table("toy", 1000, 90, {"ours - autograd": 1e-7}, logging, rows)


def test_ratios(table: Table) -> None:
    assert table.ratios() == {
        "largest over smallest batch": 4e6 / 50,
        "best over best": 4e6 / 1000,
        "best over best, with queries": 1.4e6 / 700,
        "same batch 4": 1e6 / 50,
        "same batch 64": 4e6 / 1000,
    }
    alone = replace(table, influence=table.influence[3:], left_out="not installed")
    assert alone.ratios() == {}
    assert "EKFAC left out: not installed" in alone.text()


def test_from_nothing(table: Table) -> None:
    found = table.from_nothing()
    assert found[EKFAC] == {"queries": 64, "once": 1000 * 90 / 900 + 3, "each": 64000 / 700}
    assert found[LOGRA] == {"queries": 64, "once": 1000 * 90 / 3000 + 0.5, "each": 64000 / 1.4e6}
    large = replace(table, corpus=1_000_000).from_nothing()
    assert large[EKFAC]["once"] == 100_000 * 90 / 900 + 3  # kronfluence fits to no more
    assert large[LOGRA]["once"] == 1_000_000 * 90 / 3000 + 0.5
    del table.influence[1:3]  # EKFAC has 4 queries only
    assert {row["queries"] for row in table.from_nothing().values()} == {4}


def test_text_says_what_falls_short(table: Table) -> None:
    lines = table.text().splitlines()
    (best,) = [line for line in lines if line.startswith("    best over best  ")]
    (same,) = [line for line in lines if line.startswith("    same batch 4 ")]
    assert best.endswith("4,000x  below the target")
    assert same.endswith("20,000x")
    assert any("LoGra   once" in line and "every 64 queries" in line for line in lines)
    json.dumps(table.record(), allow_nan=False)


def test_rows_as_words() -> None:
    assert command.parse_ekfac("16x256:r32:bf16") == {
        "train_batch": 16, "test_batch": 256, "low_rank": 32, "amp": "bfloat16",
    }  # fmt: skip
    for wrong in ("16", "16x", "0x4", "4x4:r", "4x4:fp8"):
        with pytest.raises(ValueError, match="--ekfac: expected"):
            command.parse_ekfac(wrong)
    assert command.parse_fit("8:bf16")["amp"] == "bfloat16"
    with pytest.raises(ValueError, match="--fit: expected"):
        command.parse_fit("8:fp8")


@pytest.mark.slow
def test_command_without_kronfluence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    words = ["--quick", "--no-ekfac", "--num-train", "8", "--length", "8", "--logra", "2"]
    command.main([*words, "--ranks", "4", "--store-mb", "1", "--work", str(tmp_path / "work")])
    out = capsys.readouterr().out
    assert "LoGra rank 4" in out
    assert "EKFAC left out: --no-ekfac" in out
    kept = sorted(file.name for file in (tmp_path / "work" / "steps").iterdir())
    command.main([*words, "--ranks", "4", "--store-mb", "1", "--work", str(tmp_path / "work")])
    assert capsys.readouterr() == (out, "")  # nothing was done again
    assert sorted(file.name for file in (tmp_path / "work" / "steps").iterdir()) == kept


@pytest.mark.slow
def test_kronfluence_is_autograd_s_too(tmp_path: Path) -> None:
    python, why = command.find_kronfluence(command.arguments([]))
    if python is None:
        pytest.skip(str(why))
    (tmp_path / "steps").mkdir()
    found = command.run_check(command.Steps(tmp_path, python), tmp_path / "check")
    assert found["kronfluence - autograd"] <= check.TOLERANCE
    assert found["kronfluence - ours"] <= check.TOLERANCE
