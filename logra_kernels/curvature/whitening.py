"""The factors W of a preconditioner, by which a row's norm |W g| is found."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.curvature.moment import sum_by_halves

# Multiplications of a row's rotation below which its tokens are not looked at.
SMALLEST_ROTATION = 1 << 20


class Whitening(ABC):
    """W of one module: |W g| is the norm of the module's columns g of a row."""

    @abstractmethod
    def squares(self, columns: Tensor) -> Tensor:
        """|W g|² of g = columns [R, K] float16 or float32, [R] float32.

        A row's bits do not depend on the rows beside it.
        """

    def squares_of_tokens(self, inputs: Tensor, outputs: Tensor, ends: Tensor) -> Tensor:
        """|W g|² of rows g = vec(Σ_t y_t x_tᵀ), [R] float32, of rows of `token_limit` or fewer.

        Args:
            inputs: x [n, Ki] float32, one row's tokens after the other's.
            outputs: y [n, Ko] float32.
            ends: [R + 1] int64, where a row's tokens begin, and the last one's end.
        """
        parts = itertools.pairwise(ends.tolist())
        return self.squares(
            torch.stack([(outputs[a:b].T @ inputs[a:b]).flatten() for a, b in parts])
        )

    @property
    def token_limit(self) -> int:
        """How many tokens a row may have for its tokens to be the cheaper way to its norm."""
        return 0

    def to(self, device: torch.device) -> Whitening:
        """The same on a device."""
        return self

    @property
    def silent(self) -> bool:
        """Whether W is zero."""
        return False


class Plain(Whitening):
    """W = I."""

    def squares(self, columns: Tensor) -> Tensor:
        """|g|², [R] float32."""
        return sum_by_halves(columns.float().square(), 1)


class Scaled(Whitening):
    """W = diag(scale), scale [K] float32."""

    def __init__(self, scale: Tensor) -> None:
        self._scale = scale

    def squares(self, columns: Tensor) -> Tensor:
        """|scale ∘ g|², [R] float32."""
        return sum_by_halves((columns.float() * self._scale).square(), 1)

    def to(self, device: torch.device) -> Scaled:
        """The same on a device."""
        return Scaled(self._scale.to(device))

    @property
    def silent(self) -> bool:
        """Whether the scale is zero."""
        return not bool(self._scale.any())


class Dense(Whitening):
    """Any W [K, K] float32."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    def squares(self, columns: Tensor) -> Tensor:
        """|W g|², [R] float32."""
        return ops.self_influence(columns, self._matrix)

    def to(self, device: torch.device) -> Dense:
        """The same on a device."""
        return Dense(self._matrix.to(device))

    @property
    def silent(self) -> bool:
        """Whether W is zero."""
        return not bool(self._matrix.any())


class Rotated(Whitening):
    """W vec(G) = vec(D ∘ (Q_Bᵀ G Q_F)): two small rotations and a scale for each coordinate.

    Args:
        vectors_in: Q_F [Ki, Ki] float32; None for the identity.
        vectors_out: Q_B [Ko, Ko] float32.
        scale: D [Ko, Ki] float32.
    """

    def __init__(self, vectors_in: Tensor | None, vectors_out: Tensor, scale: Tensor) -> None:
        into = None if vectors_in is None else vectors_in.contiguous()
        self._factors = into, vectors_out.contiguous(), scale.contiguous()

    def squares(self, columns: Tensor) -> Tensor:
        """|D ∘ (Q_Bᵀ G Q_F)|², [R] float32."""
        vectors_in, vectors_out, scale = self._factors
        rotated = rotate(columns, vectors_in, vectors_out) * scale
        return sum_by_halves(rotated.flatten(1).square(), 1)

    def squares_of_tokens(self, inputs: Tensor, outputs: Tensor, ends: Tensor) -> Tensor:
        """|D ∘ Σ_t (Q_Bᵀ y_t)(Q_Fᵀ x_t)ᵀ|², [R] float32."""
        vectors_in, vectors_out, scale = self._factors
        assert vectors_in is not None
        into = ops.project(inputs.to(scale.device), vectors_in.T.contiguous())
        out = ops.project(outputs.to(scale.device), vectors_out.T.contiguous())
        rotated = ops.projected_gradients(into, out, None, None, cu_seqlens=ends.to(scale.device))
        return sum_by_halves((rotated * scale).flatten(1).square(), 1)

    @property
    def token_limit(self) -> int:
        """T Ki² + T Ko² + T Ko Ki < Ko Ki² + Ki Ko², where that is worth another product."""
        vectors_in, _, scale = self._factors
        ko, ki = scale.shape
        whole = ko * ki * (ko + ki)
        if vectors_in is None or whole < SMALLEST_ROTATION:
            return 0
        return whole // (ki * ki + ko * ko + ko * ki)

    def to(self, device: torch.device) -> Rotated:
        """The same on a device."""
        into, out, scale = self._factors
        return Rotated(None if into is None else into.to(device), out.to(device), scale.to(device))

    @property
    def silent(self) -> bool:
        """Whether D is zero."""
        return not bool(self._factors[2].any())


def rotate(columns: Tensor, vectors_in: Tensor | None, vectors_out: Tensor) -> Tensor:
    """Q_Bᵀ G Q_F [R, Ko, Ki] float32 of columns [R, Ko·Ki], G = columns of one row as [Ko, Ki].

    Without Q_F it is Q_Bᵀ G. Each product has the bits of a row alone, whatever rows are beside it.
    """
    inputs = columns.unflatten(1, (len(vectors_out), -1)).contiguous()
    if vectors_in is not None:
        inputs = ops.project(inputs, vectors_in.T.contiguous())  # G Q_F [R, Ko, Ki]
    both = ops.project(inputs.mT.contiguous(), vectors_out.T.contiguous())  # [R, Ki, Ko]
    return both.mT
