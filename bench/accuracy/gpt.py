"""A small GPT on WikiText: two layers of 96 over 768 blocks of 64 tokens, vocabulary 512.

LOGRA_WIKITEXT names a text file, such as wiki.valid.tokens of WikiText-2, or a folder with
valid.txt. Its first 896 blocks are taken; every seventh is a query, the others teach.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.accuracy.setting import Data, Recipe, Setting

VOCABULARY, TOKENS, WIDTH, LAYERS, HEADS = 512, 64, 96, 2, 4
EXAMPLES, QUERIES = 768, 128


class Block(nn.Module):
    """Pre-norm attention and MLP, as GPT-2's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [n, T, width]
        count, tokens, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(count, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = heads[0] @ heads[1].mT * (width // HEADS) ** -0.5  # [n, HEADS, T, T]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        mixed = weights.masked_fill(later, float("-inf")).softmax(-1) @ heads[2]
        x = x + self.attended(mixed.transpose(1, 2).reshape(count, tokens, width))
        hidden = nn.functional.gelu(self.up(self.norm_2(x)), approximate="tanh")
        out: Tensor = x + self.down(hidden)
        return out


class Gpt(nn.Module):
    """Token ids [n, T] to logits [n, T, VOCABULARY]; the head's weights are the embedding's."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("attended.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * LAYERS) ** (0.5 * into_stream))
            elif "norm" not in name:
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return nn.functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


def load() -> Data:
    """The blocks; answers are the inputs, one token later.

    Raises: FileNotFoundError for a missing text, ValueError for one that is too short.
    """
    path = Path(os.environ.get("LOGRA_WIKITEXT", ""))
    path = path / "valid.txt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError("set LOGRA_WIKITEXT to the valid text of WikiText-2")
    return blocks(path.read_text(encoding="utf-8"), EXAMPLES, QUERIES)


def blocks(text: str, examples: int, queries: int) -> Data:
    """Tokens by a byte-level BPE that is learnt from this text.

    Raises: ValueError for a text that is too short.
    """
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=VOCABULARY, show_progress=False)
    count, size = examples + queries, TOKENS + 1
    ids = tokenizer.encode(text).ids[: count * size]
    if len(ids) < count * size:
        raise ValueError(f"text: expected at least {count * size} tokens, got {len(ids)}")
    whole = torch.tensor(ids).view(count, size)
    asked = torch.zeros(count, dtype=torch.bool)
    asked[(torch.arange(queries) + 1) * (count // queries) - 1] = True
    texts = [tokenizer.decode(block) for block in whole.tolist()]
    known, asking = (
        [text for text, query in zip(texts, asked.tolist(), strict=True) if query == which]
        for which in (False, True)
    )
    rest, query = whole[~asked], whole[asked]
    return Data(rest[:, :-1], rest[:, 1:], query[:, :-1], query[:, 1:], (known, asking))


SETTING = Setting(
    name="gpt",
    title="GPT of 277,000 weights on WikiText-2",
    load=load,
    model=Gpt,
    recipe=Recipe("adamw", 3e-3, 0.01, batch=16, epochs=10, bf16=True),
    halves=50,
    seeds=2,
    side_by_side=2,
    removed=(40,),
    asked=20,
    ranks=(16, 32, 64),
    coordinates=(8192, 32768, 65536),
    trak_dim=512,
    representation="norm",
)
