"""Tokens for the benches of gradients: examples of equal length, masked, or ragged and packed."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),  # what autocast gives: x, dy
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
        return self.x[..., 0].numel()

    @property
    def num_examples(self) -> int:
        return len(self.x) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def widened(self) -> "Tokens":
        return Tokens(self.x.float(), self.dy.float(), self.mask, self.cu_seqlens)


def tokens(n: int, t: int, dims: tuple[int, int], dtype: str, lengths: str) -> Tokens:
    """`lengths`: "full", "masked" (a tenth of the tokens) or "ragged" (1 to 2 T - 1, packed)."""
    x_dtype, dy_dtype = DTYPES[dtype]
    if lengths == "ragged":
        cu_seqlens = torch.randint(1, 2 * t, (n,)).cumsum(0)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), cu_seqlens])  # [N + 1]
        shape: tuple[int, ...] = (int(cu_seqlens[-1]),)
    else:
        cu_seqlens, shape = None, (n, t)
    mask = torch.rand(n, t) > 0.1 if lengths == "masked" else None
    return Tokens(
        torch.randn(*shape, dims[0]).to(x_dtype),
        torch.randn(*shape, dims[1]).to(dy_dtype),
        mask,
        cu_seqlens,
    )


def outer_ways(x: Tensor, dy: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> dict:
    """The ways to sum outer products in torch, each a function of nothing -> [N, Ko, Ki]."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        return {
            "mm of each": lambda: torch.stack(
                [d.T @ a for a, d in zip(x.split(lengths), dy.split(lengths), strict=True)]
            ),
            "padded bmm": lambda: padded(dy, lengths).transpose(1, 2) @ padded(x, lengths),
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


def padded(values: Tensor, lengths: list[int]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)
