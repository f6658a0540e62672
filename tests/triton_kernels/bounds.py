"""The error a kernel may make, per element, from the magnitudes that it adds."""

import torch
from torch import Tensor

# a float32 step rounds by 2**-24; tensor cores may truncate, which doubles it
STEP = 2.0**-23
# operands split into pieces: three bfloat16 (the interpreter truncates them, GPUs round), and the
# products left out; two float16 pieces lose 2**-22
PIECES = 2.0**-19


def assert_within(got: Tensor, want: Tensor, magnitude: Tensor, terms: int) -> None:
    """|got - want| <= (terms * STEP + PIECES) * magnitude, want and magnitude in float64.

    magnitude is the same computation on absolute values; terms counts its float32 additions.
    """
    assert got.shape == want.shape
    assert want.dtype == magnitude.dtype == torch.float64
    # below 2**-126 * terms the inputs' own subnormals are at stake, not the kernel
    bound = (terms * STEP + PIECES) * magnitude + terms * 2.0**-126
    error = (got.double() - want).abs()
    excess = error > bound
    assert not (excess | error.isnan()).any(), (
        f"{int((excess | error.isnan()).sum())} of {error.numel()} elements beyond the bound; "
        f"largest error {error.max():.3e} where {bound.flatten()[error.argmax()]:.3e} is allowed"
    )
