"""What influence must beat: other ways to say which training examples matter, under one contract.

    gradients.scores(rows)        # gradient_dot(store), gradient_cosine(store): rows [Q, D]
    trak.scores(features)         # Trak(features, weights): [Q, k] of each model
    similar.scores(hidden)        # RepresentationSimilarity(hidden): [Q, H], or texts with MiniLM
    bm25.scores(texts)            # Bm25(texts): strings
    chance.scores(anything)       # Random(num_examples)

Each is made from the training examples and gives [Q, N] for queries of the same form.
`Influence(attributor, mode)` puts this package's own scores into the same loop.
"""

from logra_kernels.baselines.base import Scores
from logra_kernels.baselines.bm25 import Bm25, words
from logra_kernels.baselines.chance import Random
from logra_kernels.baselines.gradients import Influence, gradient_cosine, gradient_dot
from logra_kernels.baselines.similarity import MiniLM, RepresentationSimilarity, hidden_states
from logra_kernels.baselines.trak import RowProjection, Trak, margin

__all__ = [
    "Bm25",
    "Influence",
    "MiniLM",
    "Random",
    "RepresentationSimilarity",
    "RowProjection",
    "Scores",
    "Trak",
    "gradient_cosine",
    "gradient_dot",
    "hidden_states",
    "margin",
    "words",
]
