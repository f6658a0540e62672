"""Scores of every stored row against every query (Eq. 3, once the query is preconditioned)."""

from collections.abc import Callable

import torch
from torch import Tensor

from logra_kernels.reference._dtype import accumulator

# 127 * 256 + 127: two signed bytes.
LARGEST_NUMBER = 32639


def scores(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None = None, row_bias: Tensor | None = None
) -> Tensor:
    """<q, r> scale_r + bias_r; queries [Q, D], rows [R, D], row_scale, row_bias [R] -> [Q, R].

    A query with elements of 2**64 or more (2**512 in float64) is divided by a power of two before
    its products are summed, so that the sums stay finite where the score does. Int8 rows are
    multiplied by float32 queries rounded to `whole_numbers`.
    """
    dtype = accumulator(queries, rows)

    def products(queries: Tensor) -> Tensor:
        if rows.dtype == torch.int8 and dtype == torch.float32:
            whole, scale = whole_numbers(queries, LARGEST_NUMBER)
            return (whole @ rows.double().T * scale).float()  # the sums are exact
        return queries @ rows.to(dtype).T

    return scaled(queries.to(dtype), products, row_scale, row_bias)


def scaled(
    queries: Tensor,
    products: Callable[[Tensor], Tensor],
    row_scale: Tensor | None,
    row_bias: Tensor | None,
) -> Tensor:
    """products(queries) [Q, R] times row_scale plus row_bias, safe for large queries."""
    factors = query_factors(queries)  # [Q, 1]
    out = products(queries / factors)
    if row_scale is not None:
        out = out * row_scale
    out = out * factors
    if row_bias is not None:
        out = out + row_bias
    return out


def whole_numbers(queries: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Queries [Q, D] float32 as whole numbers times a scale, [Q, D] and [Q, 1] float64.

    The largest of a query's numbers is `most`. The scale of one that is not finite is NaN.
    """
    if queries.shape[1] == 0:
        return queries.double(), queries.new_ones(queries.shape[0], 1, dtype=torch.float64)
    largest = queries.abs().amax(dim=1, keepdim=True).double()
    known = largest.isfinite() & (largest > 0)
    whole = (queries.double() * (most / largest)).round()  # to even
    scale = torch.where(known, largest / most, torch.where(largest == 0, 1.0, torch.nan))
    return torch.where(known, whole, 0.0), scale


def query_factors(queries: Tensor) -> Tensor:
    """Powers of two [Q, 1], at least 1, that bring too large queries within the limit."""
    if queries.shape[1] == 0:
        return queries.new_ones(queries.shape[0], 1)
    largest = queries.abs().amax(dim=1, keepdim=True)
    limit = 64 if queries.dtype == torch.float32 else 512
    above = (torch.frexp(largest).exponent - limit).clamp(min=0)
    return torch.ldexp(torch.ones_like(largest), torch.where(largest.isfinite(), above, 0))
