"""What every curvature can do, and the kinds of curvature by name."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from logra_kernels._checks import dtype_name
from logra_kernels.curvature.damping import DampingScale, check_damping, module_dampings
from logra_kernels.curvature.moment import Place
from logra_kernels.curvature.preconditioner import Preconditioner, plain_preconditioner
from logra_kernels.defaults import CURVATURE, NO_CURVATURE
from logra_kernels.progress import Progress, track
from logra_kernels.projection import stored_scales
from logra_kernels.rows import stored_rows
from logra_kernels.store import Module, RowLayout, Store

SOLVERS = ("cholesky", "eigh")
Labels: TypeAlias = Literal["data", "sampled"]

C = TypeVar("C", bound="Curvature")


class Curvature(ABC):
    """An estimate of the loss's curvature H, summed over rows.

    The sums and the count are kept apart, so that shards and ranks merge by addition. Damping goes
    in and a preconditioner comes out: nothing is remembered from one damping to the next. With
    `register_curvature` above it, a class is found by its `kind`: in stores, and by `Attributor`.

    Args:
        modules: the row's layout, in the store's order.
        dtype: of the sums: float64, float32, or None for the kind's own choice.

    Raises:
        ValueError: no modules, another dtype.
    """

    kind: ClassVar[str]  # the name in the registry, in stores and in results
    tokens: ClassVar[str | None] = None
    """What `update_tokens` must be given beside the rows: "expand", a vector for each token;
    "reduce", for each example the mean of its inputs and the sum of its output gradients; None,
    nothing."""
    rank_by_rows: ClassVar[bool] = False  # whether a module's H has at most the rank of its rows
    corrected: ClassVar[bool] = False  # whether `complete` reads the rows of the finished store
    of_coordinates: ClassVar[bool] = False
    """Whether it goes with rows that hold chosen coordinates of the gradients, each by a scale of
    its own: such a kind damps the coordinates without their scale."""
    fold_rows = 256  # rows that `rebuild` gives to `update` at a time

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        if not modules:
            raise ValueError("modules: expected at least one, got none")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype: expected float32, float64 or None, got {dtype}")
        self.layout = RowLayout.of(modules)
        self.modules: list[Module] = list(self.layout)
        self.place: Place = "cpu"  # where `update_tokens` sums
        self.labels: Labels = "data"  # whose gradients are summed: the data's, or sampled labels'

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of rows seen."""

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Add rows [R, D] float32, as the store holds them.

        Raises:
            TypeError, ValueError: another dtype or shape, a value that is not finite.
        """

    def update_finite(self, rows: Tensor) -> None:
        """`update` for a caller that knows every value to be finite: a kind may look no more."""
        self.update(rows)

    def update_tokens(self, module: int, inputs: Tensor, outputs: Tensor) -> None:
        """Add what a kind with `tokens` needs of a module: P_i x [n, Ki] and P_o dy [n, Ko].

        Raises:
            ValueError: the kind needs none.
        """
        raise ValueError(f"{self.kind}: expected rows alone, got tokens")

    def correct(self, rows: Tensor) -> None:
        """Add finite rows [R, D] float32 to the corrected eigenvalues, in the basis seen so far.

        This is the second pass over gradients that no store holds, such as sampled labels'.

        Raises:
            ValueError: the kind corrects none.
        """
        raise ValueError(f"{self.kind}: has no eigenvalues to correct")

    def complete(self, store: Store, progress: Progress = None) -> None:  # noqa: B027
        """Find what needs all rows at once, when the store has them."""

    @abstractmethod
    def merge(self: C, other: C) -> C:
        """Add another curvature's sums and count (another shard's or rank's); returns self."""

    @abstractmethod
    def save(self, store: Store) -> None:
        """Write the sums into the store under the kind's name; no damping is part of them."""

    @classmethod
    @abstractmethod
    def load(cls: type[C], store: Store) -> C:
        """The curvature of this kind that a store holds.

        Raises:
            ValueError: the store has none, or its file does not match its checksum.
        """

    @abstractmethod
    def mean_eigenvalues(self) -> list[float]:
        """The mean eigenvalue of each module's H; 0 where no gradient reached the module."""

    @abstractmethod
    def _preconditioner(
        self, means: Sequence[float], dampings: Sequence[float], solver: str
    ) -> Preconditioner:
        """(H + λI)⁻¹ for the mean eigenvalue and the λ of each module."""

    @classmethod
    def rebuild(
        cls: type[C], store: Store, dtype: torch.dtype | None = None, progress: Progress = None
    ) -> C:
        """The curvature of a store's rows, with the bits of one that was kept while logging.

        Of rows in 4 bits and fewer it is that of the decoded rows, with their error in it: the one
        that was kept while logging, or copied by `compress_store`, is that of the gradients.
        """
        curvature = cls(store.layout, dtype)
        done = track(progress, store.num_rows, "curvature")
        for _, rows, row_scale, row_exponents in store.blocks(curvature.fold_rows):
            curvature.update(stored_rows(store, rows, row_scale, row_exponents))
            done(rows.shape[0])
        curvature.complete(store)
        return curvature

    def damped(
        self,
        *,
        damping_scale: DampingScale | None = None,
        damping: float | None = None,
        solver: str = "cholesky",
    ) -> Preconditioner:
        """(H + λI)⁻¹ for one damping, factorised in float64.

        A module that no gradient reached has H = 0: under a relative damping its scores are zero,
        and a warning names it.

        Args:
            damping_scale: λ of each module relative to the mean eigenvalue of its H; >= 0.
                `defaults.DAMPING_SCALE` where neither is given. "auto" is 0.1 + K/N, for N rows and
                K columns of the module; for a kind with `rank_by_rows`.
            damping: λ of every module, >= 0; only one of the two.
            solver: "cholesky" refuses a singular H + λI. "eigh" takes its pseudo-inverse
                (eigenvalues within rounding of zero are dropped), and keeps the eigendecomposition
                for the next damping.

        Raises:
            ValueError: a bad damping or solver, no rows yet, or a module that cannot be inverted.
        """
        check_damping(damping_scale=damping_scale, damping=damping)
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got '{solver}'")
        if self.count == 0:
            raise ValueError("curvature: expected at least one row, got none")
        means = self.mean_eigenvalues()
        shares = [size / self.count for size in self.layout.sizes] if self.rank_by_rows else None
        dampings = module_dampings(means, shares, damping_scale=damping_scale, damping=damping)
        each = zip(self.layout.names, means, dampings, strict=True)
        silent = [name for name, mean, value in each if mean + value == 0]
        if silent:
            warnings.warn(
                f"no gradient ever reached {', '.join(silent)}: "
                "its curvature is zero, and so are its scores",
                stacklevel=2,
            )
        return self._preconditioner(means, dampings, solver)

    def sweep(
        self,
        damping_scales: Sequence[DampingScale] | None = None,
        dampings: Sequence[float] | None = None,
    ) -> Iterator[Preconditioner]:
        """One preconditioner per damping, all from one eigendecomposition.

        Raises:
            ValueError: both or neither of the two lists.
        """
        if (damping_scales is None) == (dampings is None):
            raise ValueError("sweep: expected damping_scales or dampings, one of the two")
        for value in damping_scales or ():
            yield self.damped(damping_scale=value, solver="eigh")
        for value in dampings or ():
            yield self.damped(damping=value, solver="eigh")

    def _check_rows(self, rows: Tensor) -> None:
        """Refuse what `update` refuses."""
        if rows.dtype != torch.float32:
            raise TypeError(f"rows: expected float32, got {dtype_name(rows.dtype)}")
        if rows.ndim != 2 or rows.shape[1] != self.layout.dim:
            raise ValueError(f"rows: expected [R, {self.layout.dim}], got {list(rows.shape)}")
        finite = rows.isfinite()
        if not finite.all():
            row, column = (int(v) for v in (~finite).nonzero()[0])
            raise ValueError(
                f"rows: row {row} is not finite in module '{self.layout.module_of(column).name}'"
            )

    def _described(self, checksum: str) -> dict[str, Any]:
        """What `save` keeps beside the sums of every kind."""
        described = {"kind": self.kind, "count": self.count, "checksum": checksum}
        return described if self.labels == "data" else {**described, "labels": self.labels}

    def _check_same(self, other: Curvature) -> None:
        """Refuse what `merge` refuses."""
        self._check_layout("other", other.layout)
        if self.labels != other.labels:
            raise ValueError(f"other: expected {self.labels} labels, got {other.labels}")

    def _check_layout(self, argument: str, layout: RowLayout) -> None:
        if self.layout.signature != layout.signature:
            raise ValueError(
                f"{argument}: expected the modules {self.layout.signature}, got {layout.signature}"
            )


_KINDS: dict[str, type[Curvature]] = {}


def register_curvature(kind: type[C]) -> type[C]:
    """A class decorator: the curvature is found by its `kind` from now on.

    Raises:
        ValueError: another class has the name, or it is "none".
    """
    if kind.kind == NO_CURVATURE or _KINDS.setdefault(kind.kind, kind) is not kind:
        raise ValueError(f"kind: the name '{kind.kind}' is taken")
    return kind


def kinds() -> tuple[str, ...]:
    """The names of the registered curvatures."""
    return tuple(_KINDS)


def curvature_kind(name: str) -> type[Curvature]:
    """The registered class of a name.

    Raises:
        ValueError: there is none of the name.
    """
    if name not in _KINDS:
        raise ValueError(f"curvature: expected one of {', '.join(_KINDS)}, got {name!r}")
    return _KINDS[name]


def usual_kind(store: Store) -> type[Curvature]:
    """The kind for a store's rows where none was asked for."""
    if all(s is None for s in stored_scales(store)):
        return curvature_kind(CURVATURE)
    return next(kind for kind in _KINDS.values() if kind.of_coordinates)


def load_curvature(store: Store) -> Curvature:
    """The curvature that a store holds; of several, raw, or the kind that was registered first.

    Raises:
        ValueError: it holds none of a registered kind, or one that does not match its checksum.
    """
    held = [name for name in (CURVATURE, *_KINDS) if name in store.curvatures]
    return curvature_kind(held[0] if held else CURVATURE).load(store)


def preconditioner_of(
    store: Store,
    curvature: Curvature | Preconditioner | str | None = None,
    *,
    damping_scale: DampingScale | None = None,
    damping: float | None = None,
    solver: str = "cholesky",
) -> Preconditioner:
    """The preconditioner of a store's rows; arguments as `Attributor` describes them.

    Raises:
        ValueError: no such curvature, one of other modules than the store's or that does not go
            with scaled rows, a bad damping, or a damping beside a preconditioner or "none".
    """
    found = curvature_of(store, curvature)
    if isinstance(found, Curvature):
        return found.damped(damping_scale=damping_scale, damping=damping, solver=solver)
    if (damping_scale, damping) != (None, None):
        none = isinstance(curvature, str)
        what = "no curvature" if none else "a preconditioner, which has its own"
        raise ValueError(f"damping: expected none with {what}, got one")
    return found


def curvature_of(
    store: Store, curvature: Curvature | Preconditioner | str | None = None
) -> Curvature | Preconditioner:
    """The curvature of a store's rows, or the preconditioner that was given in its place.

    Raises:
        ValueError: no such curvature, one of other modules than the store's, or one that
            does not go with scaled rows.
    """
    if isinstance(curvature, str) and curvature == NO_CURVATURE:
        return plain_preconditioner(store.layout, stored_scales(store))
    if curvature is None:
        curvature = load_curvature(store)
    elif isinstance(curvature, str) and curvature in _KINDS:
        curvature = _KINDS[curvature].load(store)
    if not isinstance(curvature, (Curvature, Preconditioner)):
        names = ", ".join(repr(name) for name in (*_KINDS, NO_CURVATURE))
        raise ValueError(
            f"curvature: expected {names}, a Curvature or a Preconditioner, got {curvature!r}"
        )
    if curvature.layout.signature != store.layout.signature:
        raise ValueError(
            f"curvature: expected the store's modules {store.layout.names}, "
            f"got {curvature.layout.names} (names or sizes differ)"
        )
    if isinstance(curvature, Preconditioner):
        return curvature
    if not curvature.of_coordinates and any(s is not None for s in stored_scales(store)):
        raise ValueError(
            f"curvature: the rows hold scaled coordinates, which '{curvature.kind}' would damp by "
            "their scale; 'diagonal' and 'shrunk' are their curvatures"
        )
    if curvature.labels == "data" and curvature.count != store.num_rows:
        warnings.warn(
            f"the curvature is of {curvature.count} rows, the store has {store.num_rows}; "
            f"{type(curvature).__name__}.rebuild(store).save(store) brings it up to date",
            stacklevel=4,
        )
    return curvature
