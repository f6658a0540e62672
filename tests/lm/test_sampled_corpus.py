"""`log_corpus(labels="sampled")` and `logra log --labels sampled`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import make_model, sentences, write_jsonl

from logra_kernels import Config, Run
from logra_kernels.cli import main
from logra_kernels.curvature import KroneckerCurvature, load_curvature
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example, Record, TokenSettings, encode
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.lm.log import LoggingProgress, log_corpus
from logra_kernels.projection import ProjectionSpec
from logra_kernels.store import Store

pytest.importorskip("transformers")

PARTS = ["mlp.up_proj", "mlp.down_proj"]
COUNT = 24


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return CausalLM.load(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def examples(lm: CausalLM) -> list[Example]:
    records = [Record(str(i), text) for i, text in enumerate(sentences(COUNT))]
    return [encode(record, lm.tokenizer, TokenSettings())[0][0] for record in records]


def logged(
    path: Path, lm: CausalLM, examples: list[Example], **options: Any
) -> LoggingProgress | None:
    gradients = LMGradients(lm, lm.linear_modules(PARTS), ProjectionSpec(rank=6))
    return log_corpus(
        gradients,
        examples,
        path,
        settings={},
        data={},
        store_dtype="float32",
        curvature="ekfac",
        labels="sampled",
        **options,
    )


def test_it_is_the_curvature_of_a_users_loop(
    tmp_path: Path, lm: CausalLM, examples: list[Example]
) -> None:
    """Relative to the largest 1e-5: batches are others, and so are the model's last bits."""
    logged(tmp_path / "lm", lm, examples)
    store = Store.open(tmp_path / "lm")
    run = Run("own", Config(root_dir=str(tmp_path), dtype="float32"))
    run.watch(lm.model, name_filter=PARTS)
    run.add_lora(rank=6)
    run.setup({"save": "grad", "statistic": "ekfac", "labels": "sampled"})

    def loop(sampled: bool) -> None:
        for example in examples:
            batch = lm.collate([example])
            with run([example.id], batch["attention_mask"]):
                lm.summed_loss(batch, [example.id] if sampled else None).backward()

    loop(sampled=False)
    for _ in run.curvature_passes():
        loop(sampled=True)
    run.finalize()
    got, want = load_curvature(store), run.curvature
    assert isinstance(got, KroneckerCurvature)
    assert isinstance(want, KroneckerCurvature)
    assert (got.labels, got.count) == ("sampled", COUNT)
    for name, sides in want.moments.items():
        for a, b in zip(got.moments[name], sides, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))
        energy, expected = (float(c.eigenvalues[name].sum()) for c in (got, want))  # E‖G‖²
        assert energy == pytest.approx(expected, rel=1e-5)


def test_labels_are_drawn_where_the_loss_is(lm: CausalLM) -> None:
    """Of an answer given a prompt, the prompt's tokens bear no loss, sampled or not."""
    (example,), _ = encode(Record("a", " the end", "once upon"), lm.tokenizer, TokenSettings())
    batch = lm.collate([example])
    all_borne = {**batch, "labels": batch["input_ids"]}
    with torch.no_grad():
        part, whole = (float(lm.summed_loss(b, ["a"])) for b in (batch, all_borne))
    assert 0 < part < whole


def test_an_interrupted_pass_begins_anew(
    tmp_path: Path, lm: CausalLM, examples: list[Example]
) -> None:
    logged(tmp_path / "whole", lm, examples)
    seen: list[int] = []

    def report(progress: LoggingProgress) -> None:
        seen.append(progress.sampled_pass)

    stopped = logged(
        tmp_path / "s", lm, examples, stop=lambda: seen[-1] == 2, report=report, batch_tokens=64
    )
    assert stopped is None
    assert {0, 1, 2} == set(seen)
    finished = logged(tmp_path / "s", lm, examples, resume=True)
    assert finished is not None
    assert finished.resumed == COUNT
    stores = [Store.open(tmp_path / name) for name in ("whole", "s")]
    whole, again = (store.load_curvature("ekfac")[1] for store in stores)
    assert (whole["count"], whole["corrected"]) == (again["count"], again["corrected"])
    seen.clear()
    logged(tmp_path / "s", lm, examples, resume=True, report=report)
    assert set(seen) == {0}  # the store has its curvature


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model")
    write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in sentences(12)])
    words = ["log", "--model", str(tmp_path / "model"), "--rank", "5", "--labels", "sampled"]
    words += ["--out", str(tmp_path / "s")]
    data = ["--data", str(tmp_path / "data.jsonl")]
    assert main([*words, *data, "--curvature", "none"]) == 2
    assert "labels: 'sampled' is of a curvature" in capsys.readouterr().err
    assert main([*words, "--data", "-", "--format", "jsonl"]) == 2
    assert "standard input can be read once" in capsys.readouterr().err
    assert main([*words, *data]) == 0
    assert "12 examples logged" in capsys.readouterr().out
    store = Store.open(tmp_path / "s")
    assert store.curvatures["raw"]["meta"]["labels"] == "sampled"
    assert main(["info", str(tmp_path / "s")]) == 0
    assert "raw, of 12 rows and sampled labels" in capsys.readouterr().out
