"""The command `logra`, end to end on a tiny model in a folder: files in, rankings out."""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from dense_influence import gradients, make_store
from tiny_lm import make_model, sentences, write_jsonl
from tree import environment, output

from logra_kernels import attribution
from logra_kernels.cli import main
from logra_kernels.curvature import DiagonalCurvature
from logra_kernels.store import Store

transformers = pytest.importorskip("transformers")

COMMAND = [sys.executable, "-m", "logra_kernels.cli"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, one corpus in three formats, and a finished store."""
    folder = tmp_path_factory.mktemp("files")
    make_model(folder / "model")
    make_model(folder / "other", seed=1)
    rows = [
        {"uid": f"s{i}", "body": text, "ask": "say: ", "name": f"Sentence {i}"}
        for i, text in enumerate(sentences(40))
    ]
    write_jsonl(folder / "data.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    (folder / "data.txt").write_text("\n".join(sentences(40)), encoding="utf-8")
    (folder / "empty.jsonl").write_text("", encoding="utf-8")
    assert main([*log_words(folder), "--out", str(folder / "store")]) == 0
    return folder


def log_words(files: Path, data: str = "data.jsonl") -> list[str]:
    words = ["log", "--model", str(files / "model"), "--data", str(files / data), "--rank", "4"]
    if data != "data.txt":
        words += ["--text-field", "body", "--id-field", "uid", "--title-field", "name"]
    return words


def query_words(files: Path, store: str = "store") -> list[str]:
    return ["query", "--store", str(files / store), "--model", str(files / "model")]


def failure(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one sentence that a failing command says."""
    capsys.readouterr()
    assert main(words) == 2
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith(f"logra {words[0]}:")
    ]
    assert len(lines) == 1
    return lines[0]


def rows_by_id(path: Path) -> dict[str, bytes]:
    """Each row's bytes and scale, wherever it stands."""
    store = Store.open(path)
    ids = store.ids.to_pylist()
    found = {}
    for shard in store.shards:
        for i in range(shard.num_rows):
            scale = np.float32(shard.row_scale[i]).tobytes()
            found[ids[shard.first_row + i]] = shard.rows[i].tobytes() + scale
    return found


# --- log


def test_jsonl_and_parquet_give_the_same_rows(files: Path, tmp_path: Path) -> None:
    assert main([*log_words(files, "data.parquet"), "--out", str(tmp_path / "p")]) == 0
    assert rows_by_id(tmp_path / "p") == rows_by_id(files / "store")


def test_rows_equal_a_batch_of_one_loop(files: Path) -> None:
    """Float32 model against autograd on a float64 copy: 1e-4 of the row's largest element covers
    the float32 passes (about 1e-6 each) and the stored float16 (2^-11 = 5e-4 of an element)."""
    store = Store.open(files / "store")
    model = transformers.AutoModelForCausalLM.from_pretrained(files / "model").double()
    from logra_kernels.projection import stored_projections

    projections = stored_projections(store)
    for row in (0, 7, 23):
        (metadata,) = store.metadata([row])
        assert metadata is not None
        ids = torch.tensor([metadata["tokens"]])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        model.zero_grad()
        loss.backward()
        parts = []
        for module in store.modules:
            grad = model.get_submodule(module.name).weight.grad  # [O, I]
            p = projections[module.name]
            assert p.proj_in is not None
            assert p.proj_out is not None
            parts.append((p.proj_out.double() @ grad @ p.proj_in.double().T).flatten())
        wanted = torch.cat(parts)
        got = torch.from_numpy(store.row(row)).double()
        assert (got - wanted).abs().max() <= 6e-4 * wanted.abs().max()


def test_text_is_cut_in_passages(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*log_words(files, "data.txt"), "--max-tokens", "64", "--out", str(tmp_path / "t")]
    assert main([*words, "--limit", "9"]) == 0
    store = Store.open(tmp_path / "t")
    assert sorted(store.ids.to_pylist()) == [str(i) for i in range(9)]
    assert all(m is not None and len(m["tokens"]) == 64 for m in store.metadata(range(9)))
    assert "9 examples logged" in capsys.readouterr().out


def test_gpt2_and_its_conv1d_layers(files: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "gpt2", kind="gpt2")
    words = ["log", "--model", str(tmp_path / "gpt2"), "--data", str(files / "data.txt")]
    out = str(tmp_path / "s")
    assert (
        main([*words, "--max-tokens", "64", "--rank", "4", "--last-blocks", "1", "--out", out]) == 0
    )
    names = [module.name for module in Store.open(out).modules]
    assert names == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    words = ["query", "--store", out, "--model", str(tmp_path / "gpt2"), "--text", "the cat sat"]
    assert main(words) == 0


def test_existing_store_needs_resume_and_is_left_alone(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_by_id(files / "store")
    message = failure(capsys, [*log_words(files), "--out", str(files / "store")])
    assert message.endswith("there is a store already; --resume goes on with it")
    assert main([*log_words(files), "--out", str(files / "store"), "--resume"]) == 0
    assert "40 were in the store already" in capsys.readouterr().out
    assert rows_by_id(files / "store") == before


def test_resume_with_other_settings_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*log_words(files), "--out", str(files / "store"), "--resume", "--seed", "5"]
    assert "projection" in failure(capsys, words)
    words = [*log_words(files), "--out", str(files / "store"), "--resume", "--max-tokens", "9"]
    assert "tokens" in failure(capsys, words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "none.jsonl"}, "data: no file"),
        ({"--data": "empty.jsonl"}, "holds no text of two tokens or more"),
        ({"--text-field": "content"}, "no field 'content' (it has: ask, body, name, uid)"),
        ({"--model": "nowhere"}, "model: no folder"),
        ({"--modules": "expert"}, "no linear layer's name contains 'expert'; this model has: "),
        ({"--stride": "600"}, "stride: expected 1 to max_tokens = 512, got 600"),
        ({"--device": "abacus"}, "device: cannot use 'abacus'"),
    ],
)
def test_bad_log_arguments(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    words = [*log_words(files), "--out", str(tmp_path / "new")]
    for option, value in change.items():
        if option in ("--data", "--model"):
            value = str(files / value)
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    assert message in failure(capsys, words)
    # Nothing half-written that a second try would stumble over.
    assert not (tmp_path / "new").exists()


# --- interrupted and resumed


def start_and_interrupt(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `logra`, and send SIGINT when it shows that a batch is done."""
    process = subprocess.Popen(
        [*COMMAND, *words], stderr=subprocess.PIPE, text=True, bufsize=1, env=environment()
    )
    assert process.stderr is not None
    said = ""
    while not re.search(r"[1-9]\d*/\d+ \[", said):
        piece = process.stderr.read(1)
        assert piece, f"ended before a batch was done: {said}"
        said += piece
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.wait(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, "", said + rest)


def test_interrupted_run_resumes_to_the_same_store(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Long enough that the signal arrives in the middle: some seconds, in batches of eight or less.
    texts = sentences(4000, seed=2)
    rows = [{"uid": f"s{i}", "body": text} for i, text in enumerate(texts)]
    write_jsonl(tmp_path / "long.jsonl", rows)
    words = ["log", "--model", str(files / "model"), "--data", str(tmp_path / "long.jsonl")]
    words += ["--text-field", "body", "--id-field", "uid", "--rank", "4", "--shard-rows", "300"]
    words += ["--batch-tokens", "256", "--batch-size", "8"]
    # One thread on both sides: the bits of a matrix product may depend on their number, and two
    # processes of two threads each stand in each other's way.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))

    ended = start_and_interrupt([*words, "--out", str(tmp_path / "a")])
    assert ended.returncode == 130, ended.stderr
    partial = Store.open(tmp_path / "a")
    assert 0 < partial.num_rows < len(texts)
    assert not partial.finalized

    printed = next(
        line for line in ended.stderr.splitlines() if line.strip().startswith("logra log --model")
    )
    again = shlex.split(printed)
    assert again == ["logra", *words, "--out", str(tmp_path / "a"), "--resume"]
    assert main(again[1:]) == 0
    assert main([*words, "--out", str(tmp_path / "b")]) == 0

    resumed, whole = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    assert resumed.finalized
    assert resumed.ids.to_pylist() == whole.ids.to_pylist()
    assert rows_by_id(tmp_path / "a") == rows_by_id(tmp_path / "b")
    left, right = resumed.load_curvature("raw"), whole.load_curvature("raw")
    assert left[1] == right[1]
    assert all(np.array_equal(left[0][name], right[0][name]) for name in right[0])
    assert main(["verify", str(tmp_path / "a")]) == 0


# --- query


def test_query_finds_the_text_itself(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (metadata,) = Store.open(files / "store").metadata([11])
    assert metadata is not None
    text = metadata["text"]
    assert main([*query_words(files), "--text", text, "--top-k", "3", "--least"]) == 0
    out = capsys.readouterr().out
    first = next(line for line in out.splitlines() if re.match(r"\s+1  \+", line))
    assert "Sentence" in first
    assert text in out.split("most influential")[1].split("  2  ")[0]
    assert "l-RelatIF: least influential" in out


def test_query_results_are_the_attributors(files: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"text": "the cat sat on the mat"}\n'
        '{"id": "two", "prompt": "say: ", "completion": "my old dog"}\n',
        encoding="utf-8",
    )
    words = [*query_words(files), "--queries", str(tmp_path / "q.jsonl"), "--top-k", "4"]
    for mode in ("dot", "l-relatif", "gradient-dot", "l2"):
        words += ["--mode", mode]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [query["id"] for query in results["queries"]] == ["1", "two"]

    from logra_kernels.lm.causal_lm import CausalLM
    from logra_kernels.lm.corpus import Record, TokenSettings, encode
    from logra_kernels.lm.gradients import LMGradients

    store = Store.open(files / "store")
    lm = CausalLM.load(files / "model")
    record = Record("two", "my old dog", "say: ")
    ((example,), _) = encode(record, lm.tokenizer, TokenSettings())
    assert example.loss_start == 5
    rows = LMGradients.of_store(store, lm).rows([example])
    for mode, attributor in (
        ("l-relatif", attribution.Attributor(store)),
        ("gradient-dot", attribution.Attributor(store, "none")),
    ):
        found = next(m for m in results["queries"][1]["modes"] if m["mode"] == mode)
        wanted = attributor.top_k(rows, 4, mode="dot" if mode == "gradient-dot" else mode)
        assert [p["id"] for p in found["top"]] == wanted.top_ids[0]
        assert [p["id"] for p in found["bottom"]] == wanted.bottom_ids[0]
        scores = torch.tensor([p["score"] for p in found["top"]])
        # The same float32 scan of the same rows.
        torch.testing.assert_close(scores, wanted.top_scores[0], rtol=1e-6, atol=0)


def test_each_of_several_dampings_is_a_query_of_its_own(files: Path, tmp_path: Path) -> None:
    """Equal bits in results and tables; a mode without a curvature is ranked once."""
    words = [*query_words(files), "--text", "the cat sat on the mat", "--tokens", "both"]
    words += ["--mode", "dot", "--mode", "l-relatif", "--mode", "gradient-dot"]

    def asked(name: str, scales: str) -> tuple[dict[str, Any], list[str]]:
        path = tmp_path / name
        outputs = ["--json", f"{path}.json", "--scores", f"{path}.csv"]
        assert main([*words, "--damping-scale", scales, *outputs]) == 0
        results = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        return results, Path(f"{path}.csv").read_text(encoding="utf-8").splitlines()

    several, table = asked("several", "0.01,1,auto,1")
    found = several["queries"][0]["modes"]
    keys = [(m["mode"], m.get("damping_scale", m.get("damping_rule"))) for m in found]
    curved = [(mode, scale) for mode in ("dot", "l-relatif") for scale in (0.01, 1.0, "auto")]
    assert keys == [*curved, ("gradient-dot", None)]
    assert table[0] == "query,mode,damping_scale,row,id,score"
    for n, scale in enumerate((0.01, 1.0, "auto")):
        single, own_table = asked("single", str(scale))
        assert "dampings" not in single["curvature"]
        alone = {**single["curvature"]}
        assert alone.pop("kind") == several["curvature"]["kind"]
        assert alone == several["curvature"]["dampings"][n]
        own = single["queries"][0]["modes"]
        assert all("damping_scale" not in mode for mode in own)
        for place, want in zip((n, n + 3, 6), own, strict=True):
            got = found[place]
            assert got["mode"] == want["mode"]
            assert (got["top"], got["bottom"]) == (want["top"], want["bottom"])
        assert own_table[0] == "query,mode,row,id,score"
        lines = [line.split(",") for line in table[1:]]
        assert [
            ",".join([*line[:2], *line[3:]]) for line in lines if line[2] in (str(scale), "")
        ] == own_table[1:]


def test_a_page_and_a_table_of_several_dampings(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*query_words(files), "--text", "the cat sat on the mat", "--damping-scale", "0.01,2"]
    results, page, table = (str(tmp_path / name) for name in ("r.json", "r.html", "r.csv"))
    assert main([*words, "--json", results, "--scores", table, "--scores-of", "ranked"]) == 0
    printed = capsys.readouterr().out
    ranked = Path(table).read_text(encoding="utf-8")
    assert ranked.startswith("query,mode,damping_scale,row,id,score,end,rank\n")
    assert len(ranked.splitlines()) == 1 + 2 * 2 * 5
    assert main(["report", "--results", results, "--html", page, "--scores", table]) == 0
    assert Path(table).read_text(encoding="utf-8") == ranked
    html = Path(page).read_text(encoding="utf-8")
    for scale in ("0.01", "2.0"):
        assert f"l-RelatIF, damping scale {scale}: most influential" in printed
        assert f"<h3>l-RelatIF, damping scale {scale}</h3>" in html
        assert f"l-RelatIF, damping scale {scale}: #" in html
    assert "λ = 0.01 × mean eigenvalue, per module; λ = 2 × mean eigenvalue, per module" in html


def test_token_contributions_sum_to_the_score(files: Path, tmp_path: Path) -> None:
    words = [*query_words(files), "--text", "the cat sat on the mat", "--json"]
    words += [str(tmp_path / "r.json"), "--mode", "dot", "--mode", "l-relatif", "--mode", "l2"]
    assert main(words) == 0
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    dot, relatif, l2 = results["queries"][0]["modes"]
    for passage in dot["top"] + relatif["top"]:
        values = [value for _, value in passage["tokens"]]
        # Contributions are written with four digits.
        slack = 5e-4 * sum(map(abs, values))
        assert abs(sum(values) - passage["score"]) <= slack
        assert "".join(text for text, _ in passage["tokens"]) == passage["text"]
        assert "query_tokens" not in passage
    # l2 is not linear in the passage's gradient: it has no shares.
    assert all("tokens" not in passage for passage in l2["top"])


def test_the_querys_tokens_sum_to_the_score_of_each_passage(files: Path, tmp_path: Path) -> None:
    """Those of a passage that is the query itself are the passage's own."""
    text = Store.open(files / "store").metadata([3])[0]["text"]  # type: ignore[index]
    words = [*query_words(files), "--text", text, "--json", str(tmp_path / "r.json")]
    words += ["--html", str(tmp_path / "r.html"), "--tokens", "both"]
    assert main([*words, "--mode", "dot", "--mode", "gradient-dot", "--mode", "l2"]) == 0
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    dot, plain, l2 = results["queries"][0]["modes"]
    for passage in dot["top"] + plain["top"]:
        values = [value for _, value in passage["query_tokens"]]
        assert abs(sum(values) - passage["score"]) <= 5e-4 * sum(map(abs, values))
        assert "".join(part for part, _ in passage["query_tokens"]) == text
        if passage["text"] == text:
            slack = 2e-3 * max(map(abs, values))
            for (_, mine), (_, theirs) in zip(
                passage["query_tokens"], passage["tokens"], strict=True
            ):
                assert abs(mine - theirs) <= slack
    assert any(passage["text"] == text for passage in plain["top"])
    assert all("query_tokens" not in passage for passage in l2["top"])
    assert "The query, as this passage moves it" in (tmp_path / "r.html").read_text("utf-8")
    assert main([*words[:-1], "none"]) == 0
    again = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert all("tokens" not in p for m in again["queries"][0]["modes"] for p in m["top"])


def test_other_model_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = query_words(files)
    words[words.index("--model") + 1] = str(files / "other")
    message = failure(capsys, [*words, "--text", "the cat sat"])
    assert "is not the model that" in message
    assert re.search(r"expected weights [0-9a-f]{16}, got [0-9a-f]{16}$", message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--text", "the cat", "--top-k", "41"],
            "top_k: expected at most 40, the rows in the store",
        ),
        ([], "expected one of --text, --completion, --queries, got none"),
        (["--text", ""], "--text: expected some text, got an empty string"),
        (["--text", "a b", "--completion", "c"], "got --text and --completion"),
        (["--text", "a b", "--prompt", "c"], "--prompt goes with --completion"),
        (["--text", "x"], "expected text of at least two tokens"),
        (["--queries", "none.jsonl"], "queries: no file none.jsonl"),
        (["--text", "a b", "--html", "no/such/folder/x.html"], "html: no folder"),
        (["--prompt", "a", "--completion", "b", "--chat"], "has no chat template"),
    ],
)
def test_bad_query_arguments(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in failure(capsys, [*query_words(files), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["query", "--mode", "best"], "argument --mode: expected one of dot, l-relatif, l2"),
        (["query", "--top-k", "0"], "argument --top-k: expected a whole number of at least 1"),
        (["query", "--damping", "-1"], "argument --damping: expected a number of at least 0"),
        (
            ["query", "--damping-scale", "most"],
            "argument --damping-scale: expected a number of at least 0 or auto, got 'most'",
        ),
        (["query", "--damping-scale", "0.1,"], "number of at least 0 or auto, got ''"),
        (["query", "--damping", "1", "--damping-scale", "1"], "not allowed with argument"),
        (["log", "--dtype", "int8"], "argument --dtype: expected one of float32, bfloat16"),
        (["log"], "the following arguments are required: --model, --data, --out"),
        (["guess"], "invalid choice: 'guess'"),
    ],
)
def test_argparse_refuses(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"id": "x"}', 'line 1: expected "text", or "prompt" and "completion"'),
        ('{"text": "a", "completion": "b"}', 'line 1: expected "text", or "prompt"'),
        ('{"text": "a", "mode": "dot"}', 'line 1: key "mode" does not belong'),
        ('{"text": 3}', "line 1: text: expected a string, got int"),
        ("", "holds no query"),
    ],
)
def test_bad_query_files(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "q.jsonl").write_text(line + "\n", encoding="utf-8")
    words = [*query_words(files), "--queries", str(tmp_path / "q.jsonl")]
    assert message in failure(capsys, words)


def test_a_store_of_something_else_is_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from logra_kernels.store import Module, StoreWriter

    with StoreWriter.create(
        tmp_path / "s", modules=[Module("fc", 2, 2)], dtype="float32"
    ) as writer:
        writer.append(["a"], np.ones((1, 4), np.float32))
    words = ["query", "--store", str(tmp_path / "s"), "--model", str(files / "model")]
    assert "was not written by `logra log`" in failure(capsys, [*words, "--text", "the cat"])


# --- info, verify, report, help


def test_info_says_what_a_store_holds(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(files / "store")]) == 0
    out = capsys.readouterr().out
    assert "40 in 1 shard" in out
    assert "96 numbers, float16" in out
    assert "normal, rank 4 × 4, seed 0" in out
    assert "raw, of 40 rows" in out
    assert "model, float32, weights " in out
    assert "model.layers.1.mlp.down_proj  [4, 4]" in out
    assert "effective" not in out
    assert main(["info", str(files)]) == 2


def test_info_with_the_effective_dimensions(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open(files / "store")
    words = ["info", str(files / "store"), "--curvature"]
    want = attribution.Attributor(store).preconditioner.effective_dimensions()
    assert main([*words, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["effective_dimensions"]
    assert (found["kind"], found["damping_scale"]) == ("raw", 0.1)
    assert found["modules"] == pytest.approx(want)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "d_λ of raw, λ = 0.1 × mean eigenvalue" in out
    name, largest = max(want.items(), key=lambda item: item[1])
    assert f"{name}  {largest:.1f} of 16\n" in out
    assert f"40 rows are fewer than 10 for each of the {largest:.1f} effective dimensions" in out
    assert found["advice"] in out

    # Each eigenvalue of a diagonal is a mean of its own: there is nothing to advise.
    few = make_store(tmp_path / "few", gradients(30))
    DiagonalCurvature.rebuild(few).save(few)
    assert main(["info", str(tmp_path / "few"), "--curvature", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["effective_dimensions"]
    assert (found["kind"], found["advice"]) == ("diagonal", None)


def test_damping_by_the_rule(files: Path, tmp_path: Path) -> None:
    words = [*query_words(files), "--text", "the cat sat on the mat", "--damping-scale", "auto"]
    words += ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert main(words) == 0
    curvature = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["curvature"]
    assert curvature["damping_rule"] == "auto"
    assert "damping_scale" not in curvature
    want = attribution.Attributor(files / "store", damping_scale=0.1 + 16 / 40).dampings
    assert curvature["lambdas"] == pytest.approx(want)
    assert "λ by the rule “auto”" in (tmp_path / "r.html").read_text(encoding="utf-8")
    again = ["report", "--results", str(tmp_path / "r.json"), "--html", str(tmp_path / "b.html")]
    assert main(again) == 0


def test_verify_names_the_bad_file(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert main(["verify", str(files / "store")]) == 0
    assert "good: 40 rows in 1 shard" in capsys.readouterr().out
    shutil.copytree(files / "store", tmp_path / "bad")
    shard = tmp_path / "bad" / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 0xFF
    shard.write_bytes(content)
    assert main(["verify", str(tmp_path / "bad")]) == 1
    assert "shard-00000.npy" in capsys.readouterr().out


def test_report_renders_what_query_wrote(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*query_words(files), "--text", "the cat sat on the mat"]
    words += ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "a.html")]
    assert main(words) == 0
    again = ["report", "--results", str(tmp_path / "r.json"), "--html", str(tmp_path / "b.html")]
    assert main(again) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "results: no file" in failure(capsys, ["report", "--results", "no.json", "--html", "x"])


@pytest.mark.parametrize("command", ["log", "query", "info", "verify", "report", "demo"])
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"  logra {command} " in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom logra_kernels.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    output(sys.executable, "-c", code)


def test_a_defect_keeps_its_traceback(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: argparse.Namespace) -> None:
        raise AssertionError("a defect")

    monkeypatch.setattr("logra_kernels.cli.info.run", broken)
    with pytest.raises(AssertionError, match="a defect"):
        main(["info", str(files / "store")])


def test_traceback_on_request(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(files / "none"), "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "passive"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "1000"}, "None"),
    ],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], found: str
) -> None:
    code = (
        "import os; from logra_kernels.cli import main; main(['info', 'nowhere']); "
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    inherited = {name: value for name, value in environment().items() if name not in unset}
    assert output(sys.executable, "-c", code, env={**inherited, **given}).strip() == found
