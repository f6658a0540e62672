"""Rows on their way from a pass to the store and its curvature."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from logra_kernels.capture.layers import plain_name
from logra_kernels.curvature import Curvature, curvature_kind
from logra_kernels.projection import projection_tensors
from logra_kernels.rows import decode, encode
from logra_kernels.run.logged_rows import LoggedRows
from logra_kernels.run.statistic import Setup
from logra_kernels.run.watched import WatchedLayers
from logra_kernels.store import DuplicateIdError, Store, StoreWriter
from logra_kernels.store.writer import append_finite

SAMPLED_VALUES = 256


class Recorder:
    """Packs rows, writes them, and adds them to the curvature as the store holds them.

    Args:
        path: the store's folder.
        watched: the layers, whose layout and projection the store keeps.
        fingerprints: what tells this model and data from others.
        setup: what the first pass keeps.
        dtype: of the stored rows.
        shard_rows: rows of a full shard; None leaves it to the store.
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
        shard_rows: int | None = None,
        resume: bool = False,
    ) -> None:
        self._layout = watched.layout
        self._writer = StoreWriter.create(
            path,
            modules=self._layout,
            dtype=dtype,
            projection=watched.description,
            projection_tensors=projection_tensors(watched.projections) or None,
            fingerprints=fingerprints,
            coverage=watched.coverage.as_dict(),
            shard_rows=shard_rows,
            resume=resume,
        )
        self._codec = self._writer.codec
        self._exponents: list[int] = self._writer.module_exponents or []
        self._resumed = frozenset(self._writer.committed_ids)
        self.ids = set(self._resumed)  # of the rows in the store and on their way there
        self.curvature: Curvature | None = None
        try:
            if setup.curvature is not None:
                self.curvature = self._curvature_so_far(setup.curvature)
        except BaseException:
            self._writer.abort()
            raise

    def check(self, ids: Sequence[str], setup: Setup) -> None:
        """Raise what adding these ids would raise, as far as it is known beforehand.

        Raises: RuntimeError if rows were saved before the curvature was asked for;
            DuplicateIdError for an id that was logged already.
        """
        if setup.curvature is not None and self._lacks(setup.curvature) and self.ids:
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
        rows = logged.rows.float()
        if self._codec.scaled:
            self._fix_exponents(rows[0], setup)
        stored, row_scale = encode(self._codec, rows, self._layout, self._exponents)
        stored, row_scale = stored.cpu(), None if row_scale is None else row_scale.cpu()
        if setup.save:
            scale = None if row_scale is None else row_scale.numpy()
            append_finite(self._writer, logged.ids, stored.numpy(), scale, logged.metadata)
            self.ids.update(logged.ids)
        if setup.curvature is not None:
            if self.curvature is None or self._lacks(setup.curvature):
                self.curvature = curvature_kind(setup.curvature)(self._layout)
            rows = decode(self._codec, stored, row_scale, self._layout, self._exponents)
            self.curvature.update_finite(rows)

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

    def _lacks(self, kind: str) -> bool:
        return self.curvature is None or self.curvature.kind != kind

    def _curvature_so_far(self, kind: str) -> Curvature:
        if not self._resumed:
            return curvature_kind(kind)(self._layout)
        return curvature_kind(kind).rebuild(Store.open(self._writer.path))

    def _fix_exponents(self, row: Tensor, setup: Setup) -> None:
        """Take the modules' exponents from the run's first row, and give them to the store.

        The first row is the same however the data is split into batches, and so are the exponents.
        A module that is zero there gets the others' median: far from theirs, its exponent would
        push its later values, or all others, out of float16's range.
        """
        if not self._exponents:
            found = [_exponent(part) for part in self._layout.split(row[None])]
            known = [exponent for exponent in found if exponent is not None]
            usual = statistics.median_low(known) if known else 0
            self._exponents = [usual if exponent is None else exponent for exponent in found]
        if setup.save and self._writer.module_exponents is None:
            self._writer.set_module_exponents(self._exponents)


def model_fingerprint(model: nn.Module) -> str:
    """A hash over evenly spaced values of every parameter: other weights, another hash."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_VALUES)
        digest.update(f"{plain_name(name)} {tuple(parameter.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _exponent(part: Tensor) -> int | None:
    """floor(log2 max|.|); None for a module that is all zero."""
    largest = float(part.abs().max())
    return max(-126, min(127, math.frexp(largest)[1] - 1)) if largest > 0 else None
