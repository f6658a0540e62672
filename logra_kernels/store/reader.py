"""Reading a store: mapped shards, ids, and what is kept beside them."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logra_kernels.store.basis import Basis
from logra_kernels.store.codecs import RowCodec, row_codec
from logra_kernels.store.codecs.base import (
    EXPONENT_DTYPE,
    SCALE_DTYPE,
    row_exponents_in_range,
)
from logra_kernels.store.errors import StoreError, StoreFormatError
from logra_kernels.store.files import (
    DATA_OFFSET_BYTES,
    Lock,
    check_mapped,
    identity,
    open_to_read,
    read_array,
    read_whole,
    remove,
    sync_folder,
    write_error,
)
from logra_kernels.store.ids import parse_metadata, read_ids
from logra_kernels.store.layout import Module, RowLayout
from logra_kernels.store.manifest import (
    LOCK,
    MANIFEST,
    basis_of,
    check_files,
    layout_of,
    plain_json,
    read_manifest,
    write_manifest,
)
from logra_kernels.store.maps import map_array
from logra_kernels.store.self_influence import SelfInfluenceCache, read_key
from logra_kernels.store.tensors import check_name, check_tensors, read_tensors, write_tensors
from logra_kernels.store.verify import verify_store

TAKEN_BYTES = 16 << 20  # of rows that `Store.take` decodes at a time


class ShardFile:
    """A shard's file of stored rows: all columns, or one bit plane."""

    def __init__(
        self, path: Path, file_bytes: int, dtype: np.dtype, shape: tuple[int, int]
    ) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.dtype = dtype
        self.shape = shape
        self.row_bytes: int = shape[1] * dtype.itemsize

    @property
    def rows(self) -> np.ndarray:
        """[r, W], as stored, read in place from the mapped file."""
        check_mapped(self.path, self.file_bytes)
        return self._rows

    @cached_property
    def _rows(self) -> np.ndarray:
        return map_array(self.path, self.dtype, self.shape, DATA_OFFSET_BYTES)

    def gather(self, places: np.ndarray) -> np.ndarray:
        """[n, W], as stored: rows [n] of the shard, read from the file and not mapped.

        Raises:
            StoreFormatError: the file was removed or cut short, or the system refuses to read it.
        """
        found = np.empty((len(places), self.shape[1]), self.dtype)
        ends = np.flatnonzero(np.diff(places) != 1) + 1  # where rows do not follow each other
        runs = list(itertools.pairwise([0, *ends.tolist(), len(places)]))
        try:
            with open_to_read(self.path) as file:
                check_mapped(self.path, self.file_bytes, file.fileno())
                if len(runs) > 1 and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for start, end in runs:
                    place = found[start:end].reshape(-1).view(np.uint8).data
                    offset = DATA_OFFSET_BYTES + int(places[start]) * self.row_bytes
                    read_whole(file.fileno(), place, offset, self.path)
        except OSError as error:
            raise StoreFormatError(f"{self.path}: cannot be read: {error.strerror}") from None
        return found


class Shard:
    """A part of a store's rows, in files that are opened when they are first used."""

    def __init__(
        self, folder: Path, entry: Mapping[str, Any], codec: RowCodec, layout: RowLayout
    ) -> None:
        self.num_rows: int = entry["rows"]
        self.first_row: int = entry["first_row"]
        arrays = codec.arrays(self.num_rows, layout)
        self.files = [
            ShardFile(
                folder / entry[key]["file"],
                entry[key]["bytes"],
                codec.dtype,
                (arrays[key][1][0], arrays[key][1][1]),
            )
            for key in codec.data
        ]
        self._modules = len(layout)
        self.ids_path: Path = folder / entry["ids"]["file"]
        self._folder = folder
        self._entry = entry

    @property
    def path(self) -> Path:
        """The file of the rows; the first one, if they lie in several."""
        return self.files[0].path

    @property
    def file_bytes(self) -> int:
        """The size of the files of the rows."""
        return sum(file.file_bytes for file in self.files)

    @property
    def rows(self) -> np.ndarray:
        """[r, W], as stored: read in place from the mapped file, or a copy if there are several."""
        return self.stored(slice(None))

    def stored(self, here: slice) -> np.ndarray:
        """`rows` [here]."""
        return joined([file.rows[here] for file in self.files])

    def gather(self, places: np.ndarray) -> np.ndarray:
        """[n, W], as stored: rows [n] of the shard, as `ShardFile.gather` reads them."""
        return joined([file.gather(places) for file in self.files])

    @cached_property
    def row_scale(self) -> np.ndarray:
        """[r] float32 powers of two; ones if the codec has no row scales."""
        return self.read_row_scale()

    def read_row_scale(self) -> np.ndarray:
        """`row_scale` read from the file, and not kept in memory."""
        if self._entry["scale"] is None:
            return np.ones(self.num_rows, np.float32)
        path = self._folder / self._entry["scale"]["file"]
        return read_array(path, SCALE_DTYPE, self.num_rows)

    @cached_property
    def row_exponents(self) -> np.ndarray | None:
        """[r, M] int16: powers of two of rows and modules; None if all are zero."""
        return self.read_row_exponents()

    def read_row_exponents(self) -> np.ndarray | None:
        """`row_exponents` read from the file, and not kept in memory.

        Raises:
            StoreFormatError: the file cannot be read, or holds others than the format allows.
        """
        if "exponents" not in self._entry:
            return None
        path = self._folder / self._entry["exponents"]["file"]
        values = read_array(path, EXPONENT_DTYPE, self.num_rows * self._modules)
        values = values.reshape(self.num_rows, self._modules)
        if not row_exponents_in_range(values).all():
            raise StoreFormatError(f"{path}: damaged: its exponents are out of range")
        return values

    @property
    def table(self) -> pa.Table:
        """The ids file: columns id and metadata (JSON or null)."""
        check_mapped(self.ids_path, self._entry["ids"]["bytes"])
        return self._table

    @cached_property
    def _table(self) -> pa.Table:
        return read_ids(self.ids_path, self.num_rows)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Stored rows [r, W] from the columns that lie in each file; the same array if it is one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


class Store:
    """A store opened for reading, as it was when it was opened.

    A store that is still being written, or whose writer was killed, shows its committed shards;
    `finalized` is false then.
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Store":
        """Check the manifest, and every file's size and header, and map the shards.

        Raises:
            StoreFormatError: names the file, what was wanted and what came: no store, another
                format, a newer version, or a file that is missing, cut, or another array.
        """
        folder = Path(path)
        # Looked at first: a manifest that comes between the two counts as changed.
        seen = identity(folder / MANIFEST)
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        store = cls(folder, manifest)
        store._seen = seen
        return store

    def __init__(self, path: Path, manifest: dict[str, Any], planes: int | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.layout: RowLayout = layout_of(manifest)
        self.modules: list[Module] = list(self.layout)
        self.dim: int = self.layout.dim
        codec = row_codec(manifest["dtype"])
        self.codec: RowCodec = codec if planes is None else codec.first(planes)
        self.dtype: str = self.codec.name
        self.row_bytes: int = self.codec.row_bytes(self.layout)
        self.num_rows: int = manifest["rows"]
        self.finalized: bool = manifest["state"] == "finalized"
        self.projection: Any = manifest["projection"]
        self.fingerprints: Any = manifest["fingerprints"]
        self.coverage: Any = manifest.get("coverage")
        # A store without rows may have no exponents yet, and some codecs need none.
        exponents = manifest["module_exponents"]
        self.module_exponents: list[int] = exponents or [0] * len(self.modules)
        self.shards = [Shard(path, entry, self.codec, self.layout) for entry in manifest["shards"]]
        self._seen: tuple[int, ...] | None = None  # the identity of the manifest that was read

    @cached_property
    def basis(self) -> Basis:
        """What the rows are stored in: exponents, whitening and rotation.

        Raises:
            StoreFormatError: the whitening's file is damaged.
        """
        return basis_of(self.manifest, self.path)

    def first_planes(self, planes: int) -> "Store":
        """The same store of bit planes, of which the first so many are read alone.

        Its rows are coarser, and take fewer bytes; the other planes' files are not opened.

        Raises:
            StoreError: the rows have no so many planes.
        """
        coarser = Store(self.path, self.manifest, planes)
        coarser._seen = self._seen
        return coarser

    def check_unchanged(self) -> None:
        """See that the folder still holds the rows that were there when the store was opened.

        It costs one look at the manifest's size and time; the manifest is read again only if these
        are others. Rows that a writer added since, and other curvatures, are no change.

        Raises:
            StoreError: another store lies in the folder, or none.
        """
        seen = identity(self.path / MANIFEST)
        if seen is not None and seen == self._seen:
            return
        try:
            now = read_manifest(self.path)
        except StoreFormatError as error:
            raise StoreError(f"{self.path}: changed since it was opened: {error}") from None
        for key in ("modules", "dtype", "module_exponents", "shards"):
            there = now[key][: len(self.shards)] if key == "shards" else now[key]
            if there != self.manifest[key]:
                raise StoreError(
                    f"{self.path}: the store was replaced since it was opened; open it again "
                    f"(its {key} differ)"
                )
        self._seen = seen

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def ids(self) -> pa.LargeStringArray:
        """[num_rows] strings, in row order."""
        pieces = [piece for shard in self.shards for piece in shard.table["id"].chunks]
        return pa.chunked_array(pieces, pa.large_string()).combine_chunks()

    @cached_property
    def _rows_of_ids(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self.ids.to_pylist())}

    def row_of(self, id: str | int) -> int:
        """The row of an id.

        Raises:
            StoreError: the store does not have it.
        """
        row = self._rows_of_ids.get(str(id))
        if row is None:
            raise StoreError(f"id: the store has no {str(id)!r}")
        return row

    def id_of(self, row: int) -> str:
        """The id of a row, from its shard's file alone."""
        shard, place = self._place(row)
        return str(shard.table["id"][place].as_py())

    def metadata(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any] | None]:
        """Each row's metadata, as it was appended; None where there is none."""
        found: list[dict[str, Any] | None] = []
        for shard, row in map(self._place, rows):
            text = shard.table["metadata"][row]
            found.append(parse_metadata(text, shard.ids_path, shard.first_row + row))
        return found

    def blocks(
        self, block_rows: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray | None]]:
        """(first_row, rows [r, W], row_scale [r], row_exponents [r, M]), r ≤ block_rows.

        What `basis.decode` turns into [r, D] float32, mapped unless rows lie in several files;
        row_exponents is None where all are zero. A block never crosses a shard, so the last one of
        a shard may be short.
        """
        if block_rows < 1:
            raise StoreError(f"block_rows: expected at least 1, got {block_rows}")
        for shard in self.shards:
            for start in range(0, shard.num_rows, block_rows):
                block = slice(start, start + block_rows)
                own = None if shard.row_exponents is None else shard.row_exponents[block]
                yield shard.first_row + start, shard.stored(block), shard.row_scale[block], own

    def row(self, index: int) -> np.ndarray:
        """[D] float32: one row, unpacked."""
        row: np.ndarray = self.take([index])[0]
        return row

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n, D] float32: rows by their index, decoded."""
        numbers = np.asarray(rows, np.int64)
        taken = np.empty((len(numbers), self.dim), np.float32)
        step = max(1, TAKEN_BYTES // (4 * self.dim))
        for start in range(0, len(numbers), step):
            here = slice(start, start + step)
            taken[here] = self.basis.decode(self.codec, *self.gather(numbers[here]))
        return taken

    def gather(
        self, rows: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Rows by their index, as `blocks` gives them: stored [n, W], row_scale, row_exponents.

        They are read from their files, neighbours together, and nothing is mapped: what is read
        is what was asked for.

        Raises:
            StoreError: a number that is no row's.
            StoreFormatError: a file was removed or cut short, or the system refuses to read it.
        """
        numbers = np.asarray(rows, np.int64)
        for wrong in numbers[(numbers < 0) | (numbers >= self.num_rows)][:1]:
            raise StoreError(f"rows: expected 0 to {self.num_rows - 1}, got {wrong}")
        columns = self.codec.columns(self.layout)
        stored = np.empty((len(numbers), columns), self.codec.dtype)
        scale = np.ones(len(numbers), np.float32)
        own: np.ndarray | None = None
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        for index in np.unique(shard_of):
            shard = self.shards[index]
            here = np.flatnonzero(shard_of == index)
            places = numbers[here] - shard.first_row
            found = shard.gather(places)
            if len(here) == len(numbers):
                stored = found
            else:
                stored[here] = found
            scale[here] = shard.row_scale[places]
            if shard.row_exponents is not None:
                if own is None:
                    own = np.zeros((len(numbers), len(self.layout)), EXPONENT_DTYPE)
                own[here] = shard.row_exponents[places]
        return stored, scale, own

    def verify(
        self, checksums: bool = True, progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        """A sentence for each thing that is wrong with the files; empty if the store is good."""
        return verify_store(self.path, checksums, progress)

    def load_tensors(self, name: str = "projection") -> dict[str, np.ndarray]:
        """The matrices the rows were projected with, as they were given to the writer.

        Raises:
            StoreError: the store keeps none.
            StoreFormatError: the file is damaged.
        """
        if name != "projection":
            raise StoreError(f"name: expected 'projection', got {name!r}")
        entry = self.manifest["projection_tensors"]
        if entry is None:
            raise StoreError(f"{self.path}: keeps no projection matrices")
        return read_tensors(self.path / entry["file"], entry["sha256"])

    @property
    def curvatures(self) -> dict[str, dict[str, Any]]:
        """name -> {"sha256", "rows" (of the store when it was saved), "meta", …}."""
        return dict(self.manifest["curvature"])

    def save_curvature(self, name: str, tensors: Mapping[str, np.ndarray], meta: Any) -> None:
        """Keep named float32 or float64 arrays in the store, with JSON about them (count, kind).

        An older curvature of the same name is replaced, atomically.

        Raises:
            StoreError: a wrong name, dtype or meta, or the disk refuses.
            StoreLockedError: a writer has the store open.
        """
        check_name(name, "name")
        ready = check_tensors(tensors, "tensors")
        for key, array in ready.items():
            if array.dtype not in (np.float32, np.float64):
                raise StoreError(
                    f"tensors: {key!r}: expected float32 or float64, got {array.dtype}"
                )
        meta = plain_json(meta, "meta")
        try:
            with Lock(self.path / LOCK):
                manifest = read_manifest(self.path)
                old = manifest["curvature"].get(name)
                entry = write_tensors(self.path / "curvature", name, ready)
                manifest["curvature"][name] = {**entry, "rows": self.num_rows, "meta": meta}
                write_manifest(self.path, manifest)
                sync_folder(self.path)
                others = [other["file"] for other in manifest["curvature"].values()]
                if old is not None and old["file"] not in others:
                    remove(self.path / old["file"])
        except OSError as error:
            raise write_error(error, f"{self.path}: cannot save the curvature") from error
        self.manifest["curvature"] = manifest["curvature"]

    def load_curvature(self, name: str) -> tuple[dict[str, np.ndarray], Any]:
        """The arrays and the JSON that were saved under the name.

        Raises:
            StoreError: there is none of that name.
            StoreFormatError: the file is damaged.
        """
        entry = self.manifest["curvature"].get(name)
        if entry is None:
            known = ", ".join(self.manifest["curvature"]) or "none"
            raise StoreError(f"name: the store has no curvature {name!r}; it has {known}")
        return read_tensors(self.path / entry["file"], entry["sha256"]), entry["meta"]

    def self_influence_cache(self, key: str, meta: Any) -> SelfInfluenceCache:
        """Where the self-influences of one curvature and damping are kept, under `key`.

        Args:
            key: letters, digits, dash, underscore; at most 64.
            meta: JSON that the key stands for (curvature checksum, damping, kind).

        Raises:
            StoreMismatchError: the key is in use for another meta.
        """
        check_name(key, "key")
        folder, shards = self.path / "self_influence", self.manifest["shards"]
        return SelfInfluenceCache(folder, key, meta, shards, len(self.modules))

    def self_influence_keys(self) -> list[tuple[str, Any]]:
        """(key, meta) of the norms that lie beside the rows, in the keys' order.

        A folder that no cache could be, or whose key.json is damaged, is none.
        """
        folder, found = self.path / "self_influence", []
        for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
            with contextlib.suppress(StoreError):
                stored = read_key(folder / check_name(name, "key"))
                if stored is not None:
                    found.append((name, stored.get("meta")))
        return found

    def _place(self, row: int) -> tuple[Shard, int]:
        if not 0 <= row < self.num_rows:
            raise StoreError(f"rows: expected 0 to {self.num_rows - 1}, got {row}")
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        shard = self.shards[index]
        return shard, int(row) - shard.first_row

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([shard.first_row for shard in self.shards])
