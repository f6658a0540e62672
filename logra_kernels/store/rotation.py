"""A fixed random rotation of rows: signs and Hadamard transforms, with the same bits everywhere.

Its coordinates are sums over the whole row, all of one size, so that few bits and one scale a row
do for them. It is made of additions in a fixed order and products with a constant: a row's bits
depend on the row and the seed alone, never on the rows beside it.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Butterflies of this many neighbours run on a transposed copy: additions of long vectors are fast.
NEIGHBOURS = 64


class Rotation:
    """An orthogonal R [D, D] for any D.

    With n the largest power of two that is at most D, R flips signs and applies the Hadamard
    transform H / √n to the first n columns; if n < D, then to the last n, and once more to the
    first n. FORMAT.md, "Rotation", has every bit.

    Args:
        dim: D.
        seed: from 0 to 2**63 - 1; the signs follow from it.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        self.dim = dim
        self.seed = seed
        self._width = 1 << (dim.bit_length() - 1)
        starts = (0,) if self._width == dim else (0, dim - self._width, 0)
        self._steps = [
            (slice(start, start + self._width), _signs(seed, number, self._width))
            for number, start in enumerate(starts)
        ]

    def forward(self, rows: np.ndarray) -> np.ndarray:
        """R x for rows x [n, D] float32 or float64; [n, D] of the same dtype."""
        out: np.ndarray = np.array(rows, order="C")
        norm = out.dtype.type(self._width**-0.5)
        for columns, signs in self._steps:
            out[:, columns] = hadamard(out[:, columns] * signs.astype(out.dtype)) * norm
        return out

    def inverse(self, rows: np.ndarray) -> np.ndarray:
        """Rᵀ y for rows y [n, D] float32 or float64; [n, D] of the same dtype."""
        out: np.ndarray = np.array(rows, order="C")
        norm = out.dtype.type(self._width**-0.5)
        for columns, signs in reversed(self._steps):
            out[:, columns] = hadamard(out[:, columns]) * norm * signs.astype(out.dtype)
        return out


def hadamard(rows: np.ndarray) -> np.ndarray:
    """H x for rows x [n, W], W a power of two; H[i, j] = (-1)**(number of ones in i & j).

    Butterflies of columns that differ in bit 0 come first, then those of bit 1, and so on.
    """
    count, width = rows.shape
    low = min(NEIGHBOURS, width)
    # [n, low, W / low]: column c lies at [c % low, c // low].
    values = np.ascontiguousarray(rows.reshape(count, width // low, low).transpose(0, 2, 1))
    _butterflies(values.reshape(count, low, -1))
    values = np.ascontiguousarray(values.transpose(0, 2, 1))
    _butterflies(values)
    return values.reshape(count, width)


def _butterflies(values: np.ndarray) -> None:
    """In place, (a, b) -> (a + b, a - b) along axis 1 of [n, L, C], for each bit of L's index."""
    count, length, columns = values.shape
    half = 1
    while half < length:
        pairs = values.reshape(count, length // (2 * half), 2, half * columns)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        difference = first - second
        first += second
        second[...] = difference
        half *= 2


def _signs(seed: int, number: int, width: int) -> np.ndarray:
    """[width] int8, 1 or -1: bit c % 8 of byte c // 8 of SHAKE-256 over the seed and the step."""
    text = f"logra hadamard {seed} {number}".encode()
    raw = np.frombuffer(hashlib.shake_256(text).digest(-(-width // 8)), np.uint8)
    bits = np.unpackbits(raw, count=width, bitorder="little").astype(np.int8)
    signs: np.ndarray = 1 - 2 * bits
    return signs
