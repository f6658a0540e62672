"""Self-influences kept beside the store: a folder for each key, a [r, M] array for each shard."""

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from logra_kernels.store.errors import StoreError, StoreFormatError, StoreMismatchError
from logra_kernels.store.files import (
    DATA_OFFSET_BYTES,
    Lock,
    check_file,
    crc32_of_file,
    crc32_text,
    identity,
    npy_bytes,
    npy_header,
    own_folder,
    read_array,
    remove,
    replace_file,
    sync_folder,
    write_error,
)
from logra_kernels.store.manifest import (
    LOCK,
    PLANE_KEYS,
    check_seal,
    first_difference,
    plain_json,
    read_json,
    seal,
)
from logra_kernels.store.maps import map_array

KEY_FILE = "key.json"
VALUES_DTYPE = "<f4"  # of the values, whatever the store's rows are
# The shard's index and the CRC-32 of its rows, then that of the values. Version 0.1 wrote names
# without the middle one; such a file does not tell whose values it holds, and is not read.
_FILE = re.compile(r"shard-(\d{5,})(?:-([0-9a-f]{8}))?-([0-9a-f]{8})\.npy\Z")


class SelfInfluenceCache:
    """The values of one key. An interrupted computation goes on with the shards that are missing.

    A file carries the CRC-32 of its shard's rows and that of its own data in its name, so it needs
    no manifest: the values of a shard are either whole and of these rows, or they count as missing.

    Args:
        folder: of all keys.
        key, meta: what the values are.
        shards: the manifest's entries.
        modules: the number of values of a row.
    """

    def __init__(
        self, folder: Path, key: str, meta: Any, shards: list[dict[str, Any]], modules: int
    ) -> None:
        self.folder = folder / key
        self.key = key
        self.meta = plain_json(meta, "meta")
        self._shapes = [(shard["rows"], modules) for shard in shards]
        self._rows_crc = [_rows_crc(shard) for shard in shards]
        self._seen: tuple[int, ...] | None = ()  # the folder's identity when `changed` last looked
        stored = read_key(self.folder)
        if stored is not None:
            found = first_difference(stored.get("meta"), self.meta, "meta")
            if found:
                raise StoreMismatchError(f"{self.folder / KEY_FILE}: {found}")

    def changed(self) -> bool:
        """Whether files came or went, or may have, since the last call; true for the first one."""
        before, self._seen = self._seen, identity(self.folder)
        return self._seen != before

    def missing(self) -> list[int]:
        """The indices of the shards whose values are missing or damaged."""
        found = find_files(self.folder)
        return [
            index
            for index, rows_crc in enumerate(self._rows_crc)
            if all(
                of != rows_crc or file_problem(self.folder / name, crc, self._shapes[index])
                for name, of, crc in found.get(index, [])
            )
        ]

    def read(self, index: int, places: np.ndarray | None = None) -> np.ndarray:
        """Shard `index`'s values, [r, M] float32, read into memory; only those of some rows [n].

        Raises:
            StoreFormatError: there are none; `missing` lists such shards.
        """
        self._check_index(index)
        shape = self._shapes[index]
        for name, of, _ in find_files(self.folder).get(index, []):
            if of == self._rows_crc[index]:
                _check_values_file(self.folder / name, shape)
                if places is not None:
                    dtype = np.dtype(VALUES_DTYPE)
                    values = map_array(self.folder / name, dtype, shape, DATA_OFFSET_BYTES)
                    some: np.ndarray = values[places]
                    return some
                count = shape[0] * shape[1]
                return read_array(self.folder / name, np.dtype(VALUES_DTYPE), count).reshape(shape)
        raise StoreFormatError(f"{self.folder}: expected the values of shard {index}, got none")

    def write(self, index: int, values: np.ndarray) -> None:
        """Keep shard `index`'s values, [r, M] float32, atomically.

        Raises:
            StoreError: a wrong shape or dtype, or the disk refuses.
        """
        self._check_index(index)
        shape = self._shapes[index]
        if not isinstance(values, np.ndarray) or values.dtype != np.float32:
            got = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
            raise StoreError(f"values: expected a float32 array, got {got}")
        if values.shape != shape:
            raise StoreError(f"values: expected {list(shape)}, got {list(values.shape)}")
        data = np.ascontiguousarray(values, VALUES_DTYPE).reshape(-1).view(np.uint8).data
        name = f"shard-{index:05d}-{self._rows_crc[index]}-{crc32_text(zlib.crc32(data))}.npy"
        try:
            own_folder(self.folder.parent)
            own_folder(self.folder)
            with Lock(self.folder / LOCK):
                if not (self.folder / KEY_FILE).exists():
                    text = seal({"key": self.key, "meta": self.meta})
                    replace_file(self.folder / KEY_FILE, text)
                replace_file(self.folder / name, npy_header(VALUES_DTYPE, shape), data)
                for other, *_ in find_files(self.folder).get(index, []):
                    if other != name:
                        remove(self.folder / other)
                sync_folder(self.folder)
        except OSError as error:
            raise write_error(error, f"{self.folder / name}: cannot write") from error

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self._shapes):
            raise StoreError(f"index: expected 0 to {len(self._shapes) - 1}, got {index}")


def cache_problems(folder: Path, shards: list[dict[str, Any]], modules: int) -> Iterator[str]:
    """What is wrong with the files of a store's caches that a reader would read."""
    for key in sorted(os.listdir(folder)) if folder.is_dir() else []:
        try:
            read_key(folder / key)
        except StoreError as error:
            yield str(error)
        for index, files in sorted(find_files(folder / key).items()):
            for name, of, crc in files:
                if index < len(shards) and of == _rows_crc(shards[index]):
                    shape = (shards[index]["rows"], modules)
                    if problem := file_problem(folder / key / name, crc, shape):
                        yield problem


def file_problem(path: Path, crc: str, shape: tuple[int, int]) -> str | None:
    """What is wrong with a shard's values, or None."""
    try:
        _check_values_file(path, shape)
        got = crc32_of_file(path, DATA_OFFSET_BYTES)
    except StoreFormatError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None if got == crc else f"{path}: damaged: expected crc32 {crc}, got {got}"


def read_key(folder: Path) -> dict[str, Any] | None:
    """key.json of a cache folder; None if there is none.

    Raises:
        StoreFormatError: it is damaged.
    """
    path = folder / KEY_FILE
    if not folder.is_dir():
        return None
    try:
        data, stored = read_json(path)
    except FileNotFoundError:
        return None
    check_seal(data, path)
    if not isinstance(stored, dict):
        raise StoreFormatError(f"{path}: expected an object")
    return stored


def find_files(folder: Path) -> dict[int, list[tuple[str, str | None, str]]]:
    """Shard index -> its files in a cache folder: name, CRC-32 of the rows, CRC-32 of the data."""
    found: dict[int, list[tuple[str, str | None, str]]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        if match := _FILE.match(name):
            found.setdefault(int(match[1]), []).append((name, match[2], match[3]))
    return found


def _rows_crc(shard: dict[str, Any]) -> str:
    """What tells a shard's rows from others: the CRC-32 of their file.

    If they have several, or exponents, it is the CRC-32 of these files' CRC-32s, one after the
    other.
    """
    keys = ("data", *PLANE_KEYS, "exponents")
    files: list[str] = [shard[key]["crc32"] for key in keys if key in shard]
    return files[0] if len(files) == 1 else crc32_text(zlib.crc32("".join(files).encode()))


def _check_values_file(path: Path, shape: tuple[int, int]) -> None:
    check_file(
        path.parent, path.name, npy_bytes(VALUES_DTYPE, shape), npy_header(VALUES_DTYPE, shape)
    )
