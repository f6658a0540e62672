"""Running top k and bottom k of the scores of rows that are kept as bit planes, on a GPU."""

from collections.abc import Sequence

from torch import Tensor

from logra_kernels.triton.scores import Scan
from logra_kernels.triton.topk_scores import State, topk_of


def topk_plane_scores(
    queries: Tensor,
    planes: Sequence[Tensor],
    levels: Tensor,
    k: int,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    state: Sequence[Tensor] | None = None,
    row_offset: int = 0,
) -> State:
    """As `topk_scores`, of the scores that `plane_scores` gives."""
    scan = Scan.of_planes(queries, planes, levels, row_scale, row_bias)
    return topk_of(scan, k, state, row_offset)
