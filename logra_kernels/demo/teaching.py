"""Teaching a model some documents: its last blocks learn, and the blocks below are run once.

The lower blocks stay as they are, so what they make of a document never changes: it is computed
once and kept, and an epoch costs the last blocks and the head only.
"""

import random
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels._native import available_isas
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example
from logra_kernels.progress import Progress, track

FAST_IN_BFLOAT16 = {"avx512_bf16", "amx"}
TAUGHT = "mlp."  # in the names of the layers that are taught: gate, up and down projections
SEED, BATCH, LEARNING_RATE, WARM_UP_STEPS = 0, 4, 1.3e-3, 5


class Teacher:
    """Trains the `TAUGHT` layers of a Llama's last blocks, from the same start each time.

    Args:
        lm: a model in float32; it is trained in place.
        examples: the documents.
        blocks: how many of the last blocks are trained.
        epochs: how often each document is seen.
    """

    def __init__(self, lm: CausalLM, examples: Sequence[Example], blocks: int, epochs: int) -> None:
        self._lm, self._examples, self._epochs = lm, examples, epochs
        model: Any = lm.model
        self._body, self._head = model.model, model.lm_head
        self._last = self._body.layers[len(self._body.layers) - blocks :]
        model.requires_grad_(False)
        self._trained = [p for name, p in self._last.named_parameters() if TAUGHT in name]
        self._start = [parameter.detach().clone() for parameter in self._trained]
        self._inputs = self._inputs_of_last_blocks()
        self._half = bool(FAST_IN_BFLOAT16.intersection(available_isas()))

    def teach(self, left_out: Collection[str] = (), progress: Progress = None) -> None:
        """Train the model, as it was at first, on all documents but those whose id is left out.

        The order of the documents is the same in every call, but for those left out.
        """
        with torch.no_grad():
            for parameter, value in zip(self._trained, self._start, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(True)
        order = random.Random(SEED)
        batches: list[list[int]] = []
        for _ in range(self._epochs):
            shuffled = order.sample(range(len(self._examples)), len(self._examples))
            kept = [n for n in shuffled if self._examples[n].id not in left_out]
            batches += [kept[first : first + BATCH] for first in range(0, len(kept), BATCH)]
        optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / len(batches)),
        )
        done = track(progress, len(batches), "teaching", "step")
        for batch in batches:
            self._loss(batch).backward()
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            done(1)
        self._lm.model.requires_grad_(True)

    @torch.no_grad()
    def _inputs_of_last_blocks(self) -> list[Tensor]:
        """What the first of the last blocks is given, [T, hidden] of each document."""
        place = -1 - len(self._last)
        found = []
        for example in self._examples:
            batch = self._lm.collate([example])
            states = self._body(
                input_ids=batch["input_ids"], output_hidden_states=True
            ).hidden_states
            found.append(states[place][0].clone())
        return found

    def _loss(self, numbers: Sequence[int]) -> Tensor:
        """The mean cross entropy of the tokens of some documents."""
        batch = self._lm.collate([self._examples[n] for n in numbers])
        inputs = nn.utils.rnn.pad_sequence([self._inputs[n] for n in numbers], batch_first=True)
        targets = batch["labels"][:, 1:]
        kept = targets != -100
        whole = self._body.layers
        self._body.layers = self._last
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
                states = self._body(
                    inputs_embeds=inputs, attention_mask=batch["attention_mask"], use_cache=False
                ).last_hidden_state  # [N, T, hidden]
                logits = self._head(states[:, :-1][kept])
        finally:
            self._body.layers = whole
        return nn.functional.cross_entropy(logits.float(), targets[kept])
