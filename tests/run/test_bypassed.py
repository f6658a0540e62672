"""Layers by whose weight the model multiplies without calling them, under `watch`."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from logra_kernels.run import Config, Run
from logra_kernels.run.bypassed import is_bypassed


class Bypassing(nn.Module):
    """Uses the weight of four of its five layers, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.plain = nn.Linear(4, 4)
        self.nested = nn.Linear(4, 4)
        nn.init.normal_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x).to(self.called.weight.dtype)
        x = x @ self.right.weight.T + (self.left.weight @ x.transpose(-1, -2)).transpose(-1, -2)
        x = functional.linear(x, self.plain.weight)
        return torch.matmul(torch.tanh(x), self.nested.weight)


class Child(Bypassing):
    """Inherits the code that uses the weights."""


def run_of(tmp_path: Path) -> Run:
    run = Run("r", Config(root_dir=str(tmp_path)))
    run.setup({"log": "grad"})
    return run


@pytest.mark.parametrize("kind", [Bypassing, Child])
def test_layers_used_by_their_weight_are_left_out_with_a_note(
    tmp_path: Path, kind: type[nn.Module]
) -> None:
    run, model = run_of(tmp_path), kind()
    with pytest.warns(UserWarning, match="left out left, right, plain, nested: the model multipl"):
        run.watch(model)
    assert [module.name for module in run.modules] == ["called"]
    with run(data_id=["a", "b"]) as logged:
        model(torch.randn(2, 3, 4)).sum().backward()
    assert logged.rows().shape == (2, 16)


def test_the_projection_of_multihead_attention(tmp_path: Path) -> None:
    """torch's attention hands the weight of out_proj to a function; the pass saw no gradient."""
    run, model = run_of(tmp_path), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match=r"left out self_attn\.out_proj"):
        run.watch(model)
    assert [module.name for module in run.modules] == ["linear1", "linear2"]
    with run(data_id=["a", "b"]) as logged:
        model(torch.randn(2, 3, 8)).square().sum().backward()
    assert logged.rows().shape == (2, 2 * 8 * 16)


def test_a_layer_that_is_named_in_full_is_watched(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.watch(nn.MultiheadAttention(8, 2), name_filter=["out_proj"])
    assert [module.name for module in run.modules] == ["out_proj"]


def test_nothing_is_left(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="left out out_proj"),
        pytest.raises(ValueError, match="watch: the default matches none of the layers out_proj"),
    ):
        run_of(tmp_path).watch(nn.MultiheadAttention(8, 2))


def test_mamba(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2
    )
    run, model = run_of(tmp_path), transformers.MambaForCausalLM(config)
    with pytest.warns(UserWarning, match=r"left out backbone\.layers\.0\.mixer\.dt_proj, back"):
        run.watch(model, name_filter=["mixer"])
    names = [module.name.rpartition(".")[2] for module in run.modules]
    assert names == ["in_proj", "x_proj", "out_proj"] * 2
    tokens = torch.randint(0, 32, (2, 5))
    with run(data_id=["a", "b"]):
        model(input_ids=tokens).logits.square().sum().backward()


def test_source_that_is_not_there_tells_nothing() -> None:
    made: dict[str, Any] = {}
    exec(
        "from torch import nn\n"
        "class Made(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = nn.Linear(2, 2)\n"
        "    def forward(self, x):\n        return x @ self.a.weight\n",
        made,
    )
    assert not is_bypassed(made["Made"](), "a")
