"""Rows on their way from a pass to the store and its curvature."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from logra_kernels import ops
from logra_kernels.capture.layers import plain_name
from logra_kernels.curvature import RawCurvature
from logra_kernels.projection import projection_tensors
from logra_kernels.run.logged_rows import LoggedRows
from logra_kernels.run.statistic import Setup
from logra_kernels.run.watched import WatchedLayers
from logra_kernels.store import DuplicateIdError, Store, StoreWriter

SAMPLED_VALUES = 256


class Recorder:
    """Packs rows, writes them, and adds them to the curvature as the store holds them.

    Args:
        path: the store's folder.
        watched: the layers, whose layout and projection the store keeps.
        fingerprints: what tells this model and data from others.
        setup: what the first pass keeps.
        dtype: of the stored rows.
        shard_bytes: size of a full shard; None leaves it to the store.
        resume: go on with the store at `path`, if there is one.

    Raises: StoreError if the store exists (and `resume` is false), is another run's, or cannot be
        written.
    """

    def __init__(
        self,
        path: Path,
        watched: WatchedLayers,
        fingerprints: Mapping[str, Any],
        setup: Setup,
        *,
        dtype: str,
        shard_bytes: int | None = None,
        resume: bool = False,
    ) -> None:
        self._layout = watched.layout
        self._dtype = dtype
        self._exponents: list[int] | None = None
        row_bytes = self._layout.dim * np.dtype(dtype).itemsize
        self._writer = StoreWriter.create(
            path,
            modules=self._layout,
            dtype=dtype,
            projection=watched.description,
            projection_tensors=projection_tensors(watched.projections) or None,
            fingerprints=fingerprints,
            shard_rows=None if shard_bytes is None else max(1, shard_bytes // row_bytes),
            resume=resume,
        )
        self._resumed = frozenset(self._writer.committed_ids)
        self.ids = set(self._resumed)  # of the rows in the store and on their way there
        self.curvature: RawCurvature | None = None
        try:
            if setup.covariance:
                self.curvature = self._curvature_so_far()
        except BaseException:
            self._writer.abort()
            raise

    def check(self, ids: Sequence[str], setup: Setup) -> None:
        """Raise what adding these ids would raise, as far as it is known beforehand.

        Raises: RuntimeError if rows were saved before the curvature was asked for;
            DuplicateIdError for an id that was logged already.
        """
        if setup.covariance and self.curvature is None and self.ids:
            raise RuntimeError(
                "statistic: rows were saved before it was asked for; setup comes first"
            )
        if setup.save:
            twice = [name for name in ids if name in self.ids and name not in self._resumed]
            if twice:
                raise DuplicateIdError(
                    f"data_id: expected new ids, got {twice[0]!r}, which was logged already"
                )

    def add(self, logged: LoggedRows, setup: Setup) -> None:
        """Keep finite rows; those that were in the store before it was resumed are left out.

        Raises: as `check`; StoreError if the store cannot be written.
        """
        self.check(logged.ids, setup)
        if setup.save:
            new = [n for n, name in enumerate(logged.ids) if name not in self._resumed]
            logged = logged.take(new)
        if not logged.ids:
            return
        rows, row_scale = self._encode(logged.rows.float(), setup)
        if setup.save:
            scale = None if row_scale is None else row_scale.numpy()
            self._writer.append(logged.ids, rows.numpy(), scale, logged.metadata)
            self.ids.update(logged.ids)
        if setup.covariance:
            if self.curvature is None:
                self.curvature = RawCurvature(self._layout)
            if row_scale is not None:
                assert self._exponents is not None
                rows = ops.unpack_rows(rows, row_scale, self._layout.sizes, self._exponents)
            self.curvature.update(rows)

    def finish(self) -> Store:
        """Close the store, put the curvature into it, and open it for reading."""
        self._writer.close()
        store = Store.open(self._writer.path)
        if self.curvature is not None:
            self.curvature.save(store)
        return store

    def suspend(self) -> None:
        """Commit the rows added so far and let go of the store, which resume goes on with."""
        self._writer.close(finalize=False)

    def _encode(self, rows: Tensor, setup: Setup) -> tuple[Tensor, Tensor | None]:
        """rows [N, D] float32 -> what the store holds: rows [N, D] and scales [N], on the CPU."""
        if self._dtype != "float16":
            return rows.cpu(), None
        if self._exponents is None:
            self._exponents = self._fix_exponents(rows[0], setup)
        packed, row_scale = ops.pack_rows(rows, self._layout.sizes, self._exponents)
        return packed.cpu(), row_scale.cpu()

    def _curvature_so_far(self) -> RawCurvature:
        if not self._resumed:
            return RawCurvature(self._layout)
        return RawCurvature.rebuild(Store.open(self._writer.path))

    def _fix_exponents(self, row: Tensor, setup: Setup) -> list[int]:
        """The store's exponents, or those of the first row that is ever written.

        The first row is the same however the data is split into batches, and so are the exponents.
        """
        exponents = self._writer.module_exponents
        if exponents is None:
            exponents = [_exponent(part) for part in self._layout.split(row[None])]
            if setup.save:
                self._writer.set_module_exponents(exponents)
        return exponents


def model_fingerprint(model: nn.Module) -> str:
    """A hash over evenly spaced values of every parameter: other weights, another hash."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_VALUES)
        digest.update(f"{plain_name(name)} {tuple(parameter.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _exponent(part: Tensor) -> int:
    """floor(log2 max|.|); 0 for a module that is all zero."""
    largest = float(part.abs().max())
    return max(-126, min(127, math.frexp(largest)[1] - 1)) if largest > 0 else 0
