"""Scores of rows that are kept as bit planes, on a GPU: the kernel of `scores` on integers."""

from collections.abc import Sequence

from torch import Tensor

from logra_kernels.triton.scores import Scan


def plane_scores(
    queries: Tensor,
    planes: Sequence[Tensor],
    levels: Tensor,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
) -> Tensor:
    """queries [Q, D], P planes [R, ceil(D/8)] uint8, levels [2^P] int8 -> [Q, R] float32."""
    return Scan.of_planes(queries, planes, levels, row_scale, row_bias).scores()
