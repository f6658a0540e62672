"""The contract of every way to score training examples."""

from typing import Protocol, TypeVar

from torch import Tensor

Queries = TypeVar("Queries", contravariant=True)


class Scores(Protocol[Queries]):
    """Something that was made from N training examples and scores them for queries.

    Queries have the form that the training examples had: gradient rows, hidden states, texts.
    """

    def scores(self, queries: Queries, /) -> Tensor:
        """[Q, N] float32 on the CPU; the larger a score, the more the example matters."""
