"""What a store's codec took from its rows, measured against a store of finer rows.

The residual of a row in one module is |t - r|, with t the finer store's row and r this store's, as
they are decoded. It is kept beside this store, rounded up, in units of the row as it lies in the
file: times scale[r] · 2**module_exponents[m] it is at least |t - r|.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from logra_kernels.store.errors import StoreMismatchError
from logra_kernels.store.manifest import first_difference
from logra_kernels.store.reader import Store
from logra_kernels.store.self_influence import SelfInfluenceCache

BLOCK_BYTES = 16 << 20  # of decoded rows
# Decoding rounds both rows to float32, each by at most 2**-24 of an element. Twice as much is added
# to the residual; then its own sums in float64 and its rounding to float32 are covered by a factor.
DECODED_ROUNDING = 2.0**-23
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
) -> SelfInfluenceCache:
    """The residuals of every shard of `store`; those that are not there are computed and kept.

    Both stores are read once; a call that was interrupted goes on with the shards that are missing.

    Args:
        store: the coarser rows; checked by `check_finer`, as is
        finer: the rows they stand for.
        progress: gets (rows done, rows in all).

    Returns:
        per shard of `store` [r, M] float32; infinite where float32 cannot hold the residual.

    Raises:
        StoreError: the values cannot be written, or a file cannot be read.
    """
    meta = {
        "quantity": "|x - stored|",
        "unit_exponents": store.module_exponents,
        "rows": _identity(finer),
    }
    cache = store.self_influence_cache(f"residual-{meta['rows']}", meta)
    missing = set(cache.missing())
    for index, shard in enumerate(store.shards):
        if index in missing:
            numbers = range(shard.first_row, shard.first_row + shard.num_rows)
            cache.write(index, _residuals(store, finer, numbers))
        if progress is not None:
            progress(shard.first_row + shard.num_rows, store.num_rows)
    return cache


def _residuals(store: Store, finer: Store, numbers: range) -> np.ndarray:
    """[n, M] float32 of the rows `numbers`."""
    layout = store.layout
    found = np.empty((len(numbers), len(layout)), np.float32)
    units = np.ldexp(1.0, np.asarray(store.module_exponents))  # [M]
    step = max(1, BLOCK_BYTES // (4 * store.dim))
    for start in range(0, len(numbers), step):
        here = numbers[start : start + step]
        stored, scale, own = store.gather(here)
        rows = store.codec.decode(stored, scale, own, layout, store.module_exponents)
        exact = finer.take(here).astype(np.float64)
        squares = np.add.reduceat((exact - rows) ** 2, layout.offsets[:-1], axis=1)  # [n, M]
        sizes = np.add.reduceat(exact**2, layout.offsets[:-1], axis=1)
        # |r| is at most |t| + |t - r|; the last term is for what lies below normal numbers.
        gap = np.sqrt(squares)
        gap += DECODED_ROUNDING * (2 * np.sqrt(sizes) + gap) + 2.0**-148 * np.sqrt(layout.sizes)
        relative = gap / (units * scale[:, None].astype(np.float64)) * ROUNDED_UP
        with np.errstate(over="ignore"):
            found[start : start + len(here)] = np.nextafter(
                relative.astype(np.float32), np.float32(np.inf)
            )
    return found


def _identity(store: Store) -> str:
    """Tells a store's rows from others, 16 hexadecimal digits: their checksums and exponents."""
    digest = hashlib.sha256(repr((store.dtype, store.module_exponents)).encode())
    for entry in store.manifest["shards"]:
        for key in ("data", "scale", "exponents"):
            if entry.get(key) is not None:
                digest.update(f"{key} {entry['rows']} {entry[key]['crc32']} ".encode())
    return digest.hexdigest()[:16]


def _sha256(store: Store) -> dict[str, str]:
    """The checksums of a store's projection matrices by name."""
    kept = store.manifest["projection_tensors"]
    return {} if kept is None else {name: one["sha256"] for name, one in kept["tensors"].items()}
