"""What ruins attribution with a language model and a corpus, before anything is logged."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from logra_kernels.defaults import CURVATURE, NO_CURVATURE, STORE_DTYPE
from logra_kernels.lm.corpus import Example
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.run import NO_BOS, Diagnosis, UsersLoop, examine

BATCH_EXAMPLES = 4  # as they stand in the corpus: of different lengths, so that some are padded


def diagnose(
    gradients: LMGradients,
    corpus: Iterable[Example],
    *,
    examples: int = 8,
    store_dtype: str = STORE_DTYPE,
    curvature: str = CURVATURE,
) -> Diagnosis:
    """Run the corpus's first examples through the model, and read all of it.

    Args:
        gradients: the model and its watched modules.
        corpus: what is to be logged; it is read once.
        examples: how many are run, in batches of four and alone.
        store_dtype, curvature: as they are to be logged.

    Raises:
        ValueError: the corpus has no example or cannot be read, or a bad number of examples.
    """
    lm = gradients.lm
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    batches = _Batches(gradients, corpus)
    loop = UsersLoop(
        lm.summed_loss,
        batches,
        _attention_mask,
        bos_token_id=NO_BOS if bos is None else bos,
        store_dtype=store_dtype,
        curvature=None if curvature == NO_CURVATURE else curvature,
        called=lambda number: repr(batches.ids[number]),
    )
    return examine(gradients.watched, loop, examples=examples, read=1 << 62)


class _Batches:
    """The corpus's examples in batches, as the model takes them."""

    def __init__(self, gradients: LMGradients, corpus: Iterable[Example]) -> None:
        self._gradients = gradients
        self._corpus = corpus
        self.ids: list[str] = []  # of the examples read so far

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        held: list[Example] = []
        for example in self._corpus:
            held.append(example)
            self.ids.append(example.id)
            if len(held) == BATCH_EXAMPLES:
                yield self._gradients.lm.collate(held)
                held = []
        if held:
            yield self._gradients.lm.collate(held)


def _attention_mask(batch: Any) -> Tensor:
    mask: Tensor = batch["attention_mask"]
    return mask
