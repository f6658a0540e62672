"""Kronecker-factored curvatures: H in the eigenbasis of two small matrices per module.

Q_F and Q_B [Ki, Ki], [Ko, Ko] are the eigenvectors of the two sides' second moments. In their basis
a row's part G [Ko, Ki] is Q_Bᵀ G Q_F, and H is diagonal: Λ [Ko, Ki]. No K × K matrix is made.

    kfac         C_F = E[x xᵀ], C_B = E[dy dyᵀ] over the tokens that count;  Λ = Λ_B Λ_Fᵀ
    ekfac        the same basis;                                            Λ = E[(Q_Bᵀ G Q_F)²]
    ec-shampoo   the eigenbases of E[Gᵀ G] and E[G Gᵀ];                      Λ = E[(Q_Bᵀ G Q_F)²]

x and dy are the projected activations and output gradients, P_i x and P_o dy; without a projection
they are x and dy themselves. "-reduce" after a name: an example counts once, with the mean of its x
and the sum of its dy, instead of once for each token ("expand").

Sources: K-FAC (Martens & Grosse 2015), for weights shared over time Eschenhagen et al. 2023; EK-FAC
(George et al. 2018; Grosse et al. 2023); Shampoo (Gupta et al. 2018), eigenvalue-corrected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from logra_kernels.curvature.base import Curvature, register_curvature
from logra_kernels.curvature.moment import Counts, Moment, Squares
from logra_kernels.curvature.preconditioner import (
    KroneckerPreconditioner,
    Preconditioner,
    each_module,
)
from logra_kernels.curvature.whitening import rotate
from logra_kernels.progress import Progress, track
from logra_kernels.rows import stored_rows
from logra_kernels.store import Module, Store

C = TypeVar("C", bound="KroneckerCurvature")
Eigenbasis: TypeAlias = tuple[Tensor, Tensor | None, Tensor, Tensor]  # Λ_F, Q_F, Λ_B, Q_B
_SIDES = ("in", "out")


class KroneckerCurvature(Curvature):
    """Two second moments per module and, if the kind is corrected, Λ from all rows.

    Arguments as in `Curvature`.
    """

    corrected: ClassVar[bool] = True

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        super().__init__(modules, dtype)
        self._moments: list[tuple[Moment | Counts, Moment | Counts]] = [
            (Moment(m.ki, dtype), Moment(m.ko, dtype)) for m in self.layout
        ]
        self._count = 0
        # Σ ‖G‖² of each module, of the kinds with `tokens`; None: a store that does not hold them.
        self._energies: list[float] | None = [0.0] * len(self.layout)
        self._squares: list[Squares] | None = None  # Σ (Q_Bᵀ G Q_F)² [Ko·Ki] of each module
        self._bases: list[Eigenbasis] | None = None

    @property
    def count(self) -> int:
        """The number of rows seen."""
        return self._count

    def update(self, rows: Tensor) -> None:
        """Count rows [R, D] float32; what they are made of comes by `update_tokens`.

        Raises:
            TypeError, ValueError: another dtype or shape, a value that is not finite.
        """
        self._check_rows(rows)
        self.update_finite(rows)

    def update_finite(self, rows: Tensor) -> None:
        """Count finite rows [R, D] float32, and add their ‖G‖² up."""
        self._count += rows.shape[0]
        if self.tokens is not None and self._energies is not None:
            parts = self.layout.split(rows.detach())
            norms = [torch.linalg.vector_norm(p, dim=1, dtype=torch.float64) for p in parts]
            for i, squares in enumerate(torch.stack(norms).square().tolist()):  # [M, R]
                for square in squares:  # one by one, so that batches do not change the sum
                    self._energies[i] += square
        self._changed()

    def update_tokens(self, module: int, inputs: Tensor, outputs: Tensor) -> None:
        """Add the tokens that count of a module's calls: P_i x [n, Ki] and P_o dy [n, Ko].

        One-hot x may be given as their places [n] int64, -1 for a zero vector: C_F is diagonal
        then, and no Ki x Ki matrix is made.
        """
        if self.tokens is None:
            super().update_tokens(module, inputs, outputs)
        if not len(inputs):
            return
        moment_in, moment_out = self._moments[module]
        one_hot = inputs.dtype == torch.int64
        if one_hot and not moment_in.count:
            moment_in = Counts(moment_in.size)
            self._moments[module] = moment_in, moment_out
        if one_hot != isinstance(moment_in, Counts):
            raise ValueError(
                f"inputs: module '{self.layout.names[module]}': expected one-hot vectors in every "
                "call, or in none"
            )
        for moment, vectors in ((moment_in, inputs), (moment_out, outputs)):
            if isinstance(moment, Moment):
                moment.place, vectors = self.place, vectors.detach().float()
            moment.update(vectors)
        self._changed()

    def merge(self: C, other: C) -> C:
        """Add another curvature's moments and count; returns self.

        Corrected eigenvalues belong to a basis: `complete` finds them anew, from all rows.
        """
        self._check_same(other)
        for i, (mine, theirs) in enumerate(zip(self._moments, other._moments, strict=True)):
            inputs, outputs = (_merged(a, b) for a, b in zip(mine, theirs, strict=True))
            self._moments[i] = inputs, outputs
        self._count += other._count
        if self._energies is None or other._energies is None:
            self._energies = None
        else:
            each = zip(self._energies, other._energies, strict=True)
            self._energies = [mine + theirs for mine, theirs in each]
        self._changed()
        return self

    def correct(self, rows: Tensor) -> None:
        """Add finite rows [R, D] float32 to Σ (Q_Bᵀ G Q_F)², in the eigenbasis of the moments."""
        if not self.corrected:
            super().correct(rows)
        if self._squares is None:
            self._squares = [Squares(size) for size in self.layout.sizes]
        bases = [(None if f is None else f.float(), b.float()) for _, f, _, b in self._eigenbases()]
        parts = self.layout.split(rows.detach().cpu())
        for part, basis, sums in zip(parts, bases, self._squares, strict=True):
            sums.update(rotate(part, *basis).flatten(1))

    def complete(self, store: Store, progress: Progress = None) -> None:
        """Corrected eigenvalues: one pass over the rows of the store, rotated.

        Those of rows that no store holds come by `correct`, and stay as they are.

        Raises:
            ValueError: the store has other modules, or another number of rows than were seen.
        """
        of_no_store = self.labels == "sampled" or (self._squares and not store.num_rows)
        if not self.corrected or of_no_store:
            return
        self._check_layout("store", store.layout)
        if store.num_rows != self._count:
            raise ValueError(
                f"{self.kind}: expected a store of the {self._count} rows that were seen, "
                f"got {store.num_rows}"
            )
        self._squares = None
        done = track(progress, store.num_rows, self.kind)
        for _, rows, row_scale, row_exponents in store.blocks(self.fold_rows):
            self.correct(stored_rows(store, rows, row_scale, row_exponents))
            done(rows.shape[0])

    @property
    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{module name: (C_F [Ki, Ki], C_B [Ko, Ko])}, float64 means over the vectors seen.

        Of one-hot inputs C_F is the diagonal alone, [Ki].
        """
        each = zip(self.layout.names, self._moments, strict=True)
        return {name: (_mean(f), _mean(b)) for name, (f, b) in each}

    @property
    def bases(self) -> dict[str, Eigenbasis]:
        """{module name: (Λ_F [Ki], Q_F [Ki, Ki], Λ_B [Ko], Q_B [Ko, Ko])}, float64, ascending.

        Of one-hot inputs Q_F is the identity, written None, and Λ_F is in the order of the inputs.
        """
        return dict(zip(self.layout.names, self._eigenbases(), strict=True))

    @property
    def energies(self) -> dict[str, float]:
        """{module name: E‖G‖² of the rows seen}, of a kind with `tokens`.

        Raises:
            ValueError: the kind keeps none, or it is of a store that was made before it did.
        """
        if self.tokens is None or self._energies is None:
            raise ValueError(f"{self.kind}: holds no E‖G‖² of its rows; log the examples again")
        means = [energy / max(self._count, 1) for energy in self._energies]
        return dict(zip(self.layout.names, means, strict=True))

    @property
    def eigenvalues(self) -> dict[str, Tensor]:
        """{module name: Λ [Ko, Ki]}, float64, in the eigenbases of ascending eigenvalues.

        Raises:
            ValueError: corrected eigenvalues were asked for before `complete`.
        """
        if not self.corrected:
            return {
                name: torch.outer(out.clamp(min=0), into.clamp(min=0))
                for name, (into, _, out, _) in zip(
                    self.layout.names, self._eigenbases(), strict=True
                )
            }
        if self._squares is None:
            raise ValueError(f"{self.kind}: complete(store) finds its eigenvalues first")
        each = zip(self.layout, self._squares, strict=True)
        return {m.name: s.total().view(m.ko, m.ki) / s.count for m, s in each}

    @property
    def checksum(self) -> str:
        """A hash of the sums, the counts and the layout: equal bits, equal checksum."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.kind, self._count, self.layout.signature)).encode())
        for moment in (moment for pair in self._moments for moment in pair):
            sums, exponent = moment.snapshot()
            digest.update(repr((exponent, moment.count, moment.dtype)).encode())
            if sums is not None:
                digest.update(sums.numpy().data)
        for squares in self._squares or ():
            digest.update(squares.total().numpy().data)
        return digest.hexdigest()

    def save(self, store: Store) -> None:
        """Write moments and corrected eigenvalues into the store under the kind's name."""
        self._check_layout("store", store.layout)
        tensors: dict[str, np.ndarray] = {}
        exponents: dict[str, list[int]] = {}
        counts: dict[str, list[int]] = {}
        for i, (name, pair) in enumerate(zip(self.layout.names, self._moments, strict=True)):
            for side, moment in zip(_SIDES, pair, strict=True):
                sums, exponent, count, waiting = moment.folded
                tensors[f"{name}.{side}"] = sums.numpy()
                tensors[f"{name}.{side}.waiting"] = waiting.numpy()
                exponents.setdefault(name, []).append(exponent)
                counts.setdefault(name, []).append(count)
            if self._squares is not None:
                module = self.layout[i]
                squares = self._squares[i].total().view(module.ko, module.ki)
                tensors[f"{name}.squares"] = squares.numpy()
        meta = {**self._described(self.checksum), "exponents": exponents, "folded": counts}
        if self.tokens is not None and self._energies is not None:
            meta["energies"] = self._energies
        if self._squares is not None:
            meta["corrected"] = self._squares[0].count
        store.save_curvature(self.kind, tensors, meta)

    @classmethod
    def load(cls: type[C], store: Store) -> C:
        """The moments that a store holds, checked against their checksum."""
        if cls.kind not in store.curvatures:
            raise ValueError(f"{store.path}: holds no curvature '{cls.kind}'")
        tensors, meta = store.load_curvature(cls.kind)
        curvature = cls(store.layout)
        try:
            curvature._count = int(meta["count"])
            for i, name in enumerate(store.layout.names):
                inputs, outputs = (
                    _moment(tensors, f"{name}.{side}", int(exponent), int(count))
                    for side, exponent, count in zip(
                        _SIDES, meta["exponents"][name], meta["folded"][name], strict=True
                    )
                )
                curvature._moments[i] = (inputs, outputs)
            if f"{store.layout.names[0]}.squares" in tensors:
                corrected = int(meta.get("corrected", curvature._count))
                curvature._squares = [
                    Squares.of(_tensor(tensors[f"{m.name}.squares"]).view(m.size), corrected)
                    for m in store.layout
                ]
            held = meta.get("energies")
            curvature._energies = None if held is None else [float(energy) for energy in held]
            checksum = meta["checksum"]
            curvature.labels = meta.get("labels", "data")
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{store.path}: curvature '{cls.kind}' lacks {error}; log the rows again"
            ) from None
        if curvature.checksum != checksum:
            raise ValueError(
                f"{store.path}: curvature '{cls.kind}' does not match its checksum; log again"
            )
        return curvature

    @classmethod
    def rebuild(
        cls: type[C], store: Store, dtype: torch.dtype | None = None, progress: Progress = None
    ) -> C:
        """The curvature of a store's rows, for a kind that rows alone make.

        Raises:
            ValueError: the kind is made of activations and output gradients.
        """
        if cls.tokens is not None:
            raise ValueError(
                f"{cls.kind}: is made of activations and output gradients, which a store does not "
                "hold; log the examples again"
            )
        return super().rebuild(store, dtype, progress)

    def mean_eigenvalues(self) -> list[float]:
        """The mean of Λ of each module."""
        return [float(values.mean()) for values in self.eigenvalues.values()]

    def _preconditioner(
        self, means: Sequence[float], dampings: Sequence[float], solver: str
    ) -> Preconditioner:
        precision = max(torch.finfo(pair[0].dtype).eps for pair in self._moments)
        values = list(self.eigenvalues.values())
        return KroneckerPreconditioner(
            [(into, out) for _, into, _, out in self._eigenbases()],
            *(self.kind, self.checksum, self.layout, values, dampings, solver, precision),
        )

    def _eigenbases(self) -> list[Eigenbasis]:
        """(Λ_F, Q_F, Λ_B, Q_B) of each module, float64, as `bases` gives them."""
        if self._bases is None:
            if self._count and not self._moments[0][0].count and self.tokens is not None:
                raise ValueError(f"{self.kind}: expected tokens beside the rows, got none")

            def bases(i: int) -> Eigenbasis:
                inputs, outputs = (_mean(moment) for moment in self._moments[i])
                values, vectors = torch.linalg.eigh(outputs)
                if inputs.ndim == 1:
                    return inputs, None, values, vectors
                return (*torch.linalg.eigh(inputs), values, vectors)

            self._bases = each_module(len(self.layout), bases)
        return self._bases

    def _changed(self) -> None:
        self._squares = self._bases = None


@register_curvature
class KfacCurvature(KroneckerCurvature):
    """H ≈ C_B ⊗ C_F: the product of the two sides' moments over tokens."""

    kind = "kfac"
    tokens = "expand"
    corrected = False


@register_curvature
class EkfacCurvature(KroneckerCurvature):
    """The eigenbasis of K-FAC, with the eigenvalues corrected by all rows."""

    kind = "ekfac"
    tokens = "expand"


@register_curvature
class KfacReduceCurvature(KfacCurvature):
    """K-FAC in which an example counts once."""

    kind = "kfac-reduce"
    tokens = "reduce"


@register_curvature
class EkfacReduceCurvature(EkfacCurvature):
    """EK-FAC in which an example counts once."""

    kind = "ekfac-reduce"
    tokens = "reduce"


@register_curvature
class EcShampooCurvature(KroneckerCurvature):
    """The eigenbases of E[Gᵀ G] and E[G Gᵀ], with the eigenvalues corrected by all rows."""

    kind = "ec-shampoo"

    def update_finite(self, rows: Tensor) -> None:
        """Add finite rows [R, D] float32, as the store holds them."""
        rows = rows.detach().cpu()
        for module, part, (inputs, outputs) in zip(
            self.layout, self.layout.split(rows), self._moments, strict=True
        ):
            gradients = part.reshape(-1, module.ko, module.ki)
            inputs.update(gradients.reshape(-1, module.ki))
            outputs.update(gradients.mT.reshape(-1, module.ko))
        super().update_finite(rows)


def _mean(moment: Moment | Counts) -> Tensor:
    return moment.symmetric() / max(moment.count, 1)


def _merged(mine: Moment | Counts, theirs: Moment | Counts) -> Moment | Counts:
    """The sum of both; a side that saw nothing may not know yet that its vectors are one-hot."""
    if not mine.count or not theirs.count:
        return mine if mine.count else theirs
    if isinstance(mine, Counts) != isinstance(theirs, Counts):
        raise ValueError("other: expected one-hot inputs on both sides, or on none")
    mine.merge(theirs)  # type: ignore[arg-type]
    return mine


def _moment(
    tensors: Mapping[str, np.ndarray], name: str, exponent: int, count: int
) -> Moment | Counts:
    sums = _tensor(tensors[name])
    if sums.ndim == 1:
        return Counts.of(sums, count)
    return Moment.of(sums, exponent, count, _tensor(tensors[f"{name}.waiting"]))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))
