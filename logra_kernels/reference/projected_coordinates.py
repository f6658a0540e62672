"""Chosen elements of projected per-sample gradients, each scaled."""

from torch import Tensor, dtype

from logra_kernels.reference.projected_gradients import projected_gradients


def projected_coordinates(
    x: Tensor,
    dy: Tensor,
    proj_in: Tensor | None,
    proj_out: Tensor | None,
    coordinates: Tensor,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: dtype | None = None,
) -> Tensor:
    """[N, n]: scale_c times element coordinates_c of vec(G), G of `projected_gradients`.

    coordinates [n] int64, scale [n] float32 or None; the others as in `projected_gradients`.
    """
    gradients = projected_gradients(x, dy, proj_in, proj_out, mask, cu_seqlens)  # [N, Ko, Ki]
    chosen = gradients.flatten(1)[:, coordinates]
    return (chosen if scale is None else chosen * scale).to(out_dtype or chosen.dtype)
