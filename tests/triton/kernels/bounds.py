"""The error that a kernel may make in an element, from the magnitudes that it adds."""

import torch
from torch import Tensor

# A float32 addition rounds by 2**-24; tensor cores may truncate, which doubles the error.
STEP = 2.0**-23
# The error of operands split into pieces. Three bfloat16 pieces (which the interpreter truncates
# and GPUs round) leave out some products; two float16 pieces lose 2**-22.
PIECES = 2.0**-19


def assert_within(got: Tensor, want: Tensor, magnitude: Tensor, terms: int) -> None:
    """|got - want| <= (terms * STEP + PIECES) * magnitude, want and magnitude in float64.

    magnitude is the same computation on absolute values; terms counts its float32 additions.
    """
    assert got.shape == want.shape
    assert want.dtype == magnitude.dtype == torch.float64
    # An error below 2**-126 * terms comes from subnormal inputs, not from the kernel.
    bound = (terms * STEP + PIECES) * magnitude + terms * 2.0**-126
    error = (got.double() - want).abs()
    excess = error > bound
    assert not (excess | error.isnan()).any(), (
        f"{int((excess | error.isnan()).sum())} of {error.numel()} elements beyond the bound; "
        f"largest error {error.max():.3e} where {bound.flatten()[error.argmax()]:.3e} is allowed"
    )
