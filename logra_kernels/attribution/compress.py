"""A store's rows under another codec, in a store of their own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch

from logra_kernels.attribution.attributor import Attributor
from logra_kernels.attribution.norms import Norms
from logra_kernels.attribution.reading import Reading
from logra_kernels.curvature import RawCurvature, kinds
from logra_kernels.curvature.preconditioner import CholeskyPreconditioner
from logra_kernels.projection import stored_scales
from logra_kernels.store import (
    RowCodec,
    RowLayout,
    Store,
    StoreError,
    StoreMismatchError,
    StoreWriter,
    row_codec,
)
from logra_kernels.store.manifest import SEED, SMALLEST_EXPONENT

BLOCK_BYTES = 16 << 20  # of decoded rows
# Of the first rows, by which the modules' exponents are chosen; fixed, so that a store that is
# begun again has the same.
SAMPLED_ROWS = 256


def compress_store(
    store: Store,
    path: str | os.PathLike[str],
    dtype: str = "int8",
    *,
    rotate: bool | None = None,
    whiten: bool | None = None,
    shard_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Write a finalized store's rows with another codec, with all that belongs to them.

    Ids, metadata, projection, fingerprints and coverage are copied. So are the curvatures and
    statistics: they stay those of the rows as they were, which are the more exact. The new store
    also keeps √sigma of the rows as they were, under the store's curvature and default damping, if
    it holds its rows in a basis of their own. What a call that was interrupted has committed stays;
    the same call goes on from there.

    Args:
        store: the rows; a store of any codec.
        path: folder of the new store.
        dtype: the name of the new codec.
        rotate: rotate rows before they are encoded; None: for codecs of 8 bits and fewer.
        whiten: encode L⁻¹ g of each module in the place of g, with L Lᵀ = H + λI of the raw
            curvature at the default damping; None: for codecs of 8 bits and fewer, where the store
            has a raw curvature and its rows are not whitened by their projection.
        shard_rows: rows of a full shard; as in `StoreWriter.create`.
        progress: gets (rows done, rows in all).

    Returns:
        The new store.

    Raises:
        StoreError: the store is not finalized, no such codec, a codec whose rows are not rotated
            or always are, or no raw curvature to whiten by.
        StoreMismatchError: the folder holds a store of another codec, or of other rows.
        StoreExistsError, StoreLockedError, StoreFormatError: as in `StoreWriter.create`.
    """
    if not store.finalized:
        raise StoreError(f"{store.path}: expected a finalized store, got one that is being written")
    codec = row_codec(dtype)
    if rotate is False and not codec.faithful:
        raise StoreError(f"rotate: expected True or None, for {dtype} rows always are")
    rotate = codec.rotated if rotate is None else rotate
    factors = _whitening(store, codec, whiten)
    tensors = None
    if store.manifest["projection_tensors"] is not None:
        tensors = store.load_tensors()
    writer = StoreWriter.create(
        path,
        modules=store.modules,
        dtype=dtype,
        projection=store.projection,
        projection_tensors=tensors,
        fingerprints=store.fingerprints,
        coverage=store.coverage,
        rotation=SEED if rotate else None,
        whitening=factors,
        shard_rows=shard_rows,
        resume=True,
    )
    with writer:
        done = writer.committed_rows
        if writer.committed_ids != store.ids[:done].to_pylist():
            raise StoreMismatchError(
                f"{path}: cannot resume: it holds other rows than {store.path}"
            )
        if codec.scaled and writer.module_exponents is None and store.num_rows:
            writer.set_module_exponents(_exponents(store, rotate, factors is not None))
        step = max(1, BLOCK_BYTES // (4 * store.dim))
        # The same blocks whatever was committed: a product of matrices may depend on its rows.
        for first in range(done - done % step, store.num_rows, step):
            numbers = range(first, min(first + step, store.num_rows))
            new = slice(max(done - first, 0), None)
            stored, scale, own = writer.encode(store.take(numbers))
            ids = store.ids[numbers.start : numbers.stop].to_pylist()
            writer.append(
                ids[new],
                stored[new],
                None if scale is None else scale[new],
                store.metadata(numbers[new]),
                None if own is None else own[new],
            )
            if progress is not None:
                progress(numbers.stop, store.num_rows)
    made = Store.open(path)
    for name in store.curvatures:
        made.save_curvature(name, *store.load_curvature(name))
    if (
        not made.basis.plain
        and store.num_rows
        and any(name in kinds() for name in store.curvatures)
    ):
        _copy_norms(store, made)
    return Store.open(path)


def _whitening(store: Store, codec: RowCodec, whiten: bool | None) -> dict[str, np.ndarray] | None:
    """L of each module, float32; None for rows that are not whitened."""
    raw = RawCurvature.kind in store.curvatures
    if whiten is None:
        scaled = any(scale is not None for scale in stored_scales(store))
        whiten = codec.rotated and raw and not scaled
    if not whiten:
        return None
    if not raw:
        raise StoreError(f"whiten: expected a store with a raw curvature, got {store.path}")
    damped = RawCurvature.load(store).damped()
    assert isinstance(damped, CholeskyPreconditioner)
    factors = damped.lower_factors()
    return {name: factor.float().numpy() for name, factor in factors.items()}


def _exponents(store: Store, rotate: bool, whitened: bool) -> list[int]:
    """The modules' exponents: zeros for rows that are whitened, and so of one size."""
    if rotate and (whitened or any(scale is not None for scale in stored_scales(store))):
        return [0] * len(store.layout)
    sample = store.take(range(min(SAMPLED_ROWS, store.num_rows)))
    return module_exponents(sample, store.layout)


def _copy_norms(store: Store, made: Store) -> None:
    """Keep beside the new store what √sigma of the old one's rows is, under its curvature."""
    exact = Attributor(store)
    found = exact.module_norms()  # [N, M]
    cpu = torch.device("cpu")
    norms = Norms(exact.preconditioner, "sigma", made.module_exponents, cpu, made)
    reading = Reading(made, cpu)
    for index, shard in enumerate(made.shards):
        here = slice(shard.first_row, shard.first_row + shard.num_rows)
        norms.adopt(reading.shard(index), found[here])


def module_exponents(rows: np.ndarray, layout: RowLayout) -> list[int]:
    """Powers of two that make the modules of usual rows [n, D] of one size.

    Of each module the median ratio of its largest element to its row's, over the rows in which it
    is not zero; rounded up, for a module that is made the largest of its row costs all others bits.
    """
    largest = np.maximum.reduceat(np.abs(rows), layout.offsets[:-1], axis=1).astype(np.float64)
    found = []
    for module in largest.T:  # [n]
        there = module > 0
        ratio = np.median(module[there] / largest[there].max(axis=1)) if there.any() else 1.0
        found.append(max(math.ceil(np.log2(ratio)), SMALLEST_EXPONENT))
    return found
