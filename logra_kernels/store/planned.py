"""How many bytes the rows of a store will take, before there is one."""

from collections.abc import Sequence

import numpy as np

from logra_kernels.store.codecs import RowCodec
from logra_kernels.store.files import npy_bytes
from logra_kernels.store.ids import encode_ids
from logra_kernels.store.layout import RowLayout
from logra_kernels.store.self_influence import VALUES_DTYPE
from logra_kernels.store.writer import usual_shard_rows

# Arrow starts every buffer of a file at a multiple of at most this.
_ARROW_ALIGNMENT = 64


def planned_bytes(
    codec: RowCodec,
    layout: RowLayout,
    id_bytes: Sequence[int],
    metadata_bytes: Sequence[int],
    *,
    shard_rows: int | None = None,
    row_exponents: bool = False,
) -> dict[str, int]:
    """The sizes of the files that come with N rows, as `StoreWriter` will write them.

    Args:
        codec, layout: of the rows.
        id_bytes: [N] the UTF-8 bytes of each row's id, in the order of the rows.
        metadata_bytes: [N] those of its metadata as JSON; -1 for a row without.
        shard_rows: rows of a full shard; None: as the writer chooses them.
        row_exponents: whether rows have exponents of their own; only the rows themselves tell.

    Returns:
        "rows": the arrays of all shards; "ids": their ids and metadata; "norms": what a first query
        leaves of one curvature and damping; and the number of "shards".
    """
    step = shard_rows or usual_shard_rows(codec, layout)
    found = {"rows": 0, "ids": 0, "norms": 0, "shards": 0}
    for start in range(0, len(id_bytes), step):
        ids = np.asarray(id_bytes[start : start + step], np.int64)
        metadata = np.asarray(metadata_bytes[start : start + step], np.int64)
        arrays = codec.arrays(len(ids), layout, row_exponents)
        found["rows"] += sum(npy_bytes(*array) for array in arrays.values())
        found["ids"] += _ids_bytes(ids, metadata)
        found["norms"] += npy_bytes(VALUES_DTYPE, (len(ids), len(layout)))
        found["shards"] += 1
    return found


def _ids_bytes(ids: np.ndarray, metadata: np.ndarray) -> int:
    """The size of an ids file, by one with as many texts and the same sizes modulo the alignment.

    The file holds the texts of a column as one buffer, so only the sum of their sizes counts.
    """
    there = metadata >= 0
    sums = int(ids.sum()), int(metadata[there].sum())
    first, second = (size % _ARROW_ALIGNMENT + _ARROW_ALIGNMENT for size in sums)
    texts: list[str | None] = ["" if known else None for known in there]
    if there.any():
        texts[int(there.argmax())] = "x" * second
    else:
        second = sums[1]
    small = encode_ids(["x" * first, *[""] * (len(ids) - 1)], texts)
    return len(small) + sums[0] - first + sums[1] - second
