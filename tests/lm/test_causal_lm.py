"""Loading a causal language model from a folder."""

import json
from pathlib import Path

import pytest
from tiny_lm import make_model

from logra_kernels.lm.causal_lm import CausalLM


def test_python_code_of_a_model_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask the terminal, and run it at the answer y."""
    folder = make_model(tmp_path / "model")
    (folder / "foreign.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class ForeignConfig(LlamaConfig):\n    model_type = 'foreign'\n"
        "class Foreign(LlamaForCausalLM):\n    config_class = ForeignConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "foreign"
    config["auto_map"] = {
        "AutoConfig": "foreign.ForeignConfig",
        "AutoModelForCausalLM": "foreign.Foreign",
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"no causal language model folder: .* custom code"):
        CausalLM.load(folder)
    assert not (tmp_path / "ran").exists()
