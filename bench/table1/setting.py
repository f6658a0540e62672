"""What both systems are given: a model folder, tokens, and the watched modules."""

from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.models import llama
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Corpus, TokenSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES = 256  # tokens of a model that reads bytes


@dataclass(frozen=True)
class Setting:
    """A causal language model in a folder, and windows of T tokens without padding."""

    model: Path  # a Hugging Face folder
    tokens: Tensor  # [N + Q, T]: the training examples, then the queries
    num_train: int
    modules: list[str]
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    @property
    def train(self) -> Tensor:
        """[N, T]"""
        return self.tokens[: self.num_train]

    @property
    def queries(self) -> Tensor:
        """[Q, T]"""
        return self.tokens[self.num_train :]

    @property
    def title(self) -> str:
        with torch.device("meta"):
            model = empty_model(self.model)
        watched = sum(model.get_submodule(name).weight.numel() for name in self.modules)
        whole = sum(parameter.numel() for parameter in model.parameters())
        where = f"{self.threads} threads"
        if torch.device(self.device).type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        return (
            f"Table 1: {self.model.name}, {whole / 1e6:.1f}M weights, {watched / 1e6:.1f}M in"
            f" {len(self.modules)} watched layers, {self.num_train} examples of"
            f" {self.tokens.shape[1]} tokens, {self.dtype}, {where}"
        )

    def load(self) -> nn.Module:
        """The model on its device, in evaluation mode. Sets torch's threads too."""
        from transformers import AutoModelForCausalLM, __version__
        from transformers.utils import logging

        torch.set_num_threads(self.threads)
        logging.disable_progress_bar()
        key = "torch_dtype" if __version__.startswith("4.") else "dtype"
        options: dict[str, Any] = {key: DTYPES[self.dtype], "local_files_only": True}
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.model, **options)
        return model.eval().to(self.device)


def random_llama(folder: Path, **sizes: int) -> Path:
    """A Llama over bytes with random weights, in a Hugging Face folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    llama(vocabulary=BYTES, max_position_embeddings=4096, **sizes).save_pretrained(folder)
    return folder


def empty_model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def module_names(folder: Path) -> list[str]:
    """The linear layers of the MLPs, which are watched."""
    with torch.device("meta"):
        lm = CausalLM(empty_model(folder), None, str(folder), "float32", {})
    return lm.linear_modules(["mlp"], None)


def windows(text: Path | None, model: Path, count: int, length: int) -> Tensor:
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
            whole = tokenizer(reference_text(), add_special_tokens=False, verbose=False)
            tokens = list(whole["input_ids"][:wanted])
        else:
            corpus = Corpus(text, tokenizer, TokenSettings(max_tokens=length, long="split"))
            examples = (example.tokens for example in corpus)
            tokens = list(islice(chain.from_iterable(examples), wanted))
    elif text is None or text.suffix == ".txt":
        data = reference_text().encode() if text is None else text.read_bytes()
        tokens = list(data[:wanted])
    else:
        raise ValueError(f"text: a model that reads bytes takes a .txt file, got {text.name}")
    if len(tokens) < wanted:
        raise ValueError(
            f"text: expected {count} windows of {length} tokens, got {len(tokens) // length};"
            " fewer or shorter examples are needed, or a longer text"
        )
    return torch.tensor(tokens).reshape(count, length)


def reference_text() -> str:
    """The pages of the Python language reference, joined."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
