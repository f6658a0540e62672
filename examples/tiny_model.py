"""A language model small enough for an example: two blocks, 48 sentences, 60 steps of training.

It is trained once, and kept in ./tiny_model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path("tiny_model")
COOKS = ["the baker", "my aunt", "an old cook", "the new chef"]
DISHES = [
    "bakes bread in a hot oven",
    "stirs the soup with a wooden spoon",
    "cuts onions and garlic for the sauce",
    "salts the water before the pasta goes in",
]
SAILORS = ["the captain", "a young sailor", "the tired crew", "our pilot"]
VOYAGES = [
    "steers the ship towards the harbour",
    "takes in the sails before the storm",
    "watches the lighthouse from the deck",
    "drops the anchor near the island",
]
GARDENERS = ["the gardener", "a neighbour", "her father", "the girl next door"]
CHORES = [
    "waters the roses before sunrise",
    "digs a bed for carrots and beans",
    "prunes the apple tree in winter",
    "plants tulips along the garden wall",
]
TRAIN = [
    f"{who} {does}"
    for people, deeds in ((COOKS, DISHES), (SAILORS, VOYAGES), (GARDENERS, CHORES))
    for who in people
    for does in deeds
]
TEST = ["the captain stirs the soup", "the tired crew takes in the sails", "a neighbour waters"]


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The trained model, in evaluation mode, and its tokenizer: one token for each word."""
    if not FOLDER.exists():
        tokenizer = make_tokenizer()
        model = train(tokenizer)
        tokenizer.save_pretrained(FOLDER)
        model.save_pretrained(FOLDER)
    model = LlamaForCausalLM.from_pretrained(FOLDER).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(FOLDER)


def batches(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], size: int
) -> list[dict[str, torch.Tensor]]:
    """input_ids, attention_mask and labels, padded on the right; padding has the label -100."""
    made = []
    for begin in range(0, len(texts), size):
        batch = tokenizer(texts[begin : begin + size], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        mask = batch["attention_mask"]
        made.append({"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels})
    return made


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the words of the training texts."""
    words = sorted({word for text in TRAIN for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def train(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A two-block Llama, trained on the training texts."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    (batch,) = batches(tokenizer, TRAIN, len(TRAIN))
    labels = batch.pop("labels")
    for _ in range(60):
        logits = model(**batch).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
