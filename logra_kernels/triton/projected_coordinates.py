"""Chosen elements of projected per-sample gradients on a GPU, scaled, in the same kernel."""

import torch
from torch import Tensor

from logra_kernels.triton.launch import check, check_floating
from logra_kernels.triton.products import precision
from logra_kernels.triton.projected_gradients import Chosen, Examples, Side, write_gradients


def projected_coordinates(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    coordinates: Tensor,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    input_precision: str | None = None,
) -> Tensor:
    """As `projected_gradients`, but [N, n]: the elements at `coordinates` [n], times `scale` [n].

    Where an example has several chunks of tokens, the sum of each is scaled before they are added.
    """
    check_floating(x=x, dy=dy, proj_in=proj_in, proj_out=proj_out)
    check(x=x, coordinates=coordinates, scale=scale, mask=mask, cu_seqlens=cu_seqlens)
    x_side = Side([x], [] if proj_in is None else [proj_in]).contiguous()
    dy_side = Side([dy], [] if proj_out is None else [proj_out]).contiguous()
    examples = Examples.of(mask, cu_seqlens)
    shape = 1, examples.num(x), coordinates.shape[0]
    out = torch.empty(shape, device=x.device, dtype=out_dtype or torch.float32)
    if out.numel() > 0:
        chosen = Chosen.of(coordinates, scale, dy_side.rank, x_side.rank)
        write_gradients(x_side, dy_side, examples, out, precision(input_precision), chosen)
    return out[0]
