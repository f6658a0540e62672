"""`logra log` with a projection from a pilot, or a curvature made from tokens."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_lm import make_model, sentences, write_jsonl

from logra_kernels.cli import main
from logra_kernels.curvature import KfacCurvature
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.store import Store

pytest.importorskip("transformers")

COUNT = 40
EIGEN = ("--init", "eigen", "--coordinates", "300")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus of 40 texts, and a store of eigenbasis rows."""
    folder = tmp_path_factory.mktemp("files")
    make_model(folder / "model")
    rows = [{"text": text} for text in sentences(COUNT)]
    write_jsonl(folder / "data.jsonl", rows)
    assert main([*log_words(folder, *EIGEN), "--out", str(folder / "eigen")]) == 0
    return folder


def log_words(files: Path, *more: str) -> list[str]:
    words = ["log", "--model", str(files / "model"), "--data", str(files / "data.jsonl")]
    return [*words, *more]


def finds_itself(files: Path, store: Path, out: Path) -> None:
    """Every fifth text, asked as a query, leads its own ranking; its tokens make the score."""
    texts = sentences(COUNT)[::5]
    write_jsonl(out / "q.jsonl", [{"text": text} for text in texts])
    words = ["query", "--store", str(store), "--model", str(files / "model"), "--top-k", "1"]
    words += ["--queries", str(out / "q.jsonl"), "--json", str(out / "r.json")]
    assert main([*words, "--html", str(out / "r.html")]) == 0
    results = json.loads((out / "r.json").read_text(encoding="utf-8"))
    for query, text in zip(results["queries"], texts, strict=True):
        (found,) = query["modes"][0]["top"]
        assert query["modes"][0]["mode"] == "l-relatif"
        assert found["text"] == text
        values = [value for _, value in found["tokens"]]  # written with four digits
        assert abs(sum(values) - found["score"]) <= 5e-4 * sum(map(abs, values))


def test_eigenbasis_rows(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open(files / "eigen")
    assert (store.num_rows, store.dim) == (COUNT, 300)
    assert store.projection["pilot_examples"] == 32  # of 40: the fewest
    assert {name: held["rows"] for name, held in store.curvatures.items()} == {"diagonal": COUNT}
    finds_itself(files, files / "eigen", tmp_path)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "eigen, coordinates 300, pilot examples 32" in page
    capsys.readouterr()
    assert main(["info", str(files / "eigen")]) == 0
    assert "eigen, coordinates 300, pilot examples 32" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "codec"), [("--codec", "int4"), ("--store-dtype", "sign")])
def test_rows_in_few_bits(
    files: Path, tmp_path: Path, option: str, codec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No float rows are written, and the curvature is that of the rows before."""
    out = tmp_path / "s"
    assert main([*log_words(files, *EIGEN, option, codec), "--out", str(out)]) == 0
    store, exact = Store.open(out), Store.open(files / "eigen")
    assert (store.num_rows, store.dtype) == (COUNT, codec)
    assert main(["verify", str(out)]) == 0
    held, wanted = store.load_curvature("diagonal")[0], exact.load_curvature("diagonal")[0]
    # Those of the exact store saw the rows as float16 holds them.
    np.testing.assert_allclose(held["squares"], wanted["squares"], rtol=2e-3)
    write_jsonl(tmp_path / "q.jsonl", [{"text": text} for text in sentences(COUNT)[::5]])
    words = ["query", "--store", str(out), "--model", str(files / "model"), "--top-k", "1"]
    words += ["--queries", str(tmp_path / "q.jsonl"), "--json", str(tmp_path / "r.json")]
    capsys.readouterr()
    assert main(words) == 0
    assert f"rows in {codec} do not tell their sigma under this" in capsys.readouterr().err
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    for query, text in zip(results["queries"], sentences(COUNT)[::5], strict=True):
        assert query["modes"][0]["top"][0]["text"] == text


def test_rows_in_few_bits_are_of_an_eigenbasis(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = log_words(files, "--rank", "8", "--codec", "sign")
    assert main([*words, "--out", str(tmp_path / "s")]) == 2
    assert "sign rows are of an eigenbasis, which whitens them" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_pca_rows(files: Path, tmp_path: Path) -> None:
    words = log_words(files, "--init", "pca", "--rank", "9", "--pilot", "0.5")
    assert main([*words, "--out", str(tmp_path / "s")]) == 0
    store = Store.open(tmp_path / "s")
    assert store.dim == 6 * 9 * 9
    assert store.projection["pilot_examples"] == COUNT // 2
    assert list(store.curvatures) == ["raw"]
    finds_itself(files, tmp_path / "s", tmp_path)


def test_pca_of_sequence_moments(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = log_words(files, "--init", "pca", "--rank", "9", "--out", str(tmp_path / "s"))
    assert main([*words, "--moments", "sequence"]) == 0
    assert Store.open(tmp_path / "s").projection["moments"] == "sequence"
    assert main(["info", str(tmp_path / "s")]) == 0
    assert "moments sequence" in capsys.readouterr().out
    assert main([*words, "--resume"]) == 2
    assert 'projection.moments: the store has "sequence", this run' in capsys.readouterr().err
    assert main([*log_words(files, "--moments", "reduce"), "--out", str(tmp_path / "b")]) == 2
    assert "moments: does not go with --init random" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ekfac", "kfac-reduce", "ec-shampoo"])
def test_kronecker_curvatures(files: Path, tmp_path: Path, kind: str) -> None:
    words = log_words(files, "--init", "pca", "--rank", "9", "--curvature", kind)
    assert main([*words, "--out", str(tmp_path / "s")]) == 0
    curvatures = Store.open(tmp_path / "s").curvatures
    assert {name: held["rows"] for name, held in curvatures.items()} == {kind: COUNT}
    finds_itself(files, tmp_path / "s", tmp_path)


def test_a_batch_of_one_gives_the_same_moments(files: Path, tmp_path: Path) -> None:
    """Sums over tokens in float64 of float32 activations, whose products may differ in the last
    bits from batch to batch: 1e-5 of the largest."""
    found = []
    for number, size in enumerate(("1", "40")):
        words = log_words(files, "--rank", "6", "--curvature", "kfac", "--batch-size", size)
        assert main([*words, "--out", str(tmp_path / str(number))]) == 0
        found.append(KfacCurvature.load(Store.open(tmp_path / str(number))).moments)
    for name, sides in found[0].items():
        for one, many in zip(sides, found[1][name], strict=True):
            assert torch.allclose(one, many, rtol=0, atol=1e-5 * float(one.abs().max()))


def test_resume_takes_the_projection_that_stands_in_the_store(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "s"))
    words = log_words(files, *EIGEN, "--pilot", "16", *out)
    assert main([*words, "--limit", "25", "--resume"]) == 0  # there is no store yet
    first = Store.open(tmp_path / "s")
    rows = first.take(range(25))

    def no_pilot(*args: Any, **options: Any) -> None:
        raise AssertionError("a pilot ran")

    monkeypatch.setattr("logra_kernels.cli.log.pilot_corpus", no_pilot)
    assert main([*words, "--resume"]) == 0
    assert "25 were in the store already" in capsys.readouterr().out
    store = Store.open(tmp_path / "s")
    assert store.num_rows == COUNT
    assert store.projection == first.projection
    assert np.array_equal(store.take(range(25)), rows)
    assert store.curvatures["diagonal"]["rows"] == COUNT
    finds_itself(files, tmp_path / "s", tmp_path)

    for change, message in (
        (("--coordinates", "301"), "projection.coordinates: the store has 300, this run has 301"),
        (("--pilot", "17"), "fingerprints.data.pilot: the store has 16, this run has 17"),
        (("--pilot", "0.1"), "fingerprints.data.pilot: the store has 16, this run has 0.1"),
    ):
        assert main([*words, "--resume", *change]) == 2
        assert f"cannot resume: {message}" in capsys.readouterr().err
    pca = log_words(files, "--init", "pca", "--rank", "9", *out, "--resume")
    assert main(pca) == 2
    assert 'projection.kind: the store has "eigen"' in capsys.readouterr().err


def test_an_interrupted_pilot_leaves_no_store(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, batches = LMGradients.passed, list[bool]()

    def interrupted(self: LMGradients, *args: Any, **options: Any) -> Any:
        batches.append(options["tokens_alone"])
        if len(batches) == 2:
            raise KeyboardInterrupt
        return passed(self, *args, **options)

    monkeypatch.setattr(LMGradients, "passed", interrupted)
    words = log_words(files, *EIGEN, "--batch-size", "8", "--out", str(tmp_path / "s"))
    assert main(words) == 130
    assert batches == [True, True]  # both of the pilot
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "eigen"], "coordinates: expected a number with --init eigen, got none"),
        ([*EIGEN, "--rank", "4"], "rank: does not go with --init eigen"),
        ([*EIGEN, "--seed", "4"], "seed: does not go with --init eigen"),
        (["--init", "pca", "--seed", "4"], "seed: does not go with --init pca"),
        (["--init", "pca", "--coordinates", "60"], "coordinates: does not go with --init pca"),
        (["--coordinates", "60"], "coordinates: does not go with --init random"),
        (["--pilot", "60"], "pilot: does not go with --init random"),
        ([*EIGEN, "--pilot", "41"], "pilot: expected 1 to 40, the examples of the corpus, got 41"),
        ([*EIGEN, "--curvature", "ekfac"], "'diagonal' and 'shrunk' are their curvatures"),
        (["--init", "eigen", "--coordinates", "5"], "of at least 6, one a module, and at most 92"),
        (["--init", "eigen", "--coordinates", "9217"], "at most 9216, all of the weights, got 92"),
        ([*EIGEN, "--data", "-", "--format", "jsonl"], "standard input can be read once"),
    ],
)
@pytest.mark.parametrize("command", ["log", "doctor"])
def test_what_does_not_go_together(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: list[str],
    message: str,
) -> None:
    given = [command, *log_words(files, *words)[1:]]
    if command == "log":
        given += ["--out", str(tmp_path / "s")]
    assert main(given) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.match(f"logra {command}: ", said[-1])
    assert message in said[-1]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "svd"], "random, normal, rademacher, got 'svd'; from a pilot: pca, eigen"),
        (["--pilot", "0"], "expected a whole number of at least 1, or a share up to 1.0, got '0'"),
        (["--pilot", "1.5"], "or a share up to 1.0, got '1.5'"),
        (["--pilot", "nan"], "or a share up to 1.0, got 'nan'"),
        (["--curvature", "best"], "kfac, ekfac, "),
    ],
)
def test_what_the_options_take(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["log", "--model", "m", "--data", "d", "--out", "o", *words])
    assert message in capsys.readouterr().err


def test_the_doctor_examines_piloted_rows(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", *log_words(files, *EIGEN)[1:], "--pilot", "8", "--json"]
    assert main([*words, str(tmp_path / "d.json")]) in (0, 1)
    assert "300 numbers" in capsys.readouterr().err
