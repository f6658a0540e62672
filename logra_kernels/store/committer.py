"""Shards on their way to the disk: filled, committed to the manifest, or discarded."""

import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logra_kernels.store.codecs import RowCodec
from logra_kernels.store.codecs.base import EXPONENT_DTYPE
from logra_kernels.store.files import (
    DATA_OFFSET_BYTES,
    crc32_text,
    create_temporary,
    npy_header,
    remove,
    sync_folder,
    temporary,
    write_all,
    write_temporary,
)
from logra_kernels.store.ids import encode_ids
from logra_kernels.store.incoming import Batch
from logra_kernels.store.layout import RowLayout
from logra_kernels.store.manifest import shard_names, version_of, write_manifest


@dataclass
class _OpenFile:
    """A file of stored rows under its temporary name, and the CRC-32 of what it holds."""

    descriptor: int
    crc: int = 0


@dataclass
class _OpenShard:
    """The shard that is being filled: its rows are in temporary files, the rest in memory."""

    index: int
    files: dict[str, _OpenFile]  # by their keys in the manifest
    ids: list[str] = field(default_factory=list)
    metadata: list[str | None] = field(default_factory=list)
    row_scales: list[np.ndarray] = field(default_factory=list)
    row_exponents: list[tuple[int, np.ndarray]] = field(default_factory=list)  # first row, [n, M]


class Committer:
    """Writes the shards of one store, in the order that FORMAT.md gives under "Writing".

    One thread at a time uses it.

    Args:
        path: the store's folder, locked.
        manifest: as it is on disk.
        committed_ids: the ids of its rows; the ids of every committed shard are added.
        codec, layout: of the rows.
        shard_rows: rows of a full shard.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        committed_ids: list[str],
        codec: RowCodec,
        layout: RowLayout,
        shard_rows: int,
    ) -> None:
        self.manifest = manifest
        self.committed_ids = committed_ids
        self.exponents: list[int] | None = manifest["module_exponents"]
        self._path = path
        self._codec = codec
        self._layout = layout
        self.shard_rows = shard_rows
        self._shard: _OpenShard | None = None

    def write(self, batch: Batch, start: int) -> int:
        """Write the batch's rows from `start` on, as many as fit into the open shard.

        A shard that is full then is committed. Returns where the rows begin that are left.
        """
        shard = self._open_shard()
        stop = min(len(batch.ids), start + self.shard_rows - len(shard.ids))
        parts = np.split(batch.rows[start:stop], len(shard.files), axis=1)
        for file, part in zip(shard.files.values(), parts, strict=True):
            data = np.ascontiguousarray(part).view(np.uint8).data
            write_all(file.descriptor, data)
            file.crc = zlib.crc32(data, file.crc)
        if batch.row_exponents is not None and batch.row_exponents[start:stop].any():
            shard.row_exponents.append((len(shard.ids), batch.row_exponents[start:stop]))
        shard.ids += batch.ids[start:stop]
        shard.metadata += batch.metadata[start:stop]
        if batch.row_scale is not None:
            shard.row_scales.append(batch.row_scale[start:stop])
        if len(shard.ids) == self.shard_rows:
            self.commit()
        return stop

    def commit(self) -> None:
        """Rows, scales and ids to disk, then their names, then the manifest that lists them."""
        shard = self._shard
        if shard is None:
            return
        rows, names = len(shard.ids), shard_names(shard.index)
        arrays = self._codec.arrays(rows, self._layout, bool(shard.row_exponents))
        entry: dict[str, Any] = {"rows": rows, "first_row": self.manifest["rows"]}
        for key, file in shard.files.items():
            os.lseek(file.descriptor, 0, os.SEEK_SET)
            write_all(file.descriptor, npy_header(*arrays[key]))
            size = os.fstat(file.descriptor).st_size
            os.fsync(file.descriptor)
            entry[key] = _file_entry(names[key], size, file.crc)
        entry["scale"] = None
        if "scale" in arrays:
            scales = np.concatenate(shard.row_scales)  # [rows]
            entry["scale"] = self._write_array(names["scale"], arrays["scale"], scales)
        if "exponents" in arrays:
            exponents = np.zeros((rows, len(self._layout)), EXPONENT_DTYPE)
            for first, values in shard.row_exponents:
                exponents[first : first + len(values)] = values
            entry["exponents"] = self._write_array(
                names["exponents"], arrays["exponents"], exponents
            )
        texts = encode_ids(shard.ids, shard.metadata)
        write_temporary(self._path / names["ids"], texts)
        entry["ids"] = _file_entry(names["ids"], len(texts), zlib.crc32(texts))
        for key, name in names.items():
            if entry.get(key) is not None:
                os.replace(temporary(self._path / name), self._path / name)
        sync_folder(self._path)
        self._replace_manifest(
            rows=self.manifest["rows"] + rows, shards=[*self.manifest["shards"], entry]
        )
        self.committed_ids += shard.ids
        for file in shard.files.values():
            os.close(file.descriptor)
        self._shard = None
        sync_folder(self._path)

    def discard(self) -> None:
        """Remove what is on the disk of the shard that was not committed."""
        shard, self._shard = self._shard, None
        if shard is None:
            return
        for file in shard.files.values():
            os.close(file.descriptor)
        # A call may fail after the manifest on disk lists the shard. Then its files stay.
        if shard.index < len(self.manifest["shards"]):
            return
        for name in shard_names(shard.index).values():
            remove(temporary(self._path / name))
            remove(self._path / name)

    def finalize(self) -> None:
        """Mark the store complete. No shard may be open."""
        self._replace_manifest(state="finalized")
        sync_folder(self._path)

    def _replace_manifest(self, **changes: Any) -> None:
        manifest = {**self.manifest, "module_exponents": self.exponents, **changes}
        manifest["version"] = version_of(manifest)
        write_manifest(self._path, manifest)
        self.manifest = manifest

    def _write_array(
        self, name: str, array: tuple[str, tuple[int, ...]], values: np.ndarray
    ) -> dict[str, Any]:
        """A shard's small .npy file under its temporary name; its entry in the manifest."""
        header, data = npy_header(*array), values.reshape(-1).view(np.uint8).data
        write_temporary(self._path / name, header, data)
        return _file_entry(name, len(header) + len(data), zlib.crc32(data))

    def _open_shard(self) -> _OpenShard:
        if self._shard is None:
            index = len(self.manifest["shards"])
            self._shard = _OpenShard(index, {})
            for key in self._codec.data:
                descriptor = create_temporary(self._path / shard_names(index)[key])
                self._shard.files[key] = _OpenFile(descriptor)
                # The header holds the number of rows, so it is written last.
                os.lseek(descriptor, DATA_OFFSET_BYTES, os.SEEK_SET)
        return self._shard


def _file_entry(name: str, size: int, crc: int) -> dict[str, Any]:
    return {"file": name, "bytes": size, "crc32": crc32_text(crc)}
