"""What the command writes: tables of scores, JSON, and text that is safe for a terminal."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_lm import make_model, make_tokenizer, sentences, write_jsonl
from tree import environment

from logra_kernels.attribution import Attributor
from logra_kernels.cli import main
from logra_kernels.lm import ranking
from logra_kernels.report.console import UNSAFE
from logra_kernels.store import Store

pytest.importorskip("transformers")

EVIL = "evil\x1b]0;owned\x07\x1b[31m\x9b2J\u202etxt"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus of 30 rows and two questions, and a finished store."""
    folder = tmp_path_factory.mktemp("files")
    make_model(folder / "model")
    rows = [{"id": f"s{i}", "text": text, "n": i} for i, text in enumerate(sentences(29))]
    rows.append({"id": EVIL, "text": f"the cat {EVIL}", "n": 29})
    write_jsonl(folder / "data.jsonl", rows)
    questions = [{"id": "one", "text": "the cat sat"}, {"id": "two", "text": 'my dog, "ran"'}]
    write_jsonl(folder / "q.jsonl", questions)
    words = ["log", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    words += ["--id-field", "id", "--rank", "4", "--shard-rows", "12"]
    assert main([*words, "--out", str(folder / "store")]) == 0
    return folder


def query_words(files: Path) -> list[str]:
    words = ["query", "--store", str(files / "store"), "--model", str(files / "model")]
    return [*words, "--queries", str(files / "q.jsonl"), "--top-k", "3"]


def table_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of scores, whichever kind it is."""
    if path.suffix == ".parquet":
        return list(pyarrow.parquet.read_table(path).to_pylist())
    with path.open(encoding="utf-8", newline="") as lines:
        rows: list[dict[str, Any]] = list(csv.DictReader(lines))
    for row in rows:
        for name, kind in (("row", int), ("score", float), ("rank", int)):
            if name in row:
                row[name] = kind(row[name])
    return rows


# --- scores


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_score_is_the_attributors(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(ranking, "BLOCK_ROWS", 5)  # several blocks in a shard
    path = tmp_path / f"s.{kind}"
    modes = ["--mode", "dot", "--mode", "l-relatif", "--mode", "gradient-dot"]
    assert main([*query_words(files), *modes, "--scores", str(path)]) == 0
    rows = table_of(path)
    assert list(rows[0]) == ["query", "mode", "row", "id", "score"]
    assert len(rows) == 3 * 2 * 30

    from logra_kernels.lm.causal_lm import CausalLM
    from logra_kernels.lm.corpus import Record, TokenSettings, encode
    from logra_kernels.lm.gradients import LMGradients

    store = Store.open(files / "store")
    gradients = LMGradients.of_store(store, lm := CausalLM.load(files / "model"))
    texts = [json.loads(line)["text"] for line in (files / "q.jsonl").read_text().splitlines()]
    queries = torch.cat(
        [
            gradients.rows(encode(Record("", text), lm.tokenizer, TokenSettings())[0])
            for text in texts
        ]
    )
    ids = store.ids.to_pylist()
    for mode, attributor, scan in (
        ("dot", Attributor(store), "dot"),
        ("l-relatif", Attributor(store), "l-relatif"),
        ("gradient-dot", Attributor(store, "none"), "dot"),
    ):
        wanted = attributor.scores(queries, scan).scores
        for q, name in enumerate(("one", "two")):
            found = [row for row in rows if (row["query"], row["mode"]) == (name, mode)]
            assert [(row["row"], row["id"]) for row in found] == list(enumerate(ids))
            # The same scan of the same rows: equal bits, which nine digits hold.
            assert np.array_equal(
                np.array([row["score"] for row in found], np.float32), wanted[q].numpy()
            )


def test_the_types_of_a_parquet_table(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    assert main([*query_words(files), "--scores", str(path)]) == 0
    schema = pyarrow.parquet.read_schema(path)
    assert dict(zip(schema.names, map(str, schema.types), strict=True)) == {
        "query": "string",
        "mode": "string",
        "row": "int64",
        "id": "string",
        "score": "float",
    }


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ranked_scores_from_a_query_and_from_its_results(
    files: Path, tmp_path: Path, kind: str
) -> None:
    out, again, results = tmp_path / f"s.{kind}", tmp_path / f"r.{kind}", tmp_path / "r.json"
    words = ["--scores", str(out), "--scores-of", "ranked", "--json", str(results)]
    assert main([*query_words(files), *words]) == 0
    rows = table_of(out)
    assert list(rows[0]) == ["query", "mode", "row", "id", "score", "end", "rank"]
    passages = [
        (query["id"], end, passage["rank"], passage["row"], passage["id"])
        for query in json.loads(results.read_text(encoding="utf-8"))["queries"]
        for end in ("top", "bottom")
        for passage in query["modes"][0][end]
    ]
    columns = ("query", "end", "rank", "row", "id")
    assert [tuple(row[name] for name in columns) for row in rows] == passages
    assert main(["report", "--results", str(results), "--scores", str(again)]) == 0
    assert table_of(again) == rows


@pytest.mark.parametrize("option", ["csv", "parquet"])
def test_a_failing_query_leaves_no_half_table(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "other").mkdir()
    make_model(tmp_path / "other", seed=1)
    words = query_words(files)
    words[words.index("--model") + 1] = str(tmp_path / "other")
    (tmp_path / f"s.{option}").write_text("precious")
    assert main([*words, "--scores", str(tmp_path / f"s.{option}")]) == 2
    assert (tmp_path / f"s.{option}").read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", f"s.{option}"]


def test_memory_beside_the_matrix_is_a_block(tmp_path: Path) -> None:
    """400,000 scores held as Python columns would take over 40 MB; a block of 1,000 less than 2."""
    code = f"""
import tracemalloc
import numpy as np, torch
from logra_kernels.lm import ranking
from logra_kernels.report.scores import score_table
from logra_kernels.store import Module, Store, StoreWriter
N = 100_000
path = {str(tmp_path)!r}
with StoreWriter.create(path + "/s", modules=[Module("a", 1, 1)], dtype="float32") as writer:
    for start in range(0, N, 1000):
        ids = [f"row-{{i:030}}" for i in range(start, start + 1000)]
        writer.append(ids, np.ones((1000, 1), np.float32))
store = Store.open(path + "/s")
scores = torch.randn(4, N)
ranking.BLOCK_ROWS = 1000
for kind in ("csv", "parquet"):
    with score_table(path + "/t." + kind) as add:
        tracemalloc.start()
        for block in ranking._blocks(store, dict(mode="dot"), list("abcd"), scores):
            add(block)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    print(kind, peak)
    assert peak < 2e6, (kind, peak)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "s.txt"], "scores: expected a file ending in .parquet or .csv, got s.txt"),
        (["--scores", "no/such/s.csv"], "scores: no folder"),
        (["--json", "."], "json: expected a file, got the folder ."),
        (["--scores-of", "ranked"], "--scores-of goes with --scores"),
    ],
)
def test_bad_outputs_are_refused_first(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main([*query_words(files), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "gradients" not in err  # nothing was computed


def test_parquet_that_pyarrow_lacks_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main([*query_words(files), "--scores", "s.parquet"]) == 2
    assert "scores: this pyarrow cannot write Parquet; install" in capsys.readouterr().err


# --- JSON


def test_info_as_json(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(files / "store"), "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rows"], facts["shards"], facts["finalized"]) == (30, 3, True)
    assert facts["modules"][0] == {"name": "model.layers.0.mlp.gate_proj", "ko": 4, "ki": 4}
    assert facts["fingerprints"]["data"]["file"] == "data.jsonl"
    assert facts["curvatures"] == {"raw": {"rows": 30}}
    # In a file it stands beside the text.
    assert main(["info", str(files / "store"), "--json", str(tmp_path / "i.json")]) == 0
    assert "30 in 3 shards" in capsys.readouterr().out
    assert json.loads((tmp_path / "i.json").read_text(encoding="utf-8")) == facts


def test_verify_as_json(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    assert main(["verify", str(files / "store"), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["good"], found["problems"], found["rows"]) == (True, [], 30)
    shutil.copytree(files / "store", tmp_path / "bad")
    os.truncate(tmp_path / "bad" / "shard-00000.npy", 100)
    assert main(["verify", str(tmp_path / "bad"), "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["good"]
    assert "shard-00000.npy" in found["problems"][0]


def test_results_alone_on_stdout(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*query_words(files), "--json", "-"]) == 0
    out = capsys.readouterr().out
    assert len(json.loads(out)["queries"]) == 2
    assert not UNSAFE.search(out.replace("\n", ""))


def test_report_needs_something_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--results", "r.json"]) == 2
    assert "expected --html or --scores, got neither" in capsys.readouterr().err


# --- terminals


def test_ids_and_texts_reach_no_terminal_as_commands(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "r.json"
    words = [*query_words(files), "--top-k", "30", "--json", str(results)]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert r"evil\x1b]0;owned\x07" in captured.out
    for text in (captured.out, captured.err.replace("\r", ""), results.read_text(encoding="utf-8")):
        assert not UNSAFE.search(text.replace("\n", ""))
    # JSON escapes what it holds, and loses nothing.
    loaded = json.loads(results.read_text(encoding="utf-8"))
    assert EVIL in [passage["id"] for passage in loaded["queries"][0]["modes"][0]["top"]]


def test_errors_and_facts_that_quote_a_file_are_escaped(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{EVIL: "x"}])
    words = ["log", "--model", str(files / "model"), "--data", str(tmp_path / "a.jsonl")]
    assert main([*words, "--out", str(tmp_path / "s"), "--traceback"]) == 2
    assert main(["report", "--results", str(tmp_path / EVIL), "--html", "x"]) == 2
    text = capsys.readouterr().err.replace("\r", "")  # which the progress bar writes
    assert r"(it has: evil\x1b]0;owned\x07" in text
    assert not UNSAFE.search(text.replace("\n", ""))


# --- corpora of other kinds through the command


def test_standard_input(files: Path, tmp_path: Path) -> None:
    words = ["log", "--model", str(files / "model"), "--data", "-", "--format", "jsonl"]
    words += ["--id-field", "id", "--rank", "4", "--out", str(tmp_path / "s")]
    command = [sys.executable, "-m", "logra_kernels.cli", *words]
    text = (files / "data.jsonl").read_bytes()
    done = subprocess.run(command, input=text, capture_output=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert b"30 examples logged" in done.stdout
    store = Store.open(tmp_path / "s")
    assert sorted(store.ids.to_pylist()) == sorted(Store.open(files / "store").ids.to_pylist())
    (kept,) = store.metadata([store.row_of("s3")])
    assert kept is not None
    assert kept["fields"] == {"n": 3}
    again = subprocess.run(
        [*command, "--resume"], input=text, capture_output=True, env=environment()
    )
    assert again.returncode == 2
    assert b"resume: standard input cannot be read again" in again.stderr
    assert main(["info", str(tmp_path / "s")]) == 0


def test_a_folder(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name, text in (("b.txt", "one two\n\nthree four"), ("sub/a.txt", "five six"), ("x.md", "")):
        (tmp_path / "data" / name).write_text(text, encoding="utf-8")
    words = [
        "log",
        "--model",
        str(files / "model"),
        "--data",
        str(tmp_path / "data"),
        "--rank",
        "4",
    ]
    words += ["--documents", "blank-lines"]
    assert main([*words, "--out", str(tmp_path / "data" / "s")]) == 2
    assert "expected a folder outside --data" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "s")]) == 0
    assert "1 files of other kinds in the folder" in capsys.readouterr().out
    store = Store.open(tmp_path / "s")
    assert sorted(store.ids.to_pylist()) == ["b.txt:0", "b.txt:1", "sub/a.txt:0"]
    assert main([*words, "--out", str(tmp_path / "s"), "--resume"]) == 0
    (tmp_path / "data" / "sub" / "a.txt").write_text("seven eight", encoding="utf-8")
    assert main([*words, "--out", str(tmp_path / "s"), "--resume"]) == 2
    assert "sha256" in capsys.readouterr().err


def test_conversations_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tokenizers

    make_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    # The tokenizer puts <s> before a text, and the template writes it: one is to be there.
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": t}]}
        for i, t in enumerate(sentences(20))
    ]
    write_jsonl(tmp_path / "chat.jsonl", rows)
    words = ["log", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "chat.jsonl")]
    words += ["--rank", "4", "--out", str(tmp_path / "s")]
    assert main(words) == 0
    assert "conversations of 'messages', by the model's chat template" in capsys.readouterr().err
    asked = rows[7]["messages"]
    words = ["query", "--store", str(tmp_path / "s"), "--model", str(tmp_path / "model"), "--chat"]
    words += ["--prompt", asked[0]["content"], "--completion", asked[1]["content"] + "</s>"]
    assert main([*words, "--mode", "whitened-cosine", "--json", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    best = results["queries"][0]["modes"][0]["top"][0]
    assert best["id"] == "7"
    # The question has the row's own tokens and loss, so their gradients are the same, but for the
    # row's float16, 2^-11 of an element.
    assert best["score"] == pytest.approx(1, abs=1e-3)
    # Another loss is another corpus.
    again = ["log", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "chat.jsonl")]
    again += ["--rank", "4", "--out", str(tmp_path / "s"), "--resume", "--chat-loss", "all"]
    assert main(again) == 2
    assert "chat" in capsys.readouterr().err


def test_an_interrupted_run_over_standard_input_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import argparse

    from logra_kernels.cli.log import _say_how_to_go_on

    _say_how_to_go_on(argparse.Namespace(data="-", command_line=["log", "--data", "-"]))
    err = capsys.readouterr().err
    assert "Standard input cannot be read again" in err
    assert "--resume" not in err
