"""The error that a kernel may make in an element, from the magnitudes that it adds."""

from typing import Any

import torch
from torch import Tensor

from logra_kernels import reference, triton

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

# A float32 addition rounds by 2**-24; tensor cores may truncate, which doubles the error.
STEP = 2.0**-23
# The error of operands split into pieces. Three bfloat16 pieces (which the interpreter truncates
# and GPUs round) leave out some products; two float16 pieces lose 2**-22.
PIECES = 2.0**-19


def assert_near_reference(op: str, *arguments: Any, terms: int, factor: float = 1.0) -> Tensor:
    """The launcher's result, which is float32 and off by (terms * STEP + PIECES) * magnitude.

    It is compared with the reference in float64. The magnitude is the reference of absolute values,
    times factor; terms counts its float32 additions. Of an op in place the result is the first
    argument, of which the op is given a copy.
    """

    def result(function: Any, *given: Any) -> Tensor:
        found: Tensor | None = function(*given)
        return given[0] if found is None else found

    def wide(value: Any, absolute: bool) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.to(torch.float64, copy=True)
        return value.abs() if absolute else value

    first, *rest = arguments
    in_place = op.endswith("_")
    got = result(getattr(triton, op), first.clone() if in_place else first, *rest)
    want, magnitude = (
        result(getattr(reference, op), *(wide(value, absolute) for value in arguments))
        for absolute in (False, True)
    )
    assert got.dtype == (first.dtype if in_place else torch.float32)
    assert got.shape == want.shape
    assert want.dtype == magnitude.dtype == torch.float64
    # An error below 2**-126 * terms comes from subnormal inputs, not from the kernel.
    bound = (terms * STEP + PIECES) * factor * magnitude + terms * 2.0**-126
    error = (got.double() - want).abs()
    excess = (error > bound) | error.isnan()
    assert not excess.any(), (
        f"{int(excess.sum())} of {error.numel()} elements beyond the bound; "
        f"largest error {error.max():.3e} where {bound.flatten()[error.argmax()]:.3e} is allowed"
    )
    return got
