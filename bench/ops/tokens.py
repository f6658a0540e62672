"""Tokens for the gradient ops: examples of one length, with or without a mask, or packed ones."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = {  # of x and of dy
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),  # what autocast gives
}


@dataclass
class Tokens:
    """x [N, T, I] and dy [N, T, O] with a mask [N, T] or None; or packed, x [T, I], dy [T, O]."""

    x: Tensor
    dy: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def num_tokens(self) -> int:
        """The number of tokens, padding included."""
        return self.x[..., 0].numel()

    def num_bytes(self, rank: int) -> float:
        """Of the tokens, and of the float32 gradients [N, K, K]."""
        num_examples = len(self.x) if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return float(self.x.nbytes + self.dy.nbytes + num_examples * rank * rank * 4)


def tokens(n: int, t: int, dim: int, dtype: str, lengths: str) -> Tokens:
    """`lengths`: "full", "masked" (a tenth of the tokens) or "ragged" (1 to 2 T - 1, packed)."""
    x_dtype, dy_dtype = DTYPES[dtype]
    cu_seqlens, shape = None, [n, t]
    if lengths == "ragged":
        ends = torch.randint(1, 2 * t, (n,)).cumsum(0)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends])  # [N + 1]
        shape = [int(ends[-1])]
    mask = torch.rand(n, t) > 0.1 if lengths == "masked" else None
    x, dy = torch.randn(*shape, dim), torch.randn(*shape, dim)
    return Tokens(x.to(x_dtype), dy.to(dy_dtype), mask, cu_seqlens)


def outer_ways(
    x: Tensor, dy: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> dict[str, Callable[[], Tensor]]:
    """The ways to sum outer products in torch; each call returns [N, Ko, Ki]."""
    if cu_seqlens is not None:
        lengths = [end - start for start, end in pairwise(cu_seqlens.tolist())]

        def padded(values: Tensor) -> Tensor:
            parts = list(values.split(lengths))
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

        return {
            "mm of each": lambda: torch.stack(
                [d.T @ a for a, d in zip(x.split(lengths), dy.split(lengths), strict=True)]
            ),
            "padded bmm": lambda: padded(dy).transpose(1, 2) @ padded(x),
        }
    if mask is None:
        return {
            "einsum": lambda: torch.einsum("nto,nti->noi", dy, x),
            "bmm": lambda: dy.transpose(1, 2) @ x,
        }
    keep = mask[..., None].to(dy.dtype)
    return {
        "einsum": lambda: torch.einsum("nto,nti->noi", dy * keep, x),
        "bmm": lambda: (dy * keep).transpose(1, 2) @ x,
    }
