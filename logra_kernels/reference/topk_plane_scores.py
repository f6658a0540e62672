"""Running top k and bottom k of the scores of rows that are kept as bit planes."""

from collections.abc import Sequence

from torch import Tensor

from logra_kernels.reference.plane_scores import plane_scores
from logra_kernels.reference.topk_scores import State, fold


def topk_plane_scores(
    queries: Tensor,
    planes: Sequence[Tensor],
    levels: Tensor,
    k: int,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    state: State | None = None,
    row_offset: int = 0,
) -> State:
    """As `topk_scores`, of the scores that `plane_scores` gives."""
    return fold(plane_scores(queries, planes, levels, row_scale, row_bias), k, state, row_offset)
