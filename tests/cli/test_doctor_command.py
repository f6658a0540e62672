"""`logra doctor`, on a tiny model in a folder: exit codes, the report, the findings as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import make_model, make_tokenizer, sentences, write_jsonl

from logra_kernels.cli import main

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a corpus without defects."""
    folder = tmp_path_factory.mktemp("doctor")
    make_model(folder / "model")
    write_corpus(folder / "data.jsonl", sentences(40))
    return folder


def write_corpus(path: Path, texts: list[str]) -> Path:
    return write_jsonl(path, [{"uid": f"s{n}", "text": text} for n, text in enumerate(texts)])


def words(folder: Path, data: Path | None = None, model: str = "model") -> list[str]:
    data = data or folder / "data.jsonl"
    start = ["doctor", "--model", str(folder / model), "--data", str(data)]
    return [*start, "--id-field", "uid", "--rank", "4"]


def add_bos(folder: Path) -> None:
    """Give the model's folder a tokenizer that puts <s> before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(folder)


def findings(folder: Path, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """{name: finding} of a run that finds something."""
    assert main([*arguments, "--json", str(folder / "found.json")]) == 1
    written = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert (written["format"], written["version"]) == ("logra_kernels.diagnosis", 1)
    return {found["name"]: found for found in written["findings"]}


def test_a_healthy_corpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(words(folder)) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "8 examples run, 40 read, float32",
        "watched parameters: 9,216 of 32,032 (28.8%)",
        next(line for line in shown.out.splitlines() if line.startswith("largest |g| of a module")),
        "nothing found",
    ]
    assert "finding" not in shown.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert main([*words(folder), "--dtype", "bfloat16", "--json", str(folder / "good.json")]) == 0
    written = json.loads((folder / "good.json").read_text(encoding="utf-8"))
    assert (written["findings"], written["unchecked"], written["dtype"]) == ([], {}, "bfloat16")


def test_findings_on_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(folder), "--rank", "32", "--json", "-"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert found["name"] == "more-columns-than-rows"


def test_copies_and_a_large_rank(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = sentences(40)
    texts[30] = texts[7]
    data = write_corpus(tmp_path / "data.jsonl", texts)
    found = findings(tmp_path, [*words(folder, data), "--rank", "32"])
    assert list(found) == ["duplicates", "more-columns-than-rows"]
    assert found["duplicates"]["seen"] == (
        "1 of 40 examples are copies of earlier ones ('s30' of 's7')"
    )
    shown = capsys.readouterr()
    assert "warning: duplicates: 1 of 40 examples" in shown.out
    assert shown.err.endswith("logra doctor: 2 findings\n")
    without = ["--rank", "32", "--curvature", "none"]
    assert list(findings(tmp_path, [*words(folder, data), *without])) == ["duplicates"]
    assert main([*words(folder, data), "--limit", "20"]) == 0


def test_two_bos_tokens_in_the_data(folder: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "bos")
    add_bos(tmp_path / "bos")
    assert main(words(tmp_path, folder / "data.jsonl", "bos")) == 0
    data = write_corpus(tmp_path / "data.jsonl", [f"<s>{text}" for text in sentences(40)])
    found = findings(tmp_path, words(tmp_path, data, "bos"))
    assert list(found) == ["doubled-bos"]
    assert found["doubled-bos"]["numbers"] == {"examples": 40}
    assert main(words(folder, data)) == 0  # that tokenizer puts none before


def test_prompts_that_leave_few_tokens(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": text[:1], "ask": 2 * text, "uid": f"s{n}"} for n, text in enumerate(sentences(40))
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    found = findings(tmp_path, [*words(folder, data), "--prompt-field", "ask"])
    assert list(found) == ["masked-tokens"]


def test_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--json", "no/such/folder/x.json"], "logra doctor: json: no folder"),
        (
            ["--modules", "expert"],
            "modules: no linear layer's name contains 'expert'",
        ),
        (["--text-field", "body"], "no field 'body' (it has: text, uid)"),
    ):
        capsys.readouterr()
        assert main([*words(folder), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "  logra doctor " in shown
    assert "--shard-rows" not in shown
    assert "--out" not in shown.split("Example:")[0]
