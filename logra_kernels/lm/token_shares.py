"""How much each token of a ranked passage, or of the query, contributes to the passage's score."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from logra_kernels.defaults import MODES
from logra_kernels.lm.corpus import Example, batches
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.lm.ranking import Passage, Ranking
from logra_kernels.store import Store

# The modes whose score is the sum of the tokens' contributions, times a positive factor per row.
TOKEN_MODES = tuple(mode for mode in MODES if mode != "l2")
BATCH_TOKENS = 1024  # padded tokens of one pass, at most


def add_token_shares(store: Store, gradients: LMGradients, rankings: Sequence[Ranking]) -> None:
    """Give each top passage its `tokens`: pairs [text, share] whose shares sum to the score."""
    rankings = [ranking for ranking in rankings if ranking.mode in TOKEN_MODES]
    if not rankings:
        return
    examples = _examples(store, rankings)
    # Modes with the same curvature and damping score by the same preconditioned queries.
    solved = {ranking.queries.key: ranking.queries.solved.float() for ranking in rankings}
    contributions = _contributions(gradients, examples, solved)
    texts = {row: gradients.lm.token_texts(e.tokens) for row, e in examples.items()}
    for ranking in rankings:
        for q, passages in enumerate(ranking.top):
            for passage in passages:
                row = passage["row"]
                if row in examples:
                    of_query = contributions[row][ranking.queries.key][q]
                    _add_shares(passage, "tokens", texts[row], of_query)


def add_query_shares(
    store: Store,
    gradients: LMGradients,
    rankings: Sequence[Ranking],
    queries: Sequence[Example],
) -> None:
    """Give each top passage its `query_tokens`: what each token of the query adds to its score.

    Influence is symmetric: the query's tokens meet the preconditioned row of the passage.
    """
    rankings = [ranking for ranking in rankings if ranking.mode in TOKEN_MODES]
    for q, query in enumerate(queries):
        passages = [passage for ranking in rankings for passage in ranking.top[q]]
        solved = []
        for ranking in rankings:
            rows = store.take([passage["row"] for passage in ranking.top[q]])
            solved.append(ranking.preconditioner.precondition(torch.from_numpy(rows)))
        if not passages:
            continue
        contributions = gradients.token_scores([query], torch.cat(solved))[:, 0]  # [passages, T]
        texts = gradients.lm.token_texts(query.tokens)
        for passage, of_passage in zip(passages, contributions, strict=True):
            _add_shares(passage, "query_tokens", texts, of_passage)


def _examples(store: Store, rankings: Sequence[Ranking]) -> dict[int, Example]:
    """{row: the example that it was logged from}, for the top passages."""
    rows = sorted({p["row"] for ranking in rankings for of_query in ranking.top for p in of_query})
    return {
        row: Example.from_metadata(str(row), metadata)
        for row, metadata in zip(rows, store.metadata(rows), strict=True)
        if metadata
    }


def _contributions(
    gradients: LMGradients, examples: Mapping[int, Example], solved: Mapping[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """{row: {key of solved: [Q, T]}}, what each token adds to the product of query and row."""
    stacked = torch.cat(list(solved.values()))  # [keys * Q, D]
    found: dict[int, dict[str, Tensor]] = {}
    for batch in batches(examples.values(), batch_tokens=BATCH_TOKENS):
        scores = gradients.token_scores(batch, stacked)  # [keys * Q, N, T]
        for place, example in enumerate(batch):
            of_example = scores[:, place, : len(example.tokens)]
            found[int(example.id)] = dict(zip(solved, of_example.chunk(len(solved)), strict=True))
    return found


def _add_shares(passage: Passage, key: str, texts: Sequence[str], contributions: Tensor) -> None:
    """Scale the contributions [T], so that they sum to the score, and add them to a passage.

    The factor is the mode's normaliser, which is positive, up to the rounding of the stored row.
    Where it is not positive, the score is rounding alone, and no shares are shown.
    """
    shares = contributions.double()
    total = float(shares.sum())
    factor = passage["score"] / total if total else 0.0
    if factor > 0:
        values = (shares * factor).tolist()
        passage[key] = [
            [text, float(f"{value:.4g}")] for text, value in zip(texts, values, strict=True)
        ]
