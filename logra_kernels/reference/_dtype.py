"""The accumulator type of the reference: float64 where an input is float64, else float32."""

import torch
from torch import Tensor


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32
