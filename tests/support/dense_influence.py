"""Influence as its formula says, in dense float64, and small stores to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.rows import encode
from logra_kernels.store import Module, Store, StoreWriter

MODULES = [Module("layer.0.up", 3, 4), Module("layer.0.down", 5, 5), Module("layer.1.up", 1, 7)]
SIZES = [module.size for module in MODULES]
DIM = sum(SIZES)


def gradients(count: int, seed: int = 0, modules: Sequence[Module] = tuple(MODULES)) -> Tensor:
    """Rows [count, D] float32 with correlated columns and magnitudes over four decades."""
    generator = torch.Generator().manual_seed(seed)
    dim = sum(module.size for module in modules)
    mix: Tensor = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    size = torch.pow(10, 4 * torch.rand(count, 1, generator=generator) - 2)
    return size * torch.randn(count, dim, generator=generator) @ mix


def make_store(
    path: Path,
    rows: Tensor,
    dtype: str = "float16",
    shard_rows: int = 1000,
    modules: Sequence[Module] = tuple(MODULES),
    ids: Sequence[str | int] | None = None,
    resume: bool = False,
    exponents: Sequence[int] | None = None,
    **options: Any,
) -> Store:
    """A store of rows [N, D]; float16 rows are packed with the exponents of their own sizes.

    `exponents` gives the modules others.
    """
    names = [f"row-{i}" for i in range(len(rows))] if ids is None else ids
    with StoreWriter.create(
        path, modules=modules, dtype=dtype, shard_rows=shard_rows, resume=resume, **options
    ) as writer:
        if dtype == "float32":
            writer.append(names, rows.numpy())
        else:
            sizes = [module.size for module in modules]
            if writer.module_exponents is None:
                parts = rows.split(sizes, dim=1)
                largest = [float(part.abs().max()) if len(part) else 0.0 for part in parts]
                found = [int(np.frexp(v)[1]) if v else 0 for v in largest]
                writer.set_module_exponents(found if exponents is None else exponents)
            assert writer.module_exponents is not None
            if writer.basis.plain:
                of = writer.layout, writer.module_exponents
                packed, scale, own = encode(writer.codec, rows, *of)
                assert scale is not None
                writer.append(names, packed.numpy(), scale.numpy(), row_exponents=own)
            else:
                writer.append(names, *writer.encode(rows.numpy())[:2])
    return Store.open(path)


def unpacked(store: Store) -> Tensor:
    """The rows a store holds, [N, D] float64."""
    return torch.from_numpy(store.take(range(store.num_rows))).double()


@dataclass
class Dense:
    """Eq. 3 and its normalisers, from float64 rows [N, D] and queries [Q, D]."""

    queries: Tensor
    rows: Tensor
    inverses: list[Tensor]  # per module [K, K]
    sizes: list[int]

    @property
    def preconditioned(self) -> Tensor:
        return self._times_inverse(self.queries)

    @property
    def dot(self) -> Tensor:
        return self.preconditioned @ self.rows.T  # [Q, N]

    @property
    def sigma(self) -> Tensor:
        return (self._times_inverse(self.rows) * self.rows).sum(1)  # [N]

    @property
    def query_sigma(self) -> Tensor:
        return (self.preconditioned * self.queries).sum(1)  # [Q]

    @property
    def theta(self) -> Tensor:
        norm: Tensor = self._times_inverse(self.rows).norm(dim=1)
        return norm  # [N]

    def scores(self, mode: str) -> Tensor:
        modes: dict[str, Callable[[], Tensor]] = {
            "dot": lambda: self.dot,
            "l-relatif": lambda: self.dot / self.sigma.sqrt(),
            "l2": lambda: self.dot - self.sigma / 2,
            "theta-relatif": lambda: self.dot / self.theta,
            "whitened-cosine": lambda: (
                self.dot / self.sigma.sqrt() / self.query_sigma.sqrt()[:, None]
            ),
        }
        return modes[mode]()

    def allowance(self, mode: str) -> Tensor:
        """What 1e-5 is relative to: |u||g| over the mode's normaliser, [Q, N].

        A dot product's rounding error is relative to |u||g|, not to a result that may cancel. The
        row's bias in "l2" adds its own.
        """
        size = self.preconditioned.norm(dim=1)[:, None] * self.rows.norm(dim=1)
        modes: dict[str, Callable[[], Tensor]] = {
            "dot": lambda: size,
            "l-relatif": lambda: size / self.sigma.sqrt(),
            "l2": lambda: size + self.sigma / 2,
            "theta-relatif": lambda: size / self.theta,
            "whitened-cosine": lambda: size / self.sigma.sqrt() / self.query_sigma.sqrt()[:, None],
        }
        return modes[mode]()

    def group(self, members: Sequence[int]) -> Dense:
        """The same with the other modules' gradients set to zero."""
        keep = torch.cat(
            [torch.full((size,), float(i in members)) for i, size in enumerate(self.sizes)]
        )
        return Dense(self.queries * keep, self.rows * keep, self.inverses, self.sizes)

    def _times_inverse(self, rows: Tensor) -> Tensor:
        parts = rows.split(self.sizes, dim=1)
        solved = [part @ inverse for part, inverse in zip(parts, self.inverses, strict=True)]
        return torch.cat(solved, dim=1)


def dense(
    queries: Tensor,
    rows: Tensor,
    sizes: Sequence[int] = tuple(SIZES),
    damping_scale: float | None = 0.1,
    damping: float | None = None,
    curvature_rows: Tensor | None = None,
) -> Dense:
    """H from the rows (or others), lambda = damping_scale * trace / K per module, or damping."""
    queries, rows = queries.double(), rows.double()
    base = rows if curvature_rows is None else curvature_rows.double()
    inverses = []
    for part in base.split(list(sizes), dim=1):
        moment = part.T @ part / len(part)
        size = moment.shape[0]
        damped = damping if damping is not None else damping_scale * moment.trace() / size
        inverses.append((moment + damped * torch.eye(size, dtype=torch.float64)).inverse())
    return Dense(queries, rows, inverses, list(sizes))


def assert_influence(
    scores: Tensor,
    truth: Dense,
    mode: str,
    order: Tensor | None = None,
    dtype: str = "float16",
) -> None:
    """|error| <= 1e-5 |u||g| over the mode's normaliser, u the preconditioned query.

    The scan adds D = 44 float32 products of a rounded u and an exact g: D 2**-24 |u||g| = 3e-6
    |u||g| at the most. The normaliser, a norm of K <= 25 sums of K products, adds its relative
    error, 2e-6 for |W||g| = |W g|. Over int8 rows a query is rounded to multiples of its largest
    element / 32639: by sqrt(D) / 65278 = 1.1e-4 of |u| at the most; over bit planes to multiples
    of its largest element / 127: by sqrt(D) / 254 = 2.7e-2.
    """
    rounding = {"int8": 1.2e-4, "int4": 2.7e-2, "int2": 2.7e-2, "sign": 2.7e-2}.get(dtype, 1e-5)
    want, allowed = truth.scores(mode), rounding * truth.allowance(mode)
    if order is not None:
        want, allowed = want[:, order], allowed[:, order]
    assert ((scores.double() - want).abs() <= allowed).all()


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit from the kernels; PyTorch's matrix product chooses its order by the shape."""
    if ops.isa() is not None:
        assert torch.equal(got, want)
    else:
        assert (got - want).abs().max() <= DIM * 2.0**-24 * want.abs().max()
