"""A tiny causal language model in a Hugging Face folder, with a tokenizer made on the spot."""

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over", "mat"]
WORDS += ["log", "tree", "and", "then", "it", "was", "very", "happy", "sad", "big", "small"]
WORDS += ["red", "blue", "saw", "ate", "met", "my", "your", "old", "new"]


def make_tokenizer(bos: bool = False) -> Any:
    """Byte-level BPE, one token per byte: every text can be encoded; bos puts <s> before it."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    if bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )


def make_model(folder: Path, *, kind: str = "llama", seed: int = 0) -> Path:
    """Write a two-block model and its tokenizer; returns the folder."""
    import transformers

    torch.manual_seed(seed)
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=256
        )
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of 3 to 12 words."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(3, 13, (1,), generator=generator))
        picks = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        texts.append(" ".join(WORDS[i] for i in picks))
    return texts


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
