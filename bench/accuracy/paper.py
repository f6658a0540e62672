"""The paper's settings (arXiv 2405.13954, §4.1 and Table 2), for those who own the data and a GPU.

They have not run here, and Table 2 was not at hand: the figures are to be compared with it before
they are relied on. LOGRA_FASHION_MNIST and LOGRA_CIFAR10 as in the smaller settings;
LOGRA_WIKITEXT103 names the training text of WikiText-103, LOGRA_GPT2 a folder with GPT-2.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.accuracy import mlp, resnet9
from bench.accuracy.setting import Data, Recipe, Setting

IMAGES, QUERIES = 60000, 100
BLOCKS, TOKENS = 4656, 512  # of text


class Logits(nn.Module):
    """A Hugging Face causal model: token ids [n, T] to logits [n, T, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found


def fashion_mnist() -> Data:
    """All training images."""
    return mlp.load(IMAGES, QUERIES)


def cifar10() -> Data:
    """All training images."""
    return resnet9.load(IMAGES, QUERIES)


def resnet9_64() -> nn.Module:
    """ResNet-9 of width 64."""
    return resnet9.resnet9(64)


def gpt2() -> nn.Module:
    """The pretrained model, which is fine-tuned."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_folder(), local_files_only=True)
    model.eval()  # no dropout, so that only the order of the examples differs between seeds
    return Logits(model)


def wikitext() -> Data:
    """Blocks of 512 tokens; the last are queries.

    Raises: FileNotFoundError for a missing text or model.
    """
    from transformers import AutoTokenizer

    path = Path(os.environ.get("LOGRA_WIKITEXT103", ""))
    if not path.is_file():
        raise FileNotFoundError("set LOGRA_WIKITEXT103 to the training text of WikiText-103")
    tokenizer = AutoTokenizer.from_pretrained(_folder(), local_files_only=True)
    count, size = BLOCKS + QUERIES, TOKENS + 1
    with open(path, encoding="utf-8") as file:
        text = file.read(count * size * 8)  # more than the tokens that are wanted
    ids = torch.tensor(tokenizer(text)["input_ids"][: count * size]).view(count, size)
    texts = tokenizer.batch_decode(ids)
    x, y = ids[:, :-1], ids[:, 1:]
    return Data(x[:BLOCKS], y[:BLOCKS], x[BLOCKS:], y[BLOCKS:], (texts[:BLOCKS], texts[BLOCKS:]))


def _folder() -> str:
    folder = os.environ.get("LOGRA_GPT2", "")
    if not Path(folder, "config.json").is_file():
        raise FileNotFoundError("set LOGRA_GPT2 to a folder with GPT-2")
    return folder


_MLP = replace(
    mlp.SETTING,
    title="MLP on all of Fashion-MNIST",
    load=fashion_mnist,
    recipe=Recipe("sgd", 3e-2, 1e-3, batch=64, epochs=20),
    ranks=(16, 32, 64, 128),
    halves=100,
    seeds=5,
)
_RESNET = replace(
    resnet9.SETTING,
    title="ResNet-9 of width 64 on CIFAR-10",
    load=cifar10,
    model=resnet9_64,
    recipe=Recipe("sgd", 0.4, 1e-3, batch=512, epochs=25, bf16=True),
    ranks=(16, 32, 64),
    halves=100,
    seeds=5,
)
_GPT2 = Setting(
    name="gpt",
    title="GPT-2 on WikiText-103",
    load=wikitext,
    model=gpt2,
    recipe=Recipe("adamw", 3e-5, 1e-2, batch=8, epochs=3, bf16=True),
    halves=100,
    seeds=5,
    side_by_side=1,
    removed=(16, 64, 256),
    asked=50,
    ranks=(16, 32, 64),
    coordinates=(32768, 131072, 524288),
    trak_dim=2048,
    representation="model.transformer.ln_f",
    watched=("attn", "mlp"),
)
SETTINGS = {one.name: one for one in (_MLP, _GPT2, _RESNET)}
