"""`logra query --rerank`: the leading rows ranked by finer ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import make_model, sentences, write_jsonl

from logra_kernels.cli import main

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a store of 60 rows, one compressed from it, one of another rank, and questions."""
    folder = tmp_path_factory.mktemp("files")
    make_model(folder / "model")
    write_jsonl(folder / "data.jsonl", [{"text": text} for text in sentences(60)])
    write_jsonl(folder / "q.jsonl", [{"id": "one", "text": "the cat sat"}])
    words = ["log", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    assert main([*words, "--rank", "4", "--out", str(folder / "store")]) == 0
    assert main([*words, "--rank", "2", "--out", str(folder / "other")]) == 0
    for codec in ("int8", "int4"):
        assert main(["compress", str(folder / "store"), str(folder / codec), "--codec", codec]) == 0
    return folder


def words_of(files: Path, store: str, *more: str) -> list[str]:
    words = ["query", "--store", str(files / store), "--model", str(files / "model")]
    return [*words, "--queries", str(files / "q.jsonl"), "--top-k", "3", "--tokens", "none", *more]


def asked(files: Path, tmp_path: Path, store: str, *more: str) -> dict[str, Any]:
    """The results file of a query."""
    path = tmp_path / "results.json"
    modes = ("--mode", "l-relatif", "--mode", "dot", "--mode", "gradient-dot")
    assert main([*words_of(files, store, *more), *modes, "--json", str(path)]) == 0
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def test_certified_rankings_are_those_of_the_finer_store(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = asked(files, tmp_path, "store")
    assert [answer["method"] for answer in exact["answers"]] == ["scan"] * 3
    assert "scored" not in capsys.readouterr().out
    page = tmp_path / "page.html"
    more = ("--rerank", str(files / "store"), "--certified", "--html", str(page))
    found = asked(files, tmp_path, "int8", *more)
    assert found["queries"] == exact["queries"]
    assert [answer["method"] for answer in found["answers"]] == ["certified"] * 3
    text = found["answers"][0]["text"]
    assert text.startswith("certified, the ranking of all float16 rows: ")
    assert "l-RelatIF: certified, the ranking of all" in " ".join(capsys.readouterr().out.split())
    assert text in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("how", [(), ("--candidates", "5"), ("--recall", "0.9")])
def test_re_ranked_rows_have_the_finer_scores(
    files: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    exact = asked(files, tmp_path, "store")
    found = asked(files, tmp_path, "int8", "--rerank", str(files / "store"), *how)
    assert found["queries"] == exact["queries"]
    assert "estimated recall" in found["answers"][0]["text"]


def test_the_first_plane_is_scanned_and_all_planes_rank(files: Path, tmp_path: Path) -> None:
    exact = asked(files, tmp_path, "int4")
    how = ("--planes", "1", "--rerank", str(files / "int4"), "--candidates", "60")
    found = asked(files, tmp_path, "int4", *how)
    assert found["queries"] == exact["queries"]
    assert "scored again (int4, " in found["answers"][0]["text"]
    alone = asked(files, tmp_path, "int4", "--planes", "1")
    assert alone["queries"] != exact["queries"]


def test_the_model_makes_the_rows_again(files: Path, tmp_path: Path) -> None:
    exact = asked(files, tmp_path, "store")
    found = asked(files, tmp_path, "int8", "--rerank", "model", "--candidates", "10")
    assert found["answers"][0]["finer"] == "computed"
    for mode, other in zip(found["queries"][0]["modes"], exact["queries"][0]["modes"], strict=True):
        for end in ("top", "bottom"):
            assert [p["id"] for p in mode[end]] == [p["id"] for p in other[end]]
            scores = [[p["score"] for p in one[end]] for one in (mode, other)]
            assert scores[0] == pytest.approx(scores[1], rel=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--candidates", "9"], "--candidates goes with --rerank"),
        (["--recall", "0.9"], "--recall goes with --rerank"),
        (["--certified"], "--certified goes with --rerank"),
        (
            ["--rerank", "model", "--certified"],
            "--certified: expected --rerank with a finer store, got the model",
        ),
        (
            ["--rerank", "STORE", "--candidates", "2"],
            "--candidates: expected at least --top-k, 3, got 2",
        ),
        (["--rerank", "STORE", "--scores", "s.csv"], "--scores goes with --scores-of ranked"),
        (["--rerank", "OTHER"], "expected finer rows of"),
        (["--planes", "1"], "planes: expected a codec of bit planes, got int8"),
        (["--rerank", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_what_is_refused(
    files: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"STORE": str(files / "store"), "OTHER": str(files / "other")}
    words = [places.get(word, word) for word in words]
    assert main(words_of(files, "int8", *words)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recall", "1"], "--recall: expected a number between 0 and 1, got '1'"),
        (["--candidates", "5", "--certified"], "not allowed with"),
    ],
)
def test_what_the_parser_refuses(
    files: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words_of(files, "int8", "--rerank", str(files / "store"), *words))
    assert message in capsys.readouterr().err
