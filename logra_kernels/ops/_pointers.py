"""How a tensor is handed to the extension: address, dtype, shape and strides in elements."""

import torch
from torch import Tensor

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]

# the values of logra::Dtype
_DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.uint8: 5,  # of planes of bits, which are no Matrix
}


def view(tensor: Tensor) -> View:
    return tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape, tensor.stride()


def rows_view(tensor: Tensor) -> View:
    """[..., I] contiguous, I > 0, as [M, I]."""
    width = tensor.shape[-1]
    return tensor.data_ptr(), _DTYPES[tensor.dtype], (tensor.numel() // width, width), (width, 1)


def pointer(tensor: Tensor | None) -> int:
    """0 is the null pointer."""
    return 0 if tensor is None else tensor.data_ptr()


def flat_tokens(x: Tensor) -> Tensor:
    """[..., I] -> [M, I], a view where the strides allow it."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
