"""Scores by chance: what a ranking reaches that knows nothing."""

from collections.abc import Sized

import torch
from torch import Tensor


class Random:
    """Scores drawn uniformly from [0, 1); the same for the same seed and place.

    Args:
        num_examples: N.
        seed: any integer.
    """

    def __init__(self, num_examples: int, seed: int = 0) -> None:
        self._num_examples = num_examples
        self._seed = seed

    def scores(self, queries: Sized, /) -> Tensor:
        """[Q, N] float32 for Q queries of any form."""
        generator = torch.Generator().manual_seed(self._seed)
        return torch.rand(len(queries), self._num_examples, generator=generator)
