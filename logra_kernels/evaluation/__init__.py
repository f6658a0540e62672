"""Are the values right? Scores of training examples against what retraining says.

    subsets = half_subsets(num_examples, 100)                  # [S, N] bool
    losses = retrain(train, subsets, seeds=3, folder="cache")   # [S, R, Q]; goes on after a kill
    lds(result.scores, subsets, losses)                        # Lds(value, low, high, ceiling, …)
    lds_difference(result.scores, others, subsets, losses)     # of two methods, with its interval

`train` is the user's own: indices of training examples and a seed -> the loss of every query.
"""

from logra_kernels.evaluation.brittleness import Brittleness, brittleness, without_top
from logra_kernels.evaluation.lds import Lds, LdsDifference, lds, lds_difference
from logra_kernels.evaluation.retraining import half_subsets, retrain
from logra_kernels.evaluation.retrieval import mislabelled_auc, recall_at

__all__ = [
    "Brittleness",
    "Lds",
    "LdsDifference",
    "brittleness",
    "half_subsets",
    "lds",
    "lds_difference",
    "mislabelled_auc",
    "recall_at",
    "retrain",
    "without_top",
]
