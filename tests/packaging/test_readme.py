"""The README's twenty lines, run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

README = Path(__file__).parents[2] / "README.md"


def batch_of(ids: list[str], seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 64, (len(ids), 10), generator=generator)
    lengths = torch.randint(4, 11, (len(ids), 1), generator=generator)
    mask = (torch.arange(10) < lengths).long()
    labels = input_ids.masked_fill(mask == 0, -100)
    return {"id": ids, "input_ids": input_ids, "attention_mask": mask, "labels": labels}


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels, reduction="sum", ignore_index=-100
    )


def test_the_twenty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    names = [[f"{n}-{i}" for i in range(4)] for n in range(3)]
    batches = [batch_of(ids, seed) for seed, ids in enumerate(names)]
    twin = {key: value[1:2] for key, value in batches[2].items()}  # the question is example 2-1
    monkeypatch.chdir(tmp_path)
    given = {
        "model": transformers.LlamaForCausalLM(config),
        "train_loader": batches,
        "answer": twin,
        "loss_of": loss_of,
    }
    exec(compile(code, str(README), "exec"), given)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10, "five most and five least influential examples"
    assert lines[0].split()[:2] == ["top", "1"]
    assert lines[0].split()[-1] == "2-1", "an example is most influential for itself"
