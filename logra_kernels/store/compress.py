"""A store's rows under another codec, in a store of their own."""

import math
import os
from collections.abc import Callable

import numpy as np

from logra_kernels.store.codecs import row_codec
from logra_kernels.store.errors import StoreError, StoreMismatchError
from logra_kernels.store.layout import RowLayout
from logra_kernels.store.manifest import SMALLEST_EXPONENT
from logra_kernels.store.reader import Store
from logra_kernels.store.writer import StoreWriter

BLOCK_BYTES = 16 << 20  # of decoded rows
# Of the first rows, by which the modules' exponents are chosen; fixed, so that a store that is
# begun again has the same.
SAMPLED_ROWS = 256


def compress_store(
    store: Store,
    path: str | os.PathLike[str],
    dtype: str = "int8",
    *,
    shard_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Write a finalized store's rows with another codec, with all that belongs to them.

    Ids, metadata, projection, fingerprints and coverage are copied. So are the curvatures and
    statistics: they stay those of the rows as they were, which are the more exact. What a call that
    was interrupted has committed stays; the same call goes on from there.

    Args:
        store: the rows; a store of any codec.
        path: folder of the new store.
        dtype: the name of the new codec.
        shard_rows: rows of a full shard; as in `StoreWriter.create`.
        progress: gets (rows done, rows in all).

    Returns:
        The new store.

    Raises:
        StoreError: the store is not finalized, or no such codec.
        StoreMismatchError: the folder holds a store of another codec, or of other rows.
        StoreExistsError, StoreLockedError, StoreFormatError: as in `StoreWriter.create`.
    """
    if not store.finalized:
        raise StoreError(f"{store.path}: expected a finalized store, got one that is being written")
    codec = row_codec(dtype)
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
        shard_rows=shard_rows,
        resume=True,
    )
    with writer:
        first = writer.committed_rows
        if writer.committed_ids != store.ids[:first].to_pylist():
            raise StoreMismatchError(
                f"{path}: cannot resume: it holds other rows than {store.path}"
            )
        if codec.scaled and writer.module_exponents is None and store.num_rows:
            sample = store.take(range(min(SAMPLED_ROWS, store.num_rows)))
            writer.set_module_exponents(module_exponents(sample, store.layout))
        exponents = writer.module_exponents or []
        step = max(1, BLOCK_BYTES // (4 * store.dim))
        while first < store.num_rows:
            numbers = range(first, min(first + step, store.num_rows))
            stored, scale, own = codec.encode(store.take(numbers), store.layout, exponents)
            ids = store.ids[numbers.start : numbers.stop].to_pylist()
            writer.append(ids, stored, scale, store.metadata(numbers), own)
            first = numbers.stop
            if progress is not None:
                progress(first, store.num_rows)
    made = Store.open(path)
    for name in store.curvatures:
        made.save_curvature(name, *store.load_curvature(name))
    return made


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
