"""The folder of a store that is to be written: made, or taken up where another writer left it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from logra_kernels.store.errors import StoreExistsError, StoreFormatError
from logra_kernels.store.files import (
    TEMPORARY_SUFFIX,
    Lock,
    crc32_of_file,
    remove,
    sync_folder,
    write_error,
)
from logra_kernels.store.ids import read_ids
from logra_kernels.store.manifest import (
    LOCK,
    MANIFEST,
    check_files,
    check_same_run,
    listed_files,
    read_manifest,
    write_manifest,
)
from logra_kernels.store.tensors import TENSOR_FILE, fingerprint, write_tensors

_TENSOR_FOLDERS = ("projection", "curvature")
_FOLDERS = (*_TENSOR_FOLDERS, "self_influence")
_SHARD_FILE = re.compile(r"shard-\d{5,}\.(npy|plane\d\.npy|scale\.npy|exponents\.npy|ids\.arrow)\Z")


def open_folder(
    path: Path,
    fresh: dict[str, Any],
    tensors: Mapping[str, dict[str, np.ndarray] | None],
    resume: bool,
) -> tuple[Lock, dict[str, Any], list[str]]:
    """Lock the folder, and write a store without rows into it, or take up the one that is there.

    Args:
        path: the folder; it is made if it is not there.
        fresh: the manifest of a new store.
        tensors: for each of TENSOR_KEYS the matrices, if they are to be kept.
        resume: go on with a store that is there.

    Returns:
        The lock, the manifest to go on with, and the ids of its rows.

    Raises:
        StoreExistsError, StoreMismatchError, StoreLockedError, StoreFormatError: as
            StoreWriter.create says.
    """
    _refuse_other_folder(path, resume)
    lock = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path / LOCK)
        _refuse_other_folder(path, resume)
        return lock, *_begin(path, fresh, tensors)
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise write_error(error, f"{path}: cannot make the store") from error
        raise


def discard_empty(path: Path) -> None:
    """Delete what a store without rows has written: its manifest and its tensors.

    Raises:
        StoreExistsError: it has rows.
        StoreFormatError, StoreLockedError: as `StoreWriter.create` says.
    """
    try:
        with Lock(path / LOCK):
            manifest = read_manifest(path)
            if manifest["shards"]:
                raise StoreExistsError(f"{path}: expected a store without rows")
            remove(path / MANIFEST)
            for entry, _ in listed_files(manifest):
                remove(path / entry["file"])
            sync_folder(path)
    except OSError as error:
        raise write_error(error, f"{path}: cannot delete the empty store") from error


def _refuse_other_folder(path: Path, resume: bool) -> None:
    """Raise StoreExistsError for a store that is not to be resumed, and for other files."""
    if not path.exists():
        return
    if not path.is_dir():
        raise StoreExistsError(f"{path}: expected a folder for the store, got a file")
    if (path / MANIFEST).exists():
        if not resume:
            raise StoreExistsError(f"{path}: there is a store already; resume=True goes on with it")
        return
    for entry in sorted(os.listdir(path)):
        # A create that was killed before its first manifest leaves these; they can be taken over.
        if entry not in (LOCK, *_FOLDERS) and not entry.endswith(TEMPORARY_SUFFIX):
            raise StoreExistsError(
                f"{path}: expected an empty folder or a store, got a folder with {entry!r} and "
                f"without {MANIFEST}"
            )


def _begin(
    path: Path, manifest: dict[str, Any], tensors: Mapping[str, dict[str, np.ndarray] | None]
) -> tuple[dict[str, Any], list[str]]:
    kept = {key: arrays for key, arrays in tensors.items() if arrays is not None}
    for key, arrays in kept.items():
        described = {name: fingerprint(value) for name, value in arrays.items()}
        manifest[key] = {"tensors": described}
    if (path / MANIFEST).exists():
        stored = read_manifest(path)
        check_same_run(stored, manifest, path)
        check_files(path, stored)
        ids = _stored_ids(path, stored)
        _remove_left(path, stored)
        stored["state"] = "open"
        return stored, ids
    for key, arrays in kept.items():
        stem = key.removesuffix("_tensors")
        manifest[key].update(write_tensors(path / "projection", stem, arrays))
    _remove_left(path, None)
    write_manifest(path, manifest)
    sync_folder(path)
    sync_folder(path.absolute().parent)
    return manifest, []


def _stored_ids(path: Path, manifest: dict[str, Any]) -> list[str]:
    ids: list[str] = []
    for shard in manifest["shards"]:
        place = path / shard["ids"]["file"]
        try:
            got = crc32_of_file(place)
        except OSError as error:
            raise StoreFormatError(f"{place}: cannot be read: {error.strerror}") from None
        if got != shard["ids"]["crc32"]:
            raise StoreFormatError(
                f"{place}: damaged: expected crc32 {shard['ids']['crc32']}, got {got}"
            )
        ids += read_ids(place, shard["rows"])["id"].to_pylist()
    return ids


def _remove_left(path: Path, manifest: dict[str, Any] | None) -> None:
    """Delete temporary files, and shards and tensors that the manifest does not list.

    A writer that was killed left them. Without a manifest nothing tells its files from anybody's:
    then only temporary ones go. A folder that is a link is not the store's.
    """
    listed = {entry["file"] for entry, _ in listed_files(manifest)} if manifest else set()
    for folder in ("", *_TENSOR_FOLDERS):
        place = path / folder
        if folder and (place.is_symlink() or not place.is_dir()):
            continue
        for name in os.listdir(place):
            file, unfinished = name.removesuffix(TEMPORARY_SUFFIX), name.endswith(TEMPORARY_SUFFIX)
            pattern = TENSOR_FILE if folder else _SHARD_FILE
            known = pattern.match(file) or (unfinished and (folder or file == MANIFEST))
            if known and (unfinished or manifest) and str(Path(folder, name)) not in listed:
                remove(place / name)
