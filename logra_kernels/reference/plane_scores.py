"""Scores of rows that are kept as bit planes: a few bits an element, multiplied as they lie."""

from collections.abc import Sequence

import torch
from torch import Tensor

from logra_kernels.reference._dtype import accumulator
from logra_kernels.reference.scores import scaled, whole_numbers

# A query's largest element as a signed byte.
LARGEST_BYTE = 127


def plane_scores(
    queries: Tensor,
    planes: Sequence[Tensor],
    levels: Tensor,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
) -> Tensor:
    """<q, c_r> scale_r + bias_r of queries [Q, D] and P planes [R, ceil(D/8)] uint8 -> [Q, R].

    Row c_r is the `levels` [2^P] of its codes. A float32 query is rounded to `whole_numbers` of one
    byte.
    """
    dtype = accumulator(queries)
    rows = levels.double().to(queries.device)[plane_codes(planes, queries.shape[1])]  # [R, D]

    def products(queries: Tensor) -> Tensor:
        if dtype == torch.float64:
            return queries @ rows.T
        whole, scale = whole_numbers(queries, LARGEST_BYTE)
        return (whole @ rows.T * scale).float()  # the sums are exact

    return scaled(queries.to(dtype), products, row_scale, row_bias)


def plane_codes(planes: Sequence[Tensor], columns: int) -> Tensor:
    """The codes [R, D] int64 of P planes: plane 0 holds the highest bit of each.

    Column d is bit d % 8, the least significant first, of byte d // 8.
    """
    codes = torch.zeros(len(planes[0]), columns, dtype=torch.int64, device=planes[0].device)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    for plane in planes:
        bits = (plane.unsqueeze(2) >> places) & 1  # [R, B, 8]
        codes = 2 * codes + bits.flatten(1)[:, :columns]
    return codes
