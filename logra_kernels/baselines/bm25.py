"""BM25: the words that texts share. It needs the package bm25s (`pip install bm25s`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, case folded; nothing is stemmed or left out."""
    return _WORD.findall(text.casefold())


class Bm25:
    """Okapi BM25 as Lucene has it (Robertson and Zaragoza 2009; Kamphuis et al. 2020).

    score = Σ over the query's words w of idf(w) · f / (f + k1 (1 - b + b·L/mean L)), with
    idf(w) = ln(1 + (N - n + 1/2) / (n + 1/2)): w stands f times in the document of L words, and in
    n of the N documents. A word that comes twice in the query counts twice.

    Args:
        texts: the N documents.
        k1: how soon more of the same word counts for less; at least 0.
        b: how much a long document is held against it, 0 to 1.
        tokenize: text -> its words.

    Raises:
        ModuleNotFoundError: bm25s is not installed.
        ValueError: documents without a word, or a k1 or b out of range.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        k1: float = 1.2,
        b: float = 0.75,
        tokenize: Callable[[str], list[str]] = words,
    ) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"k1, b: expected k1 >= 0 and 0 <= b <= 1, got k1={k1} and b={b}")
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "BM25 needs bm25s: pip install bm25s", name=error.name
            ) from error
        documents = [tokenize(text) for text in texts]
        if not any(documents):
            raise ValueError(f"texts: expected some words in them, got {len(documents)} without")
        self._tokenize = tokenize
        self._count = len(documents)
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b)
        self._index.index(documents, show_progress=False)

    def scores(self, queries: Sequence[str], /) -> Tensor:
        """[Q, N] float32; 0 where no word is shared.

        Raises:
            TypeError: one text instead of a list of them.
        """
        if isinstance(queries, str):
            raise TypeError("queries: expected a list of texts, got one text")
        scores = torch.zeros(len(queries), self._count)
        for line, query in zip(scores, queries, strict=True):
            tokens = self._tokenize(query)
            if tokens:
                line.copy_(torch.from_numpy(self._index.get_scores(tokens)))
        return scores
