"""Random projections with E⟨Pa, Pb⟩ = ⟨a, b⟩.

A random P follows from (seed, module name, side) alone. Their SHA-256 keys a Philox4x64 counter
stream, which gives the same bits in every process and on every machine.

Source: Choe et al. 2024, "What is Your Data Worth to GPT?", Eq. 6 and §3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logra_kernels.projection.spec import ProjectionSpec, register_projection_kind

_BLOCK_WORDS = 1 << 20  # 8 MiB of random words at a time


@dataclass(frozen=True)
class RandomKind:
    """The kind `name`, whose `draw(stream, shape)` gives P."""

    name: str
    draw: Callable[[np.random.Philox, tuple[int, int]], Tensor]

    def matrix(
        self, spec: ProjectionSpec, module: str, side: str, shape: tuple[int, int]
    ) -> Tensor:
        """P [K, width] float32 of one side of a module, drawn from a stream of its own."""
        key = hashlib.sha256(f"{spec.seed}\0{module}\0{side}".encode()).digest()[:16]
        words = np.frombuffer(key, dtype="<u8").astype(np.uint64)
        return self.draw(np.random.Philox(key=words), shape)

    def describe(self, spec: ProjectionSpec) -> dict[str, object]:
        """The seed, the scaling and the stream, for the store's manifest."""
        return {
            "seed": spec.seed,
            "scaling": "1/sqrt(K): E<Pa, Pb> = <a, b>",
            "stream": "philox4x64, key sha256(seed, 0, module, 0, side)[:16]",
        }


def normal(stream: np.random.Philox, shape: tuple[int, int]) -> Tensor:
    """N(0, 1/K), rounded to bfloat16: a kernel may hold P in bfloat16 and lose nothing.

    Two machines' log and cos may differ by a few ulps of float64; after the rounding about one
    element in 10**13 still differs.
    """
    values: Tensor = torch.from_numpy(_normal_values(stream, shape[0] * shape[1]).reshape(shape))
    return values.div(shape[0] ** 0.5).to(torch.bfloat16).float()


def rademacher(stream: np.random.Philox, shape: tuple[int, int]) -> Tensor:
    """±1/sqrt(K), one bit of the stream for each element, the lowest bit of a word first."""
    count = shape[0] * shape[1]
    words = stream.random_raw(-(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
    signs: Tensor = torch.from_numpy(bits.astype(np.float32).reshape(shape) * 2.0 - 1.0)
    return signs.mul(1.0 / shape[0] ** 0.5)


def _normal_values(stream: np.random.Philox, count: int) -> np.ndarray:
    """Box-Muller in float64: words 2j, 2j+1 of the stream give elements 2j, 2j+1."""
    out = np.empty(count + count % 2)
    for begin in range(0, out.size, _BLOCK_WORDS):
        words = stream.random_raw(min(_BLOCK_WORDS, out.size - begin))
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
        radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
        angle = 2.0 * np.pi * uniform[1::2]
        out[begin : begin + words.size : 2] = radius * np.cos(angle)
        out[begin + 1 : begin + words.size : 2] = radius * np.sin(angle)
    return out[:count]


register_projection_kind(RandomKind("normal", normal), "random")
register_projection_kind(RandomKind("rademacher", rademacher))
