"""A causal language model from a local Hugging Face folder: loading, batches, the summed loss."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.lm.corpus import Example
from logra_kernels.lm.layers import (
    called_on_every_token,
    default_layers,
    in_last_blocks,
    linear_layers,
    patterns,
)
from logra_kernels.run.labels import sample_labels
from logra_kernels.run.recorder import model_fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a saved config says about the file rather than about the model.
IRRELEVANT_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


@dataclass
class CausalLM:
    """A model in evaluation mode with its tokenizer, and what tells it from other models."""

    model: nn.Module
    tokenizer: Any
    path: str
    dtype: str
    fingerprint: dict[str, str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return Path(self.path).resolve().name if Path(self.path).is_dir() else self.path

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, dtype: str = "float32", device: str = "cpu"
    ) -> "CausalLM":
        """Load a model and its tokenizer; nothing is ever downloaded.

        Args:
            path: a Hugging Face folder, or the name of a model in the local Hugging Face cache.
            dtype: "float32" or "bfloat16", what the weights are loaded as.
            device: as torch names it.
        Raises:
            ValueError: an unknown dtype, or no such model here.
            ImportError: transformers is not installed.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        target = _device(device)
        path = os.fspath(path)
        model, tokenizer = _load_pretrained(path, DTYPES[dtype])
        fingerprint = {
            "config": _config_hash(model.config.to_dict()),
            "weights": model_fingerprint(model),
            "tokenizer": _tokenizer_hash(tokenizer),
        }
        return cls(model.eval().to(target), tokenizer, path, dtype, fingerprint)

    def linear_modules(
        self,
        name_filter: Sequence[str] | None = None,
        last_blocks: int | None = None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> list[str]:
        """Names of the linear layers to watch, in the model's order.

        Args:
            name_filter: keep a name that contains one of these, all if empty; None: the layers of
                the blocks outside attention, as `default_layers` says. A layer that a trial pass
                does not call on every token is left out.
            last_blocks: keep the last so many transformer blocks only, told by the first number in
                a name (`model.layers.29.mlp.up_proj` is of block 29).
            note: told what is left out, or chosen otherwise than a user might expect.
        Raises:
            ValueError: nothing is left; the message says what there is.
        """
        if name_filter is None:
            names, sentence = default_layers(self.model)
            if sentence:
                note(sentence)
        else:
            named = linear_layers(self.model)
            names = [n for n in named if not name_filter or any(part in n for part in name_filter)]
            if not names:
                wanted = " or ".join(map(repr, name_filter))
                raise ValueError(
                    f"modules: no linear layer's name contains {wanted};"
                    f" this model has: {patterns(named)}"
                )
        if last_blocks is not None:
            names = in_last_blocks(names, last_blocks)
        called = called_on_every_token(self.model, set(names))
        left_out = [name for name in names if name not in called]
        if left_out:
            why = (
                f"{patterns(left_out)}: not called on every token (an expert, or a layer whose"
                " weight is used without it)"
            )
            if len(left_out) == len(names):
                raise ValueError(f"modules: none can be logged: {why}")
            note(f"left out: {why}")
        return [name for name in names if name in called]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Right-padded input_ids, attention_mask and labels, all [N, T] int64, on the device.

        A label is -100 where no loss is borne: padding, tokens before `loss_start`, `no_loss`.
        """
        longest = max(len(example.tokens) for example in examples)
        shape = (len(examples), longest)
        # The value of a padding token does not matter: no other token attends to it.
        input_ids = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example.tokens)
            input_ids[row, :length] = torch.tensor(example.tokens)
            mask[row, :length] = 1
            labels[row, example.loss_start : length] = input_ids[row, example.loss_start : length]
            for start, end in example.no_loss:
                labels[row, start:end] = -100
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        return {name: value.to(self.device) for name, value in batch.items()}

    def summed_loss(self, batch: dict[str, Tensor], sampled: Sequence[str] | None = None) -> Tensor:
        """Cross entropy of every token given those before it, summed over tokens and examples.

        In nats, float32, a scalar.

        Args:
            batch: of `collate`.
            sampled: the examples' ids; the labels are then next tokens that the model draws for
                them, in the places of the batch's.
        """
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits  # [N, T, V]
        labels = batch["labels"][:, 1:]  # [N, T - 1]
        if sampled is not None:
            borne = labels != -100
            labels = sample_labels(logits[:, :-1], sampled, mask=borne).masked_fill(~borne, -100)
        return nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            labels.flatten(),
            ignore_index=-100,
            reduction="sum",
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy continuations of prompts, in one batch, special tokens left out."""
        encoded = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, encoded))
        end = self.tokenizer.eos_token_id
        padding = end if end is not None else 0
        # On the left: what is generated follows the prompt.
        padded = [[padding] * (longest - len(tokens)) + tokens for tokens in encoded]
        mask = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in encoded]
        output = self.model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
        )
        return [
            str(self.tokenizer.decode(new, skip_special_tokens=True)) for new in output[:, longest:]
        ]

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text; "".join gives the decoded text.

        A token that ends inside a character adds nothing; the one that completes it adds it.
        """
        texts, shown = [], ""
        for count in range(1, len(tokens) + 1):
            text = str(
                self.tokenizer.decode(list(tokens[:count]), clean_up_tokenization_spaces=False)
            )
            whole = text.rstrip("�") if count < len(tokens) else text
            added = whole[len(shown) :] if whole.startswith(shown) else ""
            texts.append(added)
            shown += added
        return texts


def _load_pretrained(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer, from a folder or from the local Hugging Face cache."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
        from transformers.utils import logging
    except ImportError as error:
        install = "pip install 'logra-kernels[hf]'"
        raise ImportError(f"transformers is not installed: {install}") from error
    is_folder = Path(path).is_dir()
    if not is_folder and (Path(path).exists() or path.count("/") != 1):
        raise ValueError(f"model: no folder {path}")
    logging.disable_progress_bar()  # transformers would draw a bar over the weights
    # transformers 5 renamed the argument.
    dtype_key = "torch_dtype" if __version__.startswith("4.") else "dtype"
    # Left unset, transformers would ask the terminal whether to run Python code of the folder.
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
        model = AutoModelForCausalLM.from_pretrained(path, **local, **{dtype_key: dtype})
    except (OSError, ValueError) as error:
        if not is_folder:
            raise ValueError(
                f"model: no folder {path}, and no model of that name in the local cache"
            ) from error
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model: {path} is no causal language model folder: {first}") from error
    return model, tokenizer


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {name!r}: {first}") from error
    return device


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _config_hash(config: dict[str, Any]) -> str:
    kept = {name: value for name, value in config.items() if name not in IRRELEVANT_CONFIG}
    return _digest(json.dumps(kept, sort_keys=True, default=str).encode())


def _tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what turns text into tokens: a fast tokenizer's definition, or the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _digest(backend.to_str().encode())
    return _digest(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
