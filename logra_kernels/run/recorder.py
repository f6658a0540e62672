"""Rows on their way from a run to its store and its curvature."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from logra_kernels import ops
from logra_kernels.capture.layers import Layer, plain_name
from logra_kernels.curvature import RawCurvature
from logra_kernels.projection import projection_tensors
from logra_kernels.run.statistic import Setup
from logra_kernels.store import DuplicateIdError, Module, Store, StoreWriter

SAMPLED_VALUES = 256


class Recorder:
    """Packs rows, writes them, and adds them to the curvature as the store holds them."""

    def __init__(
        self,
        path: Path,
        layers: Sequence[Layer],
        projection: Mapping[str, Any],
        fingerprints: Mapping[str, Any],
        *,
        dtype: str,
        shard_bytes: int | None,
        resume: bool,
        setup: Setup,
    ) -> None:
        self._modules = [Module(layer.name, layer.ko, layer.ki) for layer in layers]
        self._sizes = [module.size for module in self._modules]
        self._dtype = dtype
        self._exponents: list[int] | None = None
        row_bytes = sum(self._sizes) * np.dtype(dtype).itemsize
        self._writer = StoreWriter.create(
            path,
            modules=self._modules,
            dtype=dtype,
            projection=projection,
            projection_tensors=projection_tensors(
                {layer.name: layer.projection for layer in layers}
            )
            or None,
            fingerprints=fingerprints,
            shard_rows=None if shard_bytes is None else max(1, shard_bytes // row_bytes),
            resume=resume,
        )
        self._resumed = frozenset(self._writer.committed_ids)
        self.ids = set(self._resumed)
        self.curvature: RawCurvature | None = None
        try:
            if setup.covariance:
                self.curvature = self._curvature_so_far()
        except BaseException:
            self._writer.abort()
            raise

    def check(self, ids: Sequence[str], setup: Setup) -> None:
        """Raise what adding these ids would raise, as far as it is known beforehand."""
        if setup.covariance and self.curvature is None:
            if self.ids:
                raise RuntimeError(
                    "statistic: rows were saved before it was asked for; setup comes first"
                )
            self.curvature = RawCurvature(self._modules)
        if setup.save:
            twice = [name for name in ids if name in self.ids and name not in self._resumed]
            if twice:
                raise DuplicateIdError(
                    f"data_id: expected new ids, got {twice[0]!r}, which was logged already"
                )

    def add(
        self,
        ids: Sequence[str],
        rows: Tensor,
        metadata: Sequence[Mapping[str, Any] | None] | None,
        setup: Setup,
    ) -> None:
        """rows [N, D]; those that were in the store before the run was resumed are left out."""
        new = [n for n, name in enumerate(ids) if not setup.save or name not in self._resumed]
        if not new:
            return
        if len(new) < len(ids):
            ids, rows = [ids[n] for n in new], rows[new]
            metadata = None if metadata is None else [metadata[n] for n in new]
        rows = rows.float()
        row_scale = None
        if self._dtype == "float16":
            if self._exponents is None:
                self._exponents = self._fix_exponents(rows[0], setup)
            rows, row_scale = ops.pack_rows(rows, self._sizes, self._exponents)
            rows, row_scale = rows.cpu(), row_scale.cpu()
        else:
            rows = rows.cpu()
        if setup.save:
            scale = None if row_scale is None else row_scale.numpy()
            self._writer.append(ids, rows.numpy(), scale, metadata)
            self.ids.update(ids)
        if setup.covariance:
            assert self.curvature is not None
            if row_scale is not None:
                assert self._exponents is not None
                rows = ops.unpack_rows(rows, row_scale, self._sizes, self._exponents)
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

    def _fix_exponents(self, row: Tensor, setup: Setup) -> list[int]:
        """The store's exponents, or from the first row ever written: no other split of the data
        into batches gives others."""
        exponents = self._writer.module_exponents
        if exponents is None:
            exponents = [_exponent(part) for part in row.split(self._sizes)]
            if setup.save:
                self._writer.set_module_exponents(exponents)
        return exponents

    def _curvature_so_far(self) -> RawCurvature:
        if not self._resumed:
            return RawCurvature(self._modules)
        return RawCurvature.rebuild(Store.open(self._writer.path))


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
