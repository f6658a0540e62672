"""A pilot: a pass over some examples, from which a run's projection is made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from logra_kernels.capture import Capture
from logra_kernels.capture.tokens import Tokens
from logra_kernels.curvature import KfacCurvature, KfacReduceCurvature, KroneckerCurvature
from logra_kernels.curvature.moment import SequenceMoments
from logra_kernels.curvature.preconditioner import each_module
from logra_kernels.projection import PILOTED, ModuleProjection, PilotProjection
from logra_kernels.projection.pilot import Basis, pca, staircase
from logra_kernels.run.logged_rows import FinitePolicy, LoggedRows
from logra_kernels.run.watched import WatchedLayers
from logra_kernels.store import Module, RowLayout

MOMENTS = ("expand", "reduce", "sequence")


class Pilot:
    """The moments of a model's activations and output gradients, and what is made of them.

    Args:
        watched: the layers; their projection is put aside until `running` ends.
        init: "pca" or "eigen".
        rank: of "pca": K, or (rank_out, rank_in).
        coordinates: of "eigen": D, over all modules.
        moments: whose eigenvectors are taken: "expand", C_F = E[x xᵀ] and C_B = E[dy dyᵀ] over
            tokens; "reduce", of each example's mean x and summed dy; "sequence", E[Gᵀ G] and
            E[G Gᵀ] over examples.

    Raises: ValueError for another init, an option that is missing or not the kind's, or one-hot
        inputs with other moments than "expand".
    """

    def __init__(
        self,
        watched: WatchedLayers,
        init: str,
        rank: int | tuple[int, int] | None,
        coordinates: int | None,
        moments: str = "expand",
    ) -> None:
        if init not in PILOTED:
            raise ValueError(f"init: expected one of {', '.join(PILOTED)}, got {init!r}")
        needed, other = ("rank", "coordinates") if init == "pca" else ("coordinates", "rank")
        given = {"rank": rank, "coordinates": coordinates}
        if given[needed] is None or given[other] is not None:
            raise ValueError(f"{needed}: init={init!r} takes it, and no {other}")
        if moments not in MOMENTS:
            raise ValueError(f"moments: expected one of {', '.join(MOMENTS)}, got {moments!r}")
        whole = {layer.name: (layer.in_features, layer.out_features) for layer in watched.layers}
        most = sum(width_in * width_out for width_in, width_out in whole.values())
        if init == "eigen" and not (type(coordinates) is int and len(whole) <= coordinates <= most):
            raise ValueError(
                f"coordinates: expected a whole number of at least {len(whole)}, one a module, and "
                f"at most {most}, all of the weights, got {coordinates!r}"
            )
        self._watched = watched
        self._before = watched.projections
        self._rank, self._coordinates = rank, coordinates
        self._widths = whole
        modules = [Module(name, o, i) for name, (i, o) in whole.items()]
        self._form = moments
        self._count = 0  # of the examples in the moments
        self._kfac = (KfacReduceCurvature if moments == "reduce" else KfacCurvature)(modules)
        self._sequence: dict[str, SequenceMoments] = {}  # in place of `_kfac`
        self._energies: dict[str, list[float]] = {name: [] for name in whole}  # ‖dL/dW‖² [N]

    @contextmanager
    def running(self) -> Iterator[None]:
        """While examples are added; when it ends, the layers have the projection.

        If anything fails inside, they have the projection that they had.

        Raises: RuntimeError if no example was added.
        """
        done = False
        whole = {name: ModuleProjection(*widths) for name, widths in self._widths.items()}
        try:
            self._watched.give(whole)
            yield
            if not self._count:
                raise RuntimeError("pilot: no example was passed inside `with run.pilot(...)`")
            self._watched.project(self._projection())
            done = True
        finally:
            if not done:
                self._watched.give(self._before)

    def add(self, capture: Capture, ids: list[str], finite: FinitePolicy) -> None:
        """Take the tokens of the examples whose gradients are finite.

        Raises: as `finite.check`.
        """
        tokens = capture.tokens
        assert tokens is not None
        squares = torch.zeros(len(ids), len(self._widths), dtype=torch.float64)  # ‖dL/dW‖² [N, M]
        for i, name in enumerate(self._widths):
            for n in range(len(ids)):
                x, dy = tokens.of(name, "expand", [n])
                if len(x):  # ‖Σ_t dy_t x_tᵀ‖² = Σ_st (x_s·x_t)(dy_s·dy_t)
                    squares[n, i] = (_products(x) * _products(dy)).sum()
        single = RowLayout.of(Module(name, 1, 1) for name in self._widths)
        kept = finite.check(LoggedRows(ids, squares, places=range(len(ids))), single)
        for i, name in enumerate(self._widths):
            self._add_moments(i, name, tokens, kept.places)
            self._energies[name] += kept.rows[:, i].tolist()
        self._count += len(kept.ids)

    def _add_moments(self, i: int, name: str, tokens: Tokens, places: Sequence[int]) -> None:
        if self._form != "sequence":
            self._kfac.update_tokens(i, *tokens.of(name, self._form, places))
            return
        for place in places:
            x, dy = tokens.of(name, "expand", [place])
            if x.dtype == torch.int64:
                raise ValueError(
                    f"moments: module {name} has one-hot inputs, of which E[Gᵀ G] is I x I; "
                    "take 'expand'"
                )
            if len(x):
                sums = self._sequence.setdefault(name, SequenceMoments(*self._widths[name]))
                sums.add(x, dy)

    def _find_bases(self) -> dict[str, Basis]:
        """The eigenvectors of the moments, largest eigenvalue first."""
        if self._form != "sequence":
            return _bases_of(self._kfac)
        found = {n: self._sequence.get(n, SequenceMoments(*w)) for n, w in self._widths.items()}
        sums = list(found.values())

        def basis(i: int) -> Basis:
            inputs, outputs = (
                torch.linalg.eigh(side.double()) for side in (sums[i].inputs, sums[i].outputs)
            )
            return _basis(*inputs, *outputs)

        return dict(zip(found, each_module(len(sums), basis), strict=True))

    def _projection(self) -> PilotProjection:
        """What the pass leads to."""
        bases, count = self._find_bases(), self._count
        if self._coordinates is None:
            assert self._rank is not None
            return _described(pca(bases, self._rank, count), self._form)
        energies = {name: math.fsum(each) / count for name, each in self._energies.items()}
        return _described(staircase(bases, energies, self._coordinates, count), self._form)


def _basis(values_in: Tensor, into: Tensor | None, values_out: Tensor, out: Tensor) -> Basis:
    """Of ascending eigenvalues; `into` None: of one-hot inputs, whose values are in their order."""
    if into is None:
        values_in, order = values_in.sort(descending=True, stable=True)
    else:
        values_in, order = values_in.flip(0), into.flip(1)
    return Basis(values_in, order, values_out.flip(0), out.flip(1))


def _bases_of(curvature: KroneckerCurvature) -> dict[str, Basis]:
    """{module name: the eigenvectors of its moments}."""
    return {name: _basis(*sides) for name, sides in curvature.bases.items()}


def projection_of_statistics(
    curvature: KfacCurvature, rank: int | tuple[int, int] | None, coordinates: int | None
) -> PilotProjection:
    """What a pilot of the examples makes whose K-FAC is given, of whole gradients.

    Args:
        curvature: its moments are over tokens ("expand") or examples ("reduce").
        rank, coordinates: of "pca", of "eigen"; the other is None.

    Raises:
        ValueError: coordinates out of range, or the curvature of a store that holds no E‖G‖².
    """
    bases, form = _bases_of(curvature), curvature.tokens or "expand"
    if coordinates is None:
        assert rank is not None
        return _described(pca(bases, rank, curvature.count), form)
    made = staircase(bases, curvature.energies, coordinates, curvature.count)
    return _described(made, form)


def _described(made: PilotProjection, moments: str) -> PilotProjection:
    if moments == "expand":
        return made
    return replace(made, described={**made.described, "moments": moments})


def _products(vectors: Tensor) -> Tensor:
    """v_s · v_t of vectors [T, F], or of one-hot ones by their places [T]; [T, T] float64."""
    if vectors.dtype == torch.int64:
        return ((vectors[:, None] == vectors) & (vectors >= 0)).double()
    return vectors.double() @ vectors.double().T
