"""Scores of every stored row against every query (Eq. 3, once the query is preconditioned)."""

from torch import Tensor

from logra_kernels.reference._dtype import accumulator


def scores(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None = None, row_bias: Tensor | None = None
) -> Tensor:
    """<q, r> scale_r + bias_r; queries [Q, D], rows [R, D], row_scale, row_bias [R] -> [Q, R]."""
    dtype = accumulator(queries, rows)
    out = queries.to(dtype) @ rows.to(dtype).T  # [Q, R]
    if row_scale is not None:
        out = out * row_scale
    if row_bias is not None:
        out = out + row_bias
    return out
