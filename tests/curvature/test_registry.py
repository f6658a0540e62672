"""Kinds of curvature by name: a second one works in stores and in the Attributor unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from dense_influence import MODULES, Dense, assert_influence, dense, gradients, unpacked
from refusals import refused
from torch import Tensor

from logra_kernels.attribution import Attributor
from logra_kernels.curvature import (
    Curvature,
    DiagonalCurvature,
    RawCurvature,
    base,
    curvature_kind,
    kinds,
    load_curvature,
    register_curvature,
)
from logra_kernels.curvature.preconditioner import (
    CholeskyPreconditioner,
    ModuleMatrices,
    Preconditioner,
)
from logra_kernels.store import Module, Store

QUERIES = gradients(4, seed=7)


class Diagonal(Curvature):
    """Σ g² alone: H is diagonal."""

    kind = "toy"

    def __init__(self, modules: Sequence[Module], dtype: torch.dtype | None = None) -> None:
        super().__init__(modules, dtype)
        self.sums = torch.zeros(self.layout.dim, dtype=torch.float64)
        self._count = 0

    @property
    def count(self) -> int:
        return self._count

    def update(self, rows: Tensor) -> None:
        self.sums += rows.double().square().sum(0)
        self._count += len(rows)

    def merge(self, other: Diagonal) -> Diagonal:
        self.sums += other.sums
        self._count += other._count
        return self

    def save(self, store: Store) -> None:
        store.save_curvature(self.kind, {"sums": self.sums.numpy()}, self._count)

    @classmethod
    def load(cls, store: Store) -> Diagonal:
        tensors, count = store.load_curvature(cls.kind)
        curvature = cls(store.layout)
        curvature.sums, curvature._count = torch.from_numpy(np.array(tensors["sums"])), count
        return curvature

    def mean_eigenvalues(self) -> list[float]:
        return [float(self.sums[at].mean()) / self._count for at in self.layout.columns]

    def _preconditioner(
        self, means: Sequence[float], dampings: Sequence[float], solver: str
    ) -> Preconditioner:
        diagonals = [self.sums[at] / self._count for at in self.layout.columns]
        precisions = [torch.finfo(torch.float64).eps] * len(diagonals)
        name = str(hash(tuple(self.sums.tolist())))
        matrices = ModuleMatrices(
            self.kind, name, self.layout, means, precisions, lambda i: diagonals[i].diag()
        )
        return CholeskyPreconditioner(matrices, dampings)


@pytest.fixture
def diagonal(monkeypatch: pytest.MonkeyPatch) -> type[Diagonal]:
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    return register_curvature(Diagonal)


def dot_under_the_diagonal(store: Store) -> Dense:
    rows = unpacked(store)
    truth = dense(QUERIES, rows)
    for i, part in enumerate(rows.split(truth.sizes, dim=1)):
        moment = part.square().mean(0)
        truth.inverses[i] = (1 / (moment + 0.1 * moment.mean())).diag()
    return truth


def test_a_second_kind_works_from_the_store_to_the_scores(
    store: Store, diagonal: type[Diagonal]
) -> None:
    """Found by name, by what the store holds, as an object, and as a preconditioner."""
    curvature = diagonal.rebuild(store)
    curvature.save(store)
    assert {"raw", "toy"} < set(kinds())
    truth = dot_under_the_diagonal(store)
    for given in (None, "toy", curvature, curvature.damped()):
        attributor = Attributor(store, given)
        assert attributor.preconditioner.kind == "toy"
        for mode in ("dot", "l-relatif"):
            assert_influence(attributor.scores(QUERIES, mode).scores, truth, mode)
    assert torch.allclose(attributor.self_influence(), truth.sigma, rtol=1e-4, atol=0)
    (folder,) = (store.path / "self_influence").iterdir()
    assert folder.name == f"sigma-{attributor.preconditioner.key}"


def test_the_kind_that_was_registered_first_comes_first(
    store: Store, diagonal: type[Diagonal]
) -> None:
    diagonal.rebuild(store).save(store)
    assert load_curvature(store).kind == "toy"
    RawCurvature.rebuild(store).save(store)
    assert load_curvature(store).kind == "raw"
    assert Attributor(store, "toy").preconditioner.kind == "toy"


def test_shards_of_a_second_kind_merge(store: Store, diagonal: type[Diagonal]) -> None:
    rows = gradients(90)
    parts = [diagonal(MODULES), diagonal(MODULES)]
    for part, some in zip(parts, rows.split(50), strict=True):
        part.update(some)
    whole = diagonal(MODULES)
    whole.update(rows)
    assert torch.allclose(parts[0].merge(parts[1]).sums, whole.sums, rtol=1e-12)
    with pytest.warns(UserWarning, match=r"of 90 rows, the store has 150; Diagonal\.rebuild"):
        Attributor(store, whole)


def test_names_are_taken_once(diagonal: type[Diagonal]) -> None:
    assert register_curvature(Diagonal) is Diagonal
    for taken in ("raw", "none"):
        with pytest.raises(ValueError, match=f"kind: the name '{taken}' is taken"):
            register_curvature(type("Other", (Diagonal,), {"kind": taken}))
    assert curvature_kind("raw") is RawCurvature
    with pytest.raises(ValueError, match=r"raw, .*toy, got 'newton'"):
        curvature_kind("newton")


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_refuses_rows_that_a_store_cannot_hold(kind: str) -> None:
    curvature = curvature_kind(kind)(MODULES)
    rows = gradients(3)
    spoilt = rows.clone()
    spoilt[1, 13] = torch.nan
    refused("rows: row 1 is not finite in module 'layer.0.down'", curvature.update, spoilt)
    refused(f"rows: expected [R, {rows.shape[1]}], got [3, 2]", curvature.update, rows[:, :2])
    with pytest.raises(TypeError, match="rows: expected float32, got float64"):
        curvature.update(rows.double())
    assert curvature.count == 0
    if curvature.tokens is None:
        refused(f"{kind}: expected rows alone, got tokens", curvature.update_tokens, 0, rows, rows)


def test_the_diagonal_has_sums_of_float64() -> None:
    refused("dtype: expected float64 or None", DiagonalCurvature, MODULES, torch.float32)
