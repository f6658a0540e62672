"""Which method finds the documents that taught an answer, and which lets a few lead everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logra_kernels.attribution import Attributor
from logra_kernels.baselines import (
    Bm25,
    Influence,
    Random,
    RepresentationSimilarity,
    gradient_cosine,
    gradient_dot,
    hidden_states,
)
from logra_kernels.defaults import NO_CURVATURE
from logra_kernels.evaluation import recall_at
from logra_kernels.evaluation.lds import spearman
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example
from logra_kernels.store import Store

BATCH_EXAMPLES = 16
FILTERED = 0.1  # the share of the documents that a filter by L2/L1 leaves out


@dataclass(frozen=True)
class Finding:
    """What one method's ranking is worth. All but `method` are means over the questions."""

    method: str
    first: float  # how often a document that taught the answer comes first
    recall: float  # the share of those documents among the first K
    distinct: float  # different documents among the first K of all questions, of all those places
    by_norm: float  # Spearman's correlation of score and gradient norm


def all_scores(
    store: Store,
    lm: CausalLM,
    rows: Tensor,
    examples: Sequence[Example],
    queries: Sequence[Example],
) -> dict[str, Tensor]:
    """{method: [Q, N]}; the store's order is that of the examples.

    Args:
        store: the rows of the N examples, with a curvature.
        lm: the model that the rows are of.
        rows: the queries' gradients, [Q, D].
        examples, queries: what the other methods compare: hidden states, words.
    """
    attributor = Attributor(store)
    ratio = attributor.concentration()
    scattered = ratio <= ratio.quantile(1 - FILTERED)
    concentrated = ratio >= ratio.quantile(FILTERED)
    states = RepresentationSimilarity(_states(lm, examples))
    words = Bm25([example.text for example in examples])
    return {
        "influence": Influence(attributor, "dot").scores(rows),
        "l-RelatIF": Influence(attributor, "l-relatif").scores(rows),
        "influence, highest L2/L1 left out": attributor.scores(rows, row_weights=scattered).scores,
        "influence, lowest L2/L1 left out": attributor.scores(
            rows, row_weights=concentrated
        ).scores,
        "gradient dot": gradient_dot(store).scores(rows),
        "gradient cosine": gradient_cosine(store).scores(rows),
        "hidden states": states.scores(_states(lm, queries)),
        "BM25, question": words.scores([query.id for query in queries]),
        "BM25, question and answer": words.scores([f"{q.id} {q.text}" for q in queries]),
        "chance": Random(len(examples)).scores(queries),
    }


def judge(
    scores: dict[str, Tensor], ids: Sequence[str], taught_by: Sequence[Sequence[str]], norms: Tensor
) -> list[Finding]:
    """What each method's scores [Q, N] are worth.

    Args:
        scores: of every method.
        ids: of the N documents.
        taught_by: the documents that taught each answer; K is the number of the first one's.
        norms: of the documents' gradients, [N].
    """
    k = len(taught_by[0])
    findings = []
    for method, values in scores.items():
        order = values.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
        ranking = [[ids[n] for n in of_query] for of_query in order]
        correlation = spearman(
            values.double().numpy(), norms.double().expand(values.shape).numpy().copy()
        )
        findings.append(
            Finding(
                method,
                float(recall_at(ranking, taught_by, 1).mean()),
                float(recall_at(ranking, taught_by, k).mean()),
                len({n for of_query in order for n in of_query}) / (k * len(order)),
                float(correlation.mean()),
            )
        )
    return findings


def gradient_norms(store: Store) -> Tensor:
    """|g| of every row, [N] float64."""
    return Attributor(store, NO_CURVATURE).self_influence().sqrt()


def _states(lm: CausalLM, examples: Sequence[Example]) -> Tensor:
    """What the head is given, its mean over the tokens that bear the loss, [N, hidden]."""
    body: Any = lm.model.model
    found = []
    for first in range(0, len(examples), BATCH_EXAMPLES):
        batch = lm.collate(examples[first : first + BATCH_EXAMPLES])
        bears_loss = batch.pop("labels") != -100
        found.append(hidden_states(body, "norm", partial(body, **batch), bears_loss))
    return torch.cat(found)
