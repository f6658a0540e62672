"""Scores of every stored row against every query (Eq. 3, once the query is preconditioned)."""

import torch
from torch import Tensor

from logra_kernels.reference._dtype import accumulator


def scores(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None = None, row_bias: Tensor | None = None
) -> Tensor:
    """<q, r> scale_r + bias_r; queries [Q, D], rows [R, D], row_scale, row_bias [R] -> [Q, R].

    A query with elements of 2**64 or more (2**512 in float64) is divided by a power of two before
    its products are summed, so that the sums stay finite where the score does.
    """
    dtype = accumulator(queries, rows)
    queries = queries.to(dtype)
    factors = _factors(queries)  # [Q, 1]
    out = (queries / factors) @ rows.to(dtype).T  # [Q, R]
    if row_scale is not None:
        out = out * row_scale
    out = out * factors
    if row_bias is not None:
        out = out + row_bias
    return out


def _factors(queries: Tensor) -> Tensor:
    """Powers of two [Q, 1], at least 1, that bring too large queries within the limit."""
    if queries.shape[1] == 0:
        return queries.new_ones(queries.shape[0], 1)
    largest = queries.abs().amax(dim=1, keepdim=True)
    limit = 64 if queries.dtype == torch.float32 else 512
    above = (torch.frexp(largest).exponent - limit).clamp(min=0)
    return torch.ldexp(torch.ones_like(largest), torch.where(largest.isfinite(), above, 0))
