"""What a store's codec took from its rows, measured against a store of finer rows.

Both are taken in the basis in which the store keeps its rows: divided by the modules' exponents,
whitened and rotated. With t the finer row there and r the stored one, the residual over the columns
of one module is |t - r|. It is kept beside the store, and so is |r|, both rounded up and divided by
the row's scale where that is not 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from logra_kernels.store.errors import StoreMismatchError
from logra_kernels.store.layout import RowLayout
from logra_kernels.store.manifest import first_difference
from logra_kernels.store.reader import Store
from logra_kernels.store.self_influence import SelfInfluenceCache

BLOCK_BYTES = 16 << 20  # of decoded rows
# What float64 loses of t in its whitening, relative to |t|: the condition of the factors, which the
# damping keeps below 2**8 for modules of 2**12 columns, and 2**-53 of each sum.
BASIS_ROUNDING = 2.0**-30
ROUNDED_UP = 1 + 2.0**-20


def check_finer(store: Store, finer: Store) -> None:
    """Refuse a store whose rows are not those of the same examples under the same projection.

    Raises:
        StoreMismatchError: names what differs.
    """
    for key in ("modules", "projection", "fingerprints", "rows"):
        found = first_difference(store.manifest[key], finer.manifest[key], key)
        if found:
            found = found.replace("this run has", "the finer store has")
            raise StoreMismatchError(f"{finer.path}: expected finer rows of {store.path}: {found}")
    matrices = [_sha256(one) for one in (store, finer)]
    if matrices[0] != matrices[1]:
        raise StoreMismatchError(
            f"{finer.path}: expected finer rows of {store.path}: projection_tensors differ"
        )
    if not store.ids.equals(finer.ids):
        raise StoreMismatchError(
            f"{finer.path}: expected finer rows of {store.path}: their ids, or the order, differ"
        )


def residuals(
    store: Store, finer: Store, progress: Callable[[int, int], None] | None = None
) -> tuple[SelfInfluenceCache, SelfInfluenceCache]:
    """|t - r| and |r| of every shard of `store`; those that are not there are computed and kept.

    Both stores are read once; a call that was interrupted goes on with the shards that are missing.

    Args:
        store: the coarser rows; checked by `check_finer`, as is
        finer: the rows they stand for, whose decoding is exact.
        progress: gets (rows done, rows in all).

    Returns:
        per shard of `store` [r, M] float32 each; infinite where float32 cannot hold them.

    Raises:
        StoreError: the values cannot be written, or a file cannot be read.
    """
    rows = _identity(store, finer)
    gaps, sizes = (
        store.self_influence_cache(f"{name}-{rows}", {"quantity": quantity, "rows": rows})
        for name, quantity in (("residual", "|x - stored|"), ("stored", "|stored|"))
    )
    missing = {*gaps.missing(), *sizes.missing()}
    for index, shard in enumerate(store.shards):
        if index in missing:
            numbers = range(shard.first_row, shard.first_row + shard.num_rows)
            found = _of_rows(store, finer, numbers)
            gaps.write(index, found[0])
            sizes.write(index, found[1])
        if progress is not None:
            progress(shard.first_row + shard.num_rows, store.num_rows)
    return gaps, sizes


def row_units(scale: np.ndarray) -> np.ndarray:
    """What the values of rows of these scales [n] are multiplied by, [n] float64."""
    return np.where(scale > 0, scale, 1).astype(np.float64)


def _of_rows(store: Store, finer: Store, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    """|t - r| and |r|, [n, M] float32, of the rows `numbers`."""
    layout, codec = store.layout, store.codec
    gaps, sizes = (np.empty((len(numbers), len(layout)), np.float32) for _ in range(2))
    step = max(1, BLOCK_BYTES // (4 * store.dim))
    for start in range(0, len(numbers), step):
        here = slice(start, min(start + step, len(numbers)))
        stored, scale, own = store.gather(numbers[here])
        rows = codec.elements(stored, layout).astype(np.float64)
        rows[scale == 0] = 0
        if own is not None:
            rows *= np.repeat(np.ldexp(1.0, own), layout.sizes, axis=1)
        exact = store.basis.coordinates(finer.take(numbers[here])) / row_units(scale)[:, None]
        lost = BASIS_ROUNDING * _norms(exact, layout)
        gaps[here] = _rounded_up(_norms(exact - rows, layout) + lost)
        sizes[here] = _rounded_up(_norms(rows, layout))
    return gaps, sizes


def _norms(rows: np.ndarray, layout: RowLayout) -> np.ndarray:
    """[n, M] over the columns of each module."""
    norms: np.ndarray = np.sqrt(np.add.reduceat(rows**2, layout.offsets[:-1], axis=1))
    return norms


def _rounded_up(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        near = (values * ROUNDED_UP).astype(np.float32)
    up: np.ndarray = np.nextafter(near, np.float32(np.inf))
    return np.where(values > 0, up, np.float32(0))


def _identity(store: Store, finer: Store) -> str:
    """Tells the finer rows from others, 16 hexadecimal digits: their checksums and exponents.

    Of a store in bit planes, of which fewer may be read, the planes are in it too.
    """
    facts = (finer.dtype, finer.module_exponents, store.row_bytes)
    digest = hashlib.sha256(repr(facts).encode())
    for entry in finer.manifest["shards"]:
        for key in ("data", "scale", "exponents"):
            if entry.get(key) is not None:
                digest.update(f"{key} {entry['rows']} {entry[key]['crc32']} ".encode())
    return digest.hexdigest()[:16]


def _sha256(store: Store) -> dict[str, str]:
    """The checksums of a store's projection matrices by name."""
    kept = store.manifest["projection_tensors"]
    return {} if kept is None else {name: one["sha256"] for name, one in kept["tensors"].items()}
