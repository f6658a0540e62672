"""`logra plan`: what it says of a store is what comes, and `logra info` shows both.

Times are checked to be there, never for their size.
"""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_lm import make_model, sentences, write_jsonl

import logra_kernels.lm.plan as planning
from logra_kernels.cli import main
from logra_kernels.lm.corpus import Example, batches
from logra_kernels.store import Store, codec_names, row_codec

pytest.importorskip("transformers")

COUNT = 90
LOGGABLE = [name for name in codec_names() if row_codec(name).faithful]  # without a pilot
EXACT = ["rows", "ids", "curvature", "projection", "norms"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus, and its plan for rows of every codec."""
    folder = tmp_path_factory.mktemp("files")
    make_model(folder / "model")
    write_jsonl(folder / "data.jsonl", [{"text": text} for text in sentences(COUNT)])
    assert main([*words(folder, "plan"), "--store-dtype", "all", "--json", plan_of(folder)]) == 0
    return folder


def words(files: Path, command: str, *more: str, out: str = "store") -> list[str]:
    """A command with the options that every plan and store of this file has."""
    given = ["--model", str(files / "model"), "--data", str(files / "data.jsonl")]
    given += ["--out", str(files / out), "--batch-tokens", "200", "--shard-rows", "50"]
    given += [] if "eigen" in more else ["--rank", "8"]
    return [command, *given, *(["--seconds", "1"] if command == "plan" else []), *more]


def plan_of(files: Path) -> str:
    return str(files / "plan.json")


def read(path: Path | str) -> dict[str, Any]:
    return dict(json.loads(Path(path).read_text(encoding="utf-8")))


def planned(files: Path, *more: str) -> dict[str, Any]:
    """What a plan of one codec says."""
    assert main([*words(files, "plan", *more), "--json", str(files / "other.json")]) == 0
    (found,) = read(files / "other.json")["codecs"].values()
    return dict(found)


def known(files: Path, store: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """{what: its line} of the plan that `logra info --json` compares with a store."""
    capsys.readouterr()
    assert main(["info", str(files / store), "--json", "-"]) == 0
    return {line["what"]: line for line in json.loads(capsys.readouterr().out)["plan"]}


def ask(files: Path, store: str, *more: str) -> None:
    given = ["--model", str(files / "model"), "--store", str(files / store)]
    assert main(["query", *given, "--text", "the cat sat", *more]) == 0


@pytest.mark.parametrize("dtype", LOGGABLE)
def test_the_bytes_of_a_store_are_exact(
    files: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--store-dtype", dtype, "--plan", plan_of(files))
    assert main(words(files, "log", *more, out=dtype)) == 0
    ask(files, dtype)
    ask(files, dtype)
    found = known(files, dtype, capsys)
    for what in EXACT:
        assert found[what]["planned"] == found[what]["measured"], what
    assert found["manifest"]["planned"] == pytest.approx(found["manifest"]["measured"], rel=0.02)
    store = Store.open(files / dtype)
    listed = [entry for shard in store.manifest["shards"] for entry in shard.values()]
    on_disk = sum((store.path / e["file"]).stat().st_size for e in listed if isinstance(e, dict))
    assert found["rows"]["measured"] + found["ids"]["measured"] == on_disk
    times = ["logging", "first query", "later query", "logging, memory", "query, memory"]
    for what in times:
        assert all(math.isfinite(found[what][key]) for key in ("planned", "measured"))
        assert found[what]["planned"] > 0 < found[what]["measured"]
    assert main(["info", str(files / dtype)]) == 0
    shown = capsys.readouterr().out
    assert f"rows {found['rows']['planned']:,} bytes, as planned" in shown
    assert " s, planned " in shown or " ms, planned " in shown


def test_a_plan_says_what_it_is_of(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = read(plan_of(files))
    assert (made["format"], made["version"]) == ("logra_kernels.plan", 1)
    assert (made["rows"], made["dim"], made["queries"]) == (COUNT, 6 * 8 * 8, 1)
    assert made["tokens"] == sum(len(text.encode()) for text in sentences(COUNT))
    assert list(made["codecs"]) == LOGGABLE
    assert made["estimated"] == ["manifest"]
    for plan in made["codecs"].values():
        assert plan["shards"] == 2
        assert plan["reading"] == "mapped"
        parts, seconds = plan["of_first_query"], plan["seconds"]
        assert seconds["first_query"] == pytest.approx(sum(parts.values()))
        assert seconds["later_query"] == pytest.approx(sum(parts.values()) - parts["norms"])
        assert all(value >= 0 and math.isfinite(value) for value in parts.values())
    assert main([*words(files, "plan", "--rank", "2"), "--queries", "3"]) == 0
    shown = capsys.readouterr().out
    for line in ("bytes a row", "ids", "norms, from a query on", "memory, query", "time, logging"):
        assert line in shown
    assert "time, pilot" not in shown


def test_a_plan_leaves_nothing_behind(files: Path) -> None:
    before = sorted(os.listdir(files))
    assert main(words(files, "plan", "--rank", "2", out="far/away/store")) == 0
    assert sorted(os.listdir(files)) == before


@pytest.mark.parametrize("pilot", ["40", "80"])
def test_a_pilot_is_planned(
    files: Path, tmp_path: Path, pilot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--init", "eigen", "--coordinates", "300", "--store-dtype", "int8"]
    options += ["--pilot", pilot]
    plan = str(tmp_path / "p.json")
    assert main([*words(files, "plan", *options), "--json", plan]) == 0
    shown = capsys.readouterr().out
    store = f"eigen{pilot}"
    assert main(words(files, "log", *options, "--plan", plan, out=store)) == 0
    ask(files, store)
    found = known(files, store, capsys)
    exact = [what for what in EXACT if what != "projection" or pilot == "40"]
    for what in exact:
        assert found[what]["planned"] == found[what]["measured"], what
    assert ("projection, about" in shown) == (pilot == "80")
    assert found["projection"]["planned"] > 0
    assert found["pilot"]["planned"] > 0 < found["pilot"]["measured"]


def test_other_curvatures_and_labels(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = planned(files, "--rank", "3", "--curvature", "none")
    assert plain["bytes"]["curvature"] == 0
    assert plain["of_first_query"]["norms"] == 0
    sampled = ("--rank", "3", "--curvature", "ekfac", "--labels", "sampled")
    plan = str(files / "other.json")
    assert planned(files, *sampled)["bytes"]["curvature"] > 0
    assert read(plan)["estimated"] == ["manifest", "curvature"]
    assert main(words(files, "log", *sampled, "--plan", plan, out="sampled")) == 0
    found = known(files, "sampled", capsys)
    assert found["rows"]["planned"] == found["rows"]["measured"]
    # Up to 255 of a module's inputs and outputs wait to be summed; each has 3 numbers of 4 bytes.
    waiting = 6 * 2 * 255 * 3 * 4
    assert abs(found["curvature"]["planned"] - found["curvature"]["measured"]) <= waiting + 500


def test_a_store_beyond_memory_is_read_from_the_disk(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda: 0)
    assert planned(files, "--rank", "3")["reading"] == "streamed"
    assert "queries read them from the disk" in capsys.readouterr().err


def test_norms_that_take_long_are_timed_on_a_part(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[tuple[str, int, int]] = []
    scan = planning._scan

    def small_blocks(*given: Any, **more: Any) -> tuple[float, int]:
        taken = scan(*given, **more)
        scans.append((given[3], taken[1], given[0].num_rows))
        return taken

    monkeypatch.setattr(planning, "_scan", small_blocks)
    clock = SimpleNamespace(perf_counter=iter(range(10**6)).__next__)
    monkeypatch.setattr(planning, "time", clock)
    monkeypatch.setattr("logra_kernels.attribution.reading.SMALLEST_BLOCK_ROWS", 16)
    monkeypatch.setattr("logra_kernels.attribution.reading.BLOCK_BYTES", 1)
    plan = planned(files, "--rank", "3")
    assert scans[0] == ("l-relatif", 32, COUNT)  # two blocks, a second each, of one second
    assert [mode for mode, *_ in scans[1:]] == ["dot"] * planning.SCANS
    assert plan["of_first_query"]["norms"] > 0


def test_a_resumed_run_has_no_times(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--plan", plan_of(files))
    assert main(words(files, "log", *more, out="again")) == 0
    assert main(words(files, "log", *more, "--resume", out="again")) == 0
    found = known(files, "again", capsys)
    assert "logging" not in found
    assert found["rows"]["planned"] == found["rows"]["measured"]
    assert "norms" not in found  # no query has left any


def test_queries_of_another_kind_are_not_noted(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(files, "log", "--plan", plan_of(files), out="asked")) == 0
    write_jsonl(tmp_path / "q.jsonl", [{"text": text} for text in sentences(2)])
    given = ["--model", str(files / "model"), "--store", str(files / "asked")]
    assert main(["query", *given, "--queries", str(tmp_path / "q.jsonl")]) == 0
    ask(files, "asked", "--mode", "dot")
    ask(files, "asked", "--damping-scale", "0.5")
    ask(files, "asked", "--json", str(tmp_path / "r.json"))
    assert not {"first query", "later query"} & set(known(files, "asked", capsys))
    ask(files, "asked")  # the norms are there already
    found = known(files, "asked", capsys)
    assert "later query" in found
    assert "first query" not in found


def test_a_foreign_file_beside_a_store_is_ignored(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(files, "log", out="foreign")) == 0
    beside = files / "foreign" / "plan.json"
    for text in ("no JSON", "[]", "{}", '{"codecs": {"a": 1, "b": 2}}', '{"codecs": {"a": 1}}'):
        beside.write_text(text, encoding="utf-8")
        assert known(files, "foreign", capsys) == {}
        ask(files, "foreign")
        assert beside.read_text(encoding="utf-8") == text


def test_refusals(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    log = words(files, "log", out="refused")
    assert "no file" in refused([*log, "--plan", str(tmp_path / "none.json")])
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    message = refused([*log, "--plan", str(tmp_path / "bad.json")])
    assert message.endswith("bad.json: expected a file of `logra plan --json`, version 1")
    assert main(words(files, "plan", "--json", str(tmp_path / "one.json"))) == 0
    message = refused([*log, "--store-dtype", "int8", "--plan", str(tmp_path / "one.json")])
    assert message.endswith("one.json is of float16 rows, not of int8")
    message = refused([*log, "--rank", "9", "--plan", plan_of(files)])
    assert message == "logra log: plan: was made for rank 8, this run has 9"
    message = refused([*log, "--limit", "9", "--plan", plan_of(files)])
    assert message == "logra log: plan: was made for limit null, this run has 9"
    assert not (files / "refused").exists()
    plan = words(files, "plan")
    for option, value, wanted in (
        ("--store-dtype", "int3", f"expected one of {', '.join(codec_names())}, all"),
        ("--seconds", "0", "expected a whole number of at least 1"),
        ("--queries", "many", "expected a whole number of at least 1"),
    ):
        names = "--codec/--store-dtype" if option == "--store-dtype" else option
        with pytest.raises(SystemExit, match="2"):
            main([*plan, option, value])
        assert f"argument {names}: {wanted}, got '{value}'" in capsys.readouterr().err
    assert "no folder" in refused([*plan, "--json", str(tmp_path / "no" / "plan.json")])
    place = plan.index("--data") + 1
    message = refused([*plan[:place], "-", *plan[place + 1 :], "--format", "jsonl"])
    assert message == (
        "logra plan: data: a plan reads the data, and standard input can be read once"
    )
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    message = refused([*plan[:place], str(tmp_path / "empty.jsonl"), *plan[place + 1 :]])
    assert message.startswith("logra plan: ")


def test_batches_are_kept_from_all_over_a_corpus() -> None:
    examples = [Example(str(n), "x", "", tuple(range(2 + n % 7)), 1) for n in range(5000)]
    facts = planning.CorpusFacts.of(examples, batch_tokens=20, batch_size=None)
    cut = list(batches(examples, batch_tokens=20))
    assert facts.rows == 5000
    assert facts.tokens == sum(len(example.tokens) for example in examples)
    assert facts.padded_tokens == sum(len(b) * max(len(e.tokens) for e in b) for b in cut)
    places = [cut.index(batch) for batch in facts.sample]
    steps = {after - before for before, after in pairwise(places)}
    assert places[0] == 0
    assert len(steps) == 1
    assert planning.SAMPLED_BATCHES <= len(places) <= 2 * planning.SAMPLED_BATCHES
    assert places[-1] + steps.pop() >= len(cut)
