"""(H + λI)⁻¹ per module, by Cholesky factors or by eigendecomposition, in float64."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from logra_kernels._checks import dtype_name
from logra_kernels.curvature.whitening import Dense, Plain, Rotated, Scaled, Whitening
from logra_kernels.defaults import DAMPING_SCALE
from logra_kernels.ops._threads import set_own_threads
from logra_kernels.store import Module, RowLayout

# Cholesky factors that take more memory than this are not kept but computed for each use.
KEPT_FACTOR_BYTES = 2 << 30
MAX_WORKERS = 8
# A pool of threads takes about 3 ms to start beside OpenMP's: less work is done without one.
POOL_FLOPS = 3e7

T = TypeVar("T")


class Preconditioner(ABC):
    """(H + λI)⁻¹ per module, and the factors W that give norms |W g| in it.

    A subclass gives the three of one module: `_solve`, `_root`, `_inverse`.

    Args:
        kind: the curvature's kind.
        key: tells the self-influence of this curvature and damping from others, [0-9a-f].
        modules: the row's layout.
        mean_eigenvalues: of H + λI, one per module; 0 where both are zero.
        dampings: λ per module; None without a curvature.
    """

    def __init__(
        self,
        kind: str,
        key: str,
        modules: Sequence[Module],
        mean_eigenvalues: Sequence[float],
        dampings: Sequence[float] | None = None,
    ) -> None:
        self.kind = kind
        self.key = key
        self.layout = RowLayout.of(modules)
        self.mean_eigenvalues = list(mean_eigenvalues)
        self.modules: list[Module] = list(self.layout)
        self.dampings: dict[str, float] = dict(zip(self.layout.names, dampings or (), strict=False))

    def precondition(self, rows: Tensor) -> Tensor:
        """(H + λI)⁻¹ g for rows g [Q, D] float32 or float64, solved in float64.

        The bits do not depend on the number of threads. The last bits of float64 may depend on
        which rows are given together: LAPACK chooses the order of its sums by the rows' number.

        Returns: [Q, D] of the rows' dtype, on the CPU.

        Raises:
            TypeError, ValueError: another dtype or shape.
            RuntimeError: the factors are not kept, and the curvature has taken rows since.
        """
        if rows.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rows: expected float32 or float64, got {dtype_name(rows.dtype)}")
        if rows.ndim != 2 or rows.shape[1] != self.layout.dim:
            raise ValueError(f"rows: expected [Q, {self.layout.dim}], got {list(rows.shape)}")
        blocks = self.layout.split(rows.detach().double().cpu())
        work = sum(2.0 * rows.shape[0] * size**2 for size in self.layout.sizes)
        solved = each_module(len(blocks), lambda i: self._solve(i, blocks[i].T).T, work)
        return torch.cat(solved, dim=1).to(rows.dtype)

    def effective_dimensions(self) -> dict[str, float]:
        """d_λ = tr H(H + λI)⁻¹ = Σ e/(e + λ) of each module, {name: between 0 and K}.

        It counts the directions in which H outweighs the damping. A module of a matrix costs its
        inverse, one of known eigenvalues a sum.

        Source: Zhang 2005, Learning Bounds for Kernel Regression Using Effective Data
        Dimensionality.

        Raises:
            ValueError: there is no curvature.
        """
        if not self.dampings:
            raise ValueError("d_λ: expected a curvature, got none")
        return dict(
            zip(self.layout.names, each_module(len(self.layout), self._dimension), strict=True)
        )

    def _dimension(self, i: int) -> float:
        """d_λ of module i: K - λ tr (H + λI)⁻¹, which is 0 where H is."""
        root = self._root(i)
        kept = float(root.any(dim=1).sum())  # a pseudo-inverse leaves directions out
        trace = float(root.square().sum())
        return max(0.0, kept - self.dampings[self.layout.names[i]] * trace)

    @property
    def factors(self) -> dict[str, Tensor]:
        """W with WᵀW = (H + λI)⁻¹, {name: [K, K] float32}."""
        roots = each_module(len(self.layout), self._root)
        return {name: root.float() for name, root in zip(self.layout.names, roots, strict=True)}

    def units(self, norm: str) -> list[int]:
        """Per module the power of two that brings the factor of `norm` to a size of about 1.

        It follows from the mean eigenvalue of H + λI alone, and so costs no factorisation.
        """
        power = {"sigma": -0.5, "theta": -1.0}[norm]
        means = self.mean_eigenvalues
        return [round(power * math.log2(mean)) if mean else 0 for mean in means]

    def whitenings(self, norm: str) -> list[Whitening]:
        """Per module W in units of 2**units(norm)[i], such that |2**unit · W g| is the norm.

        norm "sigma": |W g|² = gᵀ(H + λI)⁻¹g; norm "theta": |W g| = |(H + λI)⁻¹g|.
        """
        units = self.units(norm)
        return each_module(len(self.layout), lambda i: self._whitening(i, norm, units[i]))

    def _whitening(self, i: int, norm: str, unit: int) -> Whitening:
        work = self._root if norm == "sigma" else self._inverse
        return Dense((work(i) * 2.0**-unit).float())

    @abstractmethod
    def _solve(self, i: int, columns: Tensor) -> Tensor:
        """(H + λI)⁻¹ of module i times columns [K, Q] float64; [K, Q]."""

    @abstractmethod
    def _root(self, i: int) -> Tensor:
        """W of module i with WᵀW = (H + λI)⁻¹, [K, K] float64."""

    @abstractmethod
    def _inverse(self, i: int) -> Tensor:
        """(H + λI)⁻¹ of module i, [K, K] float64."""


class IdentityPreconditioner(Preconditioner):
    """No curvature: influence becomes the plain dot product of gradients."""

    def __init__(self, modules: Sequence[Module]) -> None:
        layout = RowLayout.of(modules)
        super().__init__("none", _key("none", layout.signature), layout, [1.0] * len(layout))

    def _whitening(self, i: int, norm: str, unit: int) -> Whitening:
        return Plain()

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        return columns

    def _root(self, i: int) -> Tensor:
        return torch.eye(self.layout.sizes[i], dtype=torch.float64)

    _inverse = _root


@dataclass(frozen=True)
class ModuleMatrices:
    """A curvature as one matrix H per module: what the preconditioners below are made of."""

    kind: str
    checksum: str  # equal for equal matrices; part of the preconditioner's key
    layout: RowLayout
    mean_eigenvalues: Sequence[float]  # of H per module; 0 where H is zero
    precisions: Sequence[float]  # relative rounding error of H per module
    matrix: Callable[[int], Tensor]  # module i's H, [K, K] float64, a new tensor at each call

    def rounding(self, i: int, damping: float) -> float:
        """K times the relative rounding error of H + λI: a smaller eigenvalue is no curvature.

        Damping lifts the eigenvalues exactly, in float64; without it they are as good as the sums.
        """
        precision = torch.finfo(torch.float64).eps if damping else self.precisions[i]
        return self.layout.sizes[i] * precision


class _OfMatrices(Preconditioner):
    """What both solvers take from the matrices and λ."""

    def __init__(self, matrices: ModuleMatrices, dampings: Sequence[float], solver: str) -> None:
        key = _key(matrices.checksum, solver, [damping.hex() for damping in dampings])
        pairs = zip(matrices.mean_eigenvalues, dampings, strict=True)
        means = [mean + damping for mean, damping in pairs]
        super().__init__(matrices.kind, key, matrices.layout, means, dampings)


class CholeskyPreconditioner(_OfMatrices):
    """H + λI = L Lᵀ, so that W = L⁻¹; zero where H and λ are.

    Args:
        matrices: H of each module.
        dampings: λ of each module.

    Raises:
        ValueError: H + λI of a module is singular or not finite.
    """

    def __init__(self, matrices: ModuleMatrices, dampings: Sequence[float]) -> None:
        super().__init__(matrices, dampings, "cholesky")
        self._matrices = matrices
        self._kept: dict[int, Tensor | None] = {}
        keep = sum(8 * size**2 for size in self.layout.sizes) <= KEPT_FACTOR_BYTES
        # Factors that are not kept are computed here too: a singular module is an error now.
        factors = each_module(len(self.layout), self._factor if keep else self._check)
        if keep:
            self._kept = dict(enumerate(factors))

    def _factor(self, i: int) -> Tensor | None:
        """L of module i, [K, K] float64; None where H and λ are zero."""
        if i in self._kept:
            return self._kept[i]
        if self.mean_eigenvalues[i] == 0:
            return None
        name = self.layout.names[i]
        damping = self.dampings[name]
        matrix = self._matrices.matrix(i)
        if not matrix.isfinite().all():
            raise ValueError(f"module '{name}': H is not finite; rebuild it from the store")
        matrix.diagonal().add_(damping)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix)
        smallest = float(factor.diagonal().min()) ** 2
        rounding = self._matrices.rounding(i, damping)
        if int(info) or smallest <= rounding * float(matrix.diagonal().max()):
            values = torch.linalg.eigvalsh(matrix)
            rank = int((values > rounding * float(values.max())).sum())
            raise ValueError(_singular(name, damping, rank, len(matrix)))
        return factor

    def _check(self, i: int) -> None:
        self._factor(i)

    def lower_factors(self) -> dict[str, Tensor]:
        """L with L Lᵀ = H + λI, {name: [K, K] float64}, of modules that a gradient reached."""
        factors = zip(self.layout.names, each_module(len(self.layout), self._factor), strict=True)
        return {name: factor for name, factor in factors if factor is not None}

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        factor = self._factor(i)
        if factor is None:
            return torch.zeros_like(columns)
        # Two triangular solves: cholesky_solve copies L first, for few columns ten times the work.
        return _triangular(factor.mT, _triangular(factor, columns, upper=False), upper=True)

    def _root(self, i: int) -> Tensor:
        factor = self._factor(i)
        eye = torch.eye(self.layout.sizes[i], dtype=torch.float64)
        if factor is None:
            return torch.zeros_like(eye)
        return _triangular(factor, eye, upper=False)

    def _inverse(self, i: int) -> Tensor:
        root = self._root(i)
        return root.T @ root


class EigenPreconditioner(_OfMatrices):
    """H = Q diag(e) Qᵀ, so that W = diag((e + λ)^(-1/2)) Qᵀ; zero where e + λ is rounding.

    Args:
        matrices: H of each module.
        dampings: λ of each module.
        eigen: (e [K] ascending, Q [K, K] columns) of each module, float64.
    """

    def __init__(
        self,
        matrices: ModuleMatrices,
        dampings: Sequence[float],
        eigen: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(matrices, dampings, "eigh")
        self._vectors = [vectors for _, vectors in eigen]
        self._inverses = []  # 1 / (e + λ), [K] each
        for i, ((values, _), damping) in enumerate(zip(eigen, dampings, strict=True)):
            damped = values.clamp(min=0) + damping
            floor = matrices.rounding(i, damping) * float(damped.max())
            self._inverses.append(torch.where(damped > floor, 1 / damped, 0.0))

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        vectors = self._vectors[i]
        return vectors @ (self._inverses[i][:, None] * (vectors.T @ columns))

    def _root(self, i: int) -> Tensor:
        return self._inverses[i].sqrt()[:, None] * self._vectors[i].T

    def _inverse(self, i: int) -> Tensor:
        return (self._vectors[i] * self._inverses[i]) @ self._vectors[i].T


class ScaledRows(Preconditioner):
    """(H + λI)⁻¹ of gradients g, for rows that hold t = s·g: a score is of g, and so are norms.

    Args:
        inner: of g.
        scales: s [K] of each module; None: every s is 1.
    """

    def __init__(self, inner: Preconditioner, scales: Sequence[Tensor | None]) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for s in scales:
            digest.update(b"" if s is None else s.numpy().data)
        key, dampings = _key(inner.key, digest.hexdigest()), list(inner.dampings.values())
        super().__init__(inner.kind, key, inner.layout, inner.mean_eigenvalues, dampings)
        self._inner = inner
        self._scales = [
            torch.ones((), dtype=torch.float64) if s is None else s.double() for s in scales
        ]

    def units(self, norm: str) -> list[int]:
        """As `Preconditioner.units`, of the factors for t."""
        each = zip(self._inner.units(norm), self._scales, strict=True)
        return [unit - round(math.log2(float(s.mean()))) for unit, s in each]

    def _dimension(self, i: int) -> float:
        return self._inner._dimension(i)

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        s = self._scales[i].reshape(-1, 1)
        return self._inner._solve(i, columns / s) / s

    def _root(self, i: int) -> Tensor:
        return self._inner._root(i) / self._scales[i]

    def _inverse(self, i: int) -> Tensor:
        """(H + λI)⁻¹ of g = t / s, for the norm |(H + λI)⁻¹ g|."""
        return self._inner._inverse(i) / self._scales[i]


class DiagonalPreconditioner(Preconditioner):
    """H = diag(Λ), so that W = diag((Λ + λ)^(-1/2)); zero where Λ + λ is rounding.

    Args:
        kind, checksum: of the curvature.
        modules: the row's layout.
        eigenvalues: Λ of each module, float64, of the shape of its gradient or flat.
        dampings: λ of each module.
        solver: "cholesky" refuses a singular H + λI, "eigh" takes its pseudo-inverse.
        precision: relative rounding error of Λ.
        scales: s [K] of each module whose rows hold s·g instead of g; None: every s is 1. Λ is then
            that of the rows, E[(s·g)²], λ that of g, and so λ s² is added to Λ.

    Raises:
        ValueError: H + λI of a module is singular, or not finite.
    """

    def __init__(
        self,
        kind: str,
        checksum: str,
        modules: Sequence[Module],
        eigenvalues: Sequence[Tensor],
        dampings: Sequence[float],
        solver: str,
        precision: float = torch.finfo(torch.float64).eps,
        scales: Sequence[Tensor | None] | None = None,
    ) -> None:
        key = _key(checksum, solver, [damping.hex() for damping in dampings])
        self._scales = [None if s is None else s.double() for s in scales or [None] * len(dampings)]
        added = [
            damping if s is None else damping * s.square()
            for damping, s in zip(dampings, self._scales, strict=True)
        ]
        pairs = list(zip(eigenvalues, added, strict=True))
        means = [float((values + more).mean()) for values, more in pairs]
        super().__init__(kind, key, modules, means, dampings)
        self._inverses = []  # 1 / (Λ + λ s²), float64
        for i, (values, more) in enumerate(pairs):
            name, damping, s = self.layout.names[i], dampings[i], self._scales[i]
            damped = values.clamp(min=0) + more
            if not damped.isfinite().all():
                raise ValueError(f"module '{name}': H is not finite; log the rows again")
            rounding = torch.finfo(torch.float64).eps if damping else precision
            size = damped if s is None else damped / s.square()
            kept = size > self.layout.sizes[i] * rounding * size.max()
            if solver == "cholesky" and means[i] and not kept.all():
                raise ValueError(_singular(name, damping, int(kept.sum()), kept.numel()))
            self._inverses.append(torch.where(kept, 1 / damped, 0.0))

    def _dimension(self, i: int) -> float:
        inverses = self._inverses[i]
        damping, s = self.dampings[self.layout.names[i]], self._scales[i]
        undamped = inverses if s is None else inverses * s.square()
        return max(0.0, float((inverses > 0).sum() - damping * undamped.sum()))

    def units(self, norm: str) -> list[int]:
        """As `Preconditioner.units`; |(H + λI)⁻¹ g| is of g itself, also where rows hold s·g."""
        units = super().units(norm)
        if norm == "theta":
            for i, s in enumerate(self._scales):
                units[i] += 0 if s is None else round(math.log2(float(s.mean())))
        return units

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        return self._inverses[i].flatten()[:, None] * columns

    def _root(self, i: int) -> Tensor:
        return self._inverses[i].flatten().sqrt().diag()

    def _inverse(self, i: int) -> Tensor:
        return self._inverses[i].flatten().diag()

    def _whitening(self, i: int, norm: str, unit: int) -> Whitening:
        return Scaled(self._scale(i, norm, unit).flatten())

    def _scale(self, i: int, norm: str, unit: int) -> Tensor:
        """W in the eigenbasis, in units of 2**unit, float32."""
        scale, s = self._inverses[i], self._scales[i]
        if norm == "sigma":
            scale = scale.sqrt()
        elif s is not None:  # (Λ/s² + λ)⁻¹ g of the row's s·g
            scale = scale * s
        return (scale * 2.0**-unit).float()


def plain_preconditioner(
    modules: Sequence[Module], scales: Sequence[Tensor | None]
) -> Preconditioner:
    """No curvature: the plain dot product of gradients g, also of rows that hold s·g.

    Args:
        modules: the row's layout.
        scales: s [K] of each module, or None for 1.
    """
    if all(s is None for s in scales):
        return IdentityPreconditioner(modules)
    layout, digest = RowLayout.of(modules), hashlib.blake2b(digest_size=16)
    for s in scales:
        digest.update(b"" if s is None else s.numpy().tobytes())
    zeros = [torch.zeros(size, dtype=torch.float64) for size in layout.sizes]
    ones = [1.0] * len(layout)
    made = DiagonalPreconditioner(
        "none", digest.hexdigest(), layout, zeros, ones, "eigh", scales=scales
    )
    made.dampings.clear()  # 0 + 1 s² is inverted, and is no damping
    return made


class KroneckerPreconditioner(DiagonalPreconditioner):
    """H = (Q_B ⊗ Q_F) diag(Λ) (Q_B ⊗ Q_F)ᵀ.

    Args:
        bases: (Q_F [Ki, Ki], Q_B [Ko, Ko]) of each module, float64; None for Q_F = I.
        others: as `DiagonalPreconditioner` takes them, with Λ [Ko, Ki].
    """

    def __init__(self, bases: Sequence[tuple[Tensor | None, Tensor]], *others: Any) -> None:
        super().__init__(*others)
        self._bases = list(bases)

    def _solve(self, i: int, columns: Tensor) -> Tensor:
        into, out = self._bases[i]
        rotated: Tensor = out.T @ columns.T.reshape(-1, *self._inverses[i].shape)
        if into is None:
            solved = out @ (rotated * self._inverses[i])
        else:
            solved = out @ (rotated @ into * self._inverses[i]) @ into.T
        return solved.flatten(1).T

    def _root(self, i: int) -> Tensor:
        into, out = self._bases[i]
        if into is None:
            into = torch.eye(self._inverses[i].shape[1], dtype=torch.float64)
        return super()._root(i).diagonal()[:, None] * torch.kron(
            out.T.contiguous(), into.T.contiguous()
        )

    def _inverse(self, i: int) -> Tensor:
        root = self._root(i)
        return root.T @ root

    def _whitening(self, i: int, norm: str, unit: int) -> Whitening:
        into, out = self._bases[i]
        scale = self._scale(i, norm, unit)
        return Rotated(None if into is None else into.float(), out.float(), scale)


def _singular(name: str, damping: float, rank: int, size: int) -> str:
    return (
        f"module '{name}': H + {damping:g} I has rank {rank} of {size} and cannot "
        f"be inverted; give a larger damping (damping_scale={DAMPING_SCALE} is usual), or "
        "solver='eigh', which takes the pseudo-inverse"
    )


def each_module(count: int, work: Callable[[int], T], flops: float = math.inf) -> list[T]:
    """[work(0), …, work(count - 1)], in parallel where `flops` pay for it, each on one thread.

    LAPACK's bits depend on how many threads share a matrix, so none is shared.
    """
    threads = torch.get_num_threads()
    set_own_threads(1)
    try:
        if min(threads, count) == 1 or flops < POOL_FLOPS:
            return [work(i) for i in range(count)]
        with ThreadPoolExecutor(
            min(threads, count, MAX_WORKERS), initializer=set_own_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(work, range(count)))
    finally:
        set_own_threads(threads)


def _triangular(factor: Tensor, columns: Tensor, *, upper: bool) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(factor, columns, upper=upper)
    return solved


def _key(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
