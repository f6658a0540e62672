"""Scores of a store's rows: influence, and the plain products of gradients."""

from os import PathLike

from torch import Tensor

from logra_kernels.attribution import Attributor
from logra_kernels.defaults import MATRIX_MODE, NO_CURVATURE
from logra_kernels.store import Store


class Influence:
    """The scores of an `Attributor` in one mode.

    Args:
        attributor: of the training examples' rows.
        mode: as in `Attributor.scores`.
    """

    def __init__(self, attributor: Attributor, mode: str = MATRIX_MODE) -> None:
        self._attributor = attributor
        self._mode = mode

    def scores(self, queries: Tensor, /) -> Tensor:
        """[Q, N] float32 for queries [Q, D] float32 or float64.

        Raises:
            TypeError, ValueError, StoreError: as `Attributor.scores`.
        """
        scores: Tensor = self._attributor.scores(queries, self._mode).scores
        return scores


def gradient_dot(store: Store | str | PathLike[str]) -> Influence:
    """g_teᵀ g_tr: TracIn with one checkpoint (Pruthi et al. 2020).

    Args:
        store: the training examples' rows; logged without a projection, whole gradients.
    """
    return Influence(Attributor(store, NO_CURVATURE))


def gradient_cosine(store: Store | str | PathLike[str]) -> Influence:
    """g_teᵀ g_tr / (|g_te| |g_tr|); a row of zeros scores 0. Arguments as of `gradient_dot`."""
    return Influence(Attributor(store, NO_CURVATURE), "whitened-cosine")
