"""What both systems are given: a model folder, tokens, and the watched modules.

No import of logra_kernels here, nor in ekfac.py: EKFAC may run in an environment without it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """A causal language model in a folder, and windows of T tokens without padding."""

    model: str  # a Hugging Face folder
    tokens: str  # .npy, [N + Q, T] int64: the training examples, then the queries
    num_train: int
    modules: list[str]
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None

    @classmethod
    def read(cls, path: Path) -> Setting:
        """The setting that `write` left in a file."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the setting as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @cached_property
    def all_tokens(self) -> Tensor:
        """The training examples, then the queries, [N + Q, T]."""
        return torch.from_numpy(np.load(self.tokens))

    @property
    def train(self) -> Tensor:
        """[N, T]"""
        return self.all_tokens[: self.num_train]

    @property
    def queries(self) -> Tensor:
        """[Q, T]"""
        return self.all_tokens[self.num_train :]

    def load(self) -> nn.Module:
        """The model on its device, in evaluation mode. Sets torch's threads too."""
        from transformers import AutoModelForCausalLM, __version__
        from transformers.utils import logging

        if self.threads:
            torch.set_num_threads(self.threads)
        logging.disable_progress_bar()
        key = "torch_dtype" if __version__.startswith("4.") else "dtype"
        options: dict[str, Any] = {key: DTYPES[self.dtype], "local_files_only": True}
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.model, **options)
        return model.eval().to(self.device)
