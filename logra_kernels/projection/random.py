"""The projections P_i [Ki, I] and P_o [Ko, O] of LoGra (Eq. 6).

A random projection follows from (seed, module name, side) alone: a Philox4x64 counter stream,
keyed by their SHA-256, gives the same bits in every process and on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("random", "normal", "rademacher")
SCALING = "1/sqrt(K): E<Pa, Pb> = <a, b>"
_BLOCK_WORDS = 1 << 20  # 8 MiB of random words at a time


@dataclass(frozen=True)
class ModuleProjection:
    """The two projections of one module; None stands for the identity.

    in_features: I; out_features: O; proj_in: [Ki, I] float32; proj_out: [Ko, O] float32.
    """

    in_features: int
    out_features: int
    proj_in: Tensor | None = None
    proj_out: Tensor | None = None

    @property
    def ki(self) -> int:
        return self.in_features if self.proj_in is None else self.proj_in.shape[0]

    @property
    def ko(self) -> int:
        return self.out_features if self.proj_out is None else self.proj_out.shape[0]


def build_projections(
    features: Mapping[str, tuple[int, int]],
    rank: int | tuple[int, int],
    init: str = "random",
    seed: int = 0,
) -> dict[str, ModuleProjection]:
    """Random projections with E⟨Pa, Pb⟩ = ⟨a, b⟩, one pair for each module.

    `normal` (also called `random`): N(0, 1/K), each element rounded to bfloat16, so that a kernel
    may hold P in bfloat16 and lose nothing. `rademacher`: ±1/sqrt(K). Where the rank reaches a
    side's width that side is not projected (None).

    Args:
        features: {module name: (I, O)}, the widths of the module's input and output.
        rank: K of both sides, or (rank_out, rank_in).
        init: "random", "normal" or "rademacher".
        seed: any integer; recorded in the store.

    Returns: {module name: ModuleProjection}.

    Raises: ValueError for an unknown init, or a rank below 1.

    Source: Choe et al. 2024, "What is Your Data Worth to GPT?", Eq. 6 and §3.2.
    """
    kind = canonical_kind(init)
    rank_out, rank_in = rank_pair(rank)
    projections = {}
    for name, (width_in, width_out) in features.items():
        projections[name] = ModuleProjection(
            width_in,
            width_out,
            _side(kind, seed, name, "in", rank_in, width_in),
            _side(kind, seed, name, "out", rank_out, width_out),
        )
    return projections


def projection_digest(projections: Mapping[str, ModuleProjection]) -> str:
    """SHA-256 over names, sides and values: what a store keeps to know its projection again."""
    digest = hashlib.sha256()
    for name, projection in projections.items():
        for side, proj in (("in", projection.proj_in), ("out", projection.proj_out)):
            digest.update(f"{name}\0{side}\0".encode())
            if proj is not None:
                digest.update(proj.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def canonical_kind(init: str) -> str:
    """ "random" is "normal"; an init that is not available is an error."""
    if init == "pca":
        raise ValueError(
            "init: 'pca' needs the kfac statistic (covariances of inputs and output gradients), "
            f"which this version does not have; available: {', '.join(KINDS)}"
        )
    if init not in KINDS:
        raise ValueError(f"init: expected one of {', '.join(KINDS)}, got {init!r}")
    return "normal" if init == "random" else init


def rank_pair(rank: int | tuple[int, int]) -> tuple[int, int]:
    """rank -> (rank_out, rank_in), checked."""
    pair = tuple(rank) if isinstance(rank, (tuple, list)) else (rank, rank)
    if len(pair) != 2 or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in pair):
        raise ValueError(f"rank: expected an integer >= 1 or (rank_out, rank_in), got {rank!r}")
    return pair[0], pair[1]


def _side(kind: str, seed: int, name: str, side: str, rank: int, width: int) -> Tensor | None:
    if rank >= width:
        return None
    stream = _stream(seed, name, side)
    fill = _normal if kind == "normal" else _rademacher
    values = fill(stream, rank * width)
    proj = torch.from_numpy(values.reshape(rank, width))
    if kind == "rademacher":
        return proj * (1.0 / rank**0.5)
    # a few float64 ulps of difference between two machines' log and cos do not survive this
    # rounding, but for about one element in 10**13
    return (proj.double() / rank**0.5).to(torch.bfloat16).float()


def _stream(seed: int, name: str, side: str) -> np.random.Philox:
    digest = hashlib.sha256(f"{seed}\0{name}\0{side}".encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))


def _normal(stream: np.random.Philox, count: int) -> np.ndarray:
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


def _rademacher(stream: np.random.Philox, count: int) -> np.ndarray:
    """One bit of the stream for each element, the lowest bit of a word first."""
    words = stream.random_raw(-(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
    return bits.astype(np.float32) * 2.0 - 1.0
