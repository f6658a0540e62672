"""(H + lambda I)^-1 per module, by Cholesky or eigendecomposition, in float64."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from logra_kernels.rows import dtype_name, layout, split_columns
from logra_kernels.store import Module

if TYPE_CHECKING:
    from logra_kernels.curvature import RawCurvature

# Cholesky factors above this are not kept between calls but computed again.
KEPT_FACTOR_BYTES = 2 << 30
MAX_WORKERS = 8
# Less work than this is done before a pool has started its threads (some 3 ms beside OpenMP's).
POOL_FLOPS = 3e7

T = TypeVar("T")


class Preconditioner(ABC):
    """(H + lambda I)^-1 per module, and the factors whose squares give norms in it."""

    kind: str
    key: str
    modules: list[Module]
    dampings: dict[str, float]
    _sizes: list[float]  # mean eigenvalue of H + lambda I per module

    def precondition(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1 g for rows g [Q, D] float32 or float64, solved in float64; [Q, D].

        The bits do not depend on the number of threads. They may depend on which rows are asked
        together, in the last of float64's: LAPACK orders its sums by their number.
        """
        if rows.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rows: expected float32 or float64, got {dtype_name(rows.dtype)}")
        dim = sum(module.size for module in self.modules)
        if rows.ndim != 2 or rows.shape[1] != dim:
            raise ValueError(f"rows: expected [Q, {dim}], got {list(rows.shape)}")
        blocks = split_columns(rows.detach().double().cpu(), self.modules)
        work = sum(2.0 * rows.shape[0] * module.size**2 for module in self.modules)
        solved = each_module(len(blocks), lambda i: self._solve(i, blocks[i].T).T, work)
        return torch.cat(solved, dim=1).to(rows.dtype)

    @property
    def factors(self) -> dict[str, Tensor]:
        """W with W^T W = (H + lambda I)^-1, {name: [K, K] float32}."""
        roots = each_module(len(self.modules), self._root)
        return {m.name: root.float() for m, root in zip(self.modules, roots, strict=True)}

    def units(self, kind: str) -> list[int]:
        """Per module the exponent of two that brings the factor of `kind` to about 1.

        It follows from lambda and the mean eigenvalue alone, so that it costs no factorisation.
        """
        power = {"sigma": -0.5, "theta": -1.0}[kind]
        return [round(power * math.log2(size)) if size else 0 for size in self._sizes]

    def scaled_factors(self, kind: str) -> list[Tensor] | None:
        """Per module a float32 W with |2**unit W g| the norm asked for; None for the identity.

        kind "sigma": |.|^2 = g^T (H + lambda I)^-1 g; kind "theta": |(H + lambda I)^-1 g|.
        """
        work = self._root if kind == "sigma" else self._inverse
        units = self.units(kind)
        return each_module(len(self.modules), lambda i: (work(i) * 2.0 ** -units[i]).float())

    @abstractmethod
    def _solve(self, i: int, columns: Tensor) -> Tensor: ...

    @abstractmethod
    def _root(self, i: int) -> Tensor: ...

    @abstractmethod
    def _inverse(self, i: int) -> Tensor: ...


class IdentityPreconditioner(Preconditioner):
    """No curvature: influence becomes the plain dot product of gradients."""

    kind = "none"

    def __init__(self, modules: Sequence[Module]) -> None:
        self.modules = list(modules)
        self.dampings = {}
        self.key = _key("none", layout(self.modules))
        self._sizes = [1.0] * len(self.modules)

    @property
    def factors(self) -> dict[str, Tensor]:
        return {m.name: torch.eye(m.size) for m in self.modules}

    def scaled_factors(self, kind: str) -> list[Tensor] | None:
        return None

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        return columns

    def _root(self, i: int) -> Tensor:
        return torch.eye(self.modules[i].size, dtype=torch.float64)

    _inverse = _root


class CholeskyPreconditioner(Preconditioner):
    """H + lambda I = L L^T, so that W = L^-1."""

    def __init__(self, curvature: RawCurvature, means: list[float], lambdas: list[float]) -> None:
        self.kind = curvature.kind
        self.modules = curvature.modules
        self._sizes = [mean + damping for mean, damping in zip(means, lambdas, strict=True)]
        self.dampings = {m.name: v for m, v in zip(self.modules, lambdas, strict=True)}
        self.key = _key(curvature.checksum, "cholesky", [v.hex() for v in lambdas])
        self._lambdas = lambdas
        self._zero = [curvature._is_zero(i) for i in range(len(self.modules))]
        self._precision = _precisions(curvature, lambdas)
        self._curvature = curvature
        self._version = curvature._version
        self._kept: dict[int, Tensor | None] = {}
        keep = sum(8 * m.size**2 for m in self.modules) <= KEPT_FACTOR_BYTES
        # also where no factor is kept: a module that cannot be inverted is an error of damped()
        factors = each_module(len(self.modules), self._factorise if keep else self._check)
        if keep:
            self._kept = dict(enumerate(factors))

    def _factorise(self, i: int) -> Tensor | None:
        """L of module i, or None where H and lambda are zero."""
        if i in self._kept:
            return self._kept[i]
        if self._curvature._version != self._version:
            raise RuntimeError("curvature: rows came in since damped(); ask it for another")
        damping, name = self._lambdas[i], self.modules[i].name
        if self._zero[i] and damping == 0:
            return None
        matrix = self._curvature._moment(i)
        if not matrix.isfinite().all():
            raise ValueError(f"module '{name}': H is not finite; rebuild it from the store")
        size = matrix.shape[0]
        matrix.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        smallest = float(factor.diagonal().min()) ** 2
        # a pivot this small is rounding, not curvature
        floor = size * self._precision[i] * float(matrix.diagonal().max())
        if int(info) or smallest <= floor:
            values = torch.linalg.eigvalsh(matrix)
            rank = int((values > size * self._precision[i] * float(values.max())).sum())
            raise ValueError(
                f"module '{name}': H + {damping:g} I has rank {rank} of {size} and cannot be "
                "inverted; give a larger damping (damping_scale=0.1 is usual), or solver='eigh', "
                "which takes the pseudo-inverse"
            )
        return factor

    def _check(self, i: int) -> None:
        self._factorise(i)

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        factor = self._factorise(i)
        if factor is None:
            return torch.zeros_like(columns)
        # cholesky_solve copies the factor first, which for few columns is ten times the work
        half = torch.linalg.solve_triangular(factor, columns, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)

    def _root(self, i: int) -> Tensor:
        factor = self._factorise(i)
        size = self.modules[i].size
        eye = torch.eye(size, dtype=torch.float64)
        if factor is None:
            return torch.zeros_like(eye)
        return torch.linalg.solve_triangular(factor, eye, upper=False)

    def _inverse(self, i: int) -> Tensor:
        root = self._root(i)
        return root.T @ root


class EigenPreconditioner(Preconditioner):
    """H = Q diag(e) Q^T, so that W = diag((e + lambda)^-1/2) Q^T; zero where e + lambda is."""

    def __init__(
        self,
        curvature: RawCurvature,
        means: list[float],
        lambdas: list[float],
        eigen: list[tuple[Tensor, Tensor]],
    ) -> None:
        self.kind = curvature.kind
        self.modules = curvature.modules
        self._sizes = [mean + damping for mean, damping in zip(means, lambdas, strict=True)]
        self.dampings = {m.name: v for m, v in zip(self.modules, lambdas, strict=True)}
        self.key = _key(curvature.checksum, "eigh", [v.hex() for v in lambdas])
        self._vectors = [vectors for _, vectors in eigen]  # [K, K], columns
        self._inverses = []  # [K]
        precisions = _precisions(curvature, lambdas)
        for (values, _), damping, precision in zip(eigen, lambdas, precisions, strict=True):
            damped = values.clamp(min=0) + damping
            floor = len(values) * precision * float(damped.max())
            self._inverses.append(torch.where(damped > floor, 1 / damped, 0.0))

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        vectors = self._vectors[i]
        return vectors @ (self._inverses[i][:, None] * (vectors.T @ columns))

    def _root(self, i: int) -> Tensor:
        return self._inverses[i].sqrt()[:, None] * self._vectors[i].T

    def _inverse(self, i: int) -> Tensor:
        return (self._vectors[i] * self._inverses[i]) @ self._vectors[i].T


def each_module(count: int, work: Callable[[int], T], flops: float = math.inf) -> list[T]:
    """work(0) .. work(count - 1), in parallel where that pays, each on one thread.

    LAPACK's bits depend on how many threads share a matrix, so none is shared.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if min(threads, count) == 1 or flops < POOL_FLOPS:
            return [work(i) for i in range(count)]
        with ThreadPoolExecutor(
            min(threads, count, MAX_WORKERS), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(work, range(count)))
    finally:
        torch.set_num_threads(threads)


def _precisions(curvature: RawCurvature, lambdas: list[float]) -> list[float]:
    """Below K times this, relative to the largest, an eigenvalue of H + lambda I is rounding.

    Damping lifts the eigenvalues exactly, in float64; without it they are no better than the sums.
    """
    wide = torch.finfo(torch.float64).eps
    return [
        wide if damping else torch.finfo(dtype).eps
        for damping, dtype in zip(lambdas, curvature._dtypes, strict=True)
    ]


def _key(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
