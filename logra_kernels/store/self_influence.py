"""Self-influences kept beside the store: a folder for each key, a [r, M] array for each shard."""

import json
import os
import re
import zlib
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
    npy_bytes,
    npy_header,
    remove,
    replace_file,
    sync_folder,
    write_error,
)
from logra_kernels.store.manifest import LOCK, check_seal, first_difference, plain_json, seal

KEY_FILE = "key.json"
_DTYPE = "<f4"  # of the values, whatever the store's rows are
_FILE = re.compile(r"shard-(\d{5,})-([0-9a-f]{8})\.npy\Z")


class SelfInfluenceCache:
    """The values of one key. An interrupted computation goes on with the shards that are missing.

    A file carries the CRC-32 of its data in its name, so it needs no manifest: the values of a
    shard are either whole, or they count as missing.
    """

    def __init__(
        self, folder: Path, key: str, meta: Any, shard_rows: list[int], modules: int
    ) -> None:
        self.folder = folder / key
        self.key = key
        self.meta = plain_json(meta, "meta")
        self._shard_rows = shard_rows
        self._modules = modules
        stored = read_key(self.folder)
        if stored is not None:
            found = first_difference(stored.get("meta"), self.meta, "meta")
            if found:
                raise StoreMismatchError(f"{self.folder / KEY_FILE}: {found}")

    def missing(self) -> list[int]:
        """The indices of the shards whose values are missing or damaged."""
        found = find_files(self.folder)
        return [
            index
            for index in range(len(self._shard_rows))
            if all(
                file_problem(self.folder, name, crc, (self._shard_rows[index], self._modules))
                for name, crc in found.get(index, [])
            )
        ]

    def read(self, index: int) -> np.ndarray:
        """Shard `index`'s values, [r, M] float32, mapped.

        Raises:
            StoreFormatError: there are none; `missing` lists such shards.
        """
        self._check_index(index)
        shape = (self._shard_rows[index], self._modules)
        for name, _ in find_files(self.folder).get(index, []):
            _check_values_file(self.folder, name, shape)
            return np.memmap(self.folder / name, _DTYPE, "r", DATA_OFFSET_BYTES, shape)
        raise StoreFormatError(f"{self.folder}: expected the values of shard {index}, got none")

    def write(self, index: int, values: np.ndarray) -> None:
        """Keep shard `index`'s values, [r, M] float32, atomically.

        Raises:
            StoreError: a wrong shape or dtype, or the disk refuses.
        """
        self._check_index(index)
        shape = (self._shard_rows[index], self._modules)
        if not isinstance(values, np.ndarray) or values.dtype != np.float32:
            got = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
            raise StoreError(f"values: expected a float32 array, got {got}")
        if values.shape != shape:
            raise StoreError(f"values: expected {list(shape)}, got {list(values.shape)}")
        data = np.ascontiguousarray(values, _DTYPE).reshape(-1).view(np.uint8).data
        name = f"shard-{index:05d}-{crc32_text(zlib.crc32(data))}.npy"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with Lock(self.folder / LOCK):
                if not (self.folder / KEY_FILE).exists():
                    text = seal({"key": self.key, "meta": self.meta})
                    replace_file(self.folder / KEY_FILE, text)
                replace_file(self.folder / name, npy_header(_DTYPE, shape), data)
                for other, _ in find_files(self.folder).get(index, []):
                    if other != name:
                        remove(self.folder / other)
                sync_folder(self.folder)
        except OSError as error:
            raise write_error(error, f"{self.folder / name}: cannot write") from error

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self._shard_rows):
            raise StoreError(f"index: expected 0 to {len(self._shard_rows) - 1}, got {index}")


def file_problem(folder: Path, name: str, crc: str, shape: tuple[int, int]) -> str | None:
    """What is wrong with a shard's values, or None."""
    try:
        _check_values_file(folder, name, shape)
    except StoreFormatError as error:
        return str(error)
    got = crc32_of_file(folder / name, DATA_OFFSET_BYTES)
    if got != crc:
        return f"{folder / name}: damaged: expected crc32 {crc}, got {got}"
    return None


def read_key(folder: Path) -> dict[str, Any] | None:
    """key.json of a cache folder; None if there is none.

    Raises:
        StoreFormatError: it is damaged.
    """
    path = folder / KEY_FILE
    try:
        data = path.read_bytes()
        stored: dict[str, Any] = json.loads(data)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(f"{path}: is not JSON: {error}") from None
    check_seal(data, path)
    return stored


def find_files(folder: Path) -> dict[int, list[tuple[str, str]]]:
    """Shard index -> the names of its files in a cache folder, each with its CRC-32."""
    found: dict[int, list[tuple[str, str]]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        if match := _FILE.match(name):
            found.setdefault(int(match[1]), []).append((name, match[2]))
    return found


def _check_values_file(folder: Path, name: str, shape: tuple[int, int]) -> None:
    check_file(folder, name, npy_bytes(_DTYPE, shape), npy_header(_DTYPE, shape))
