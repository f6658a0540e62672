"""Checks every byte of a store, and says what is wrong."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from logra_kernels.store.codecs import row_codec
from logra_kernels.store.codecs.base import (
    EXPONENT_DTYPE,
    LARGEST_ROW_EXPONENT,
    SCALE_DTYPE,
    SMALLEST_ROW_EXPONENT,
    row_exponents_in_range,
)
from logra_kernels.store.errors import StoreError, StoreFormatError
from logra_kernels.store.files import (
    DATA_OFFSET_BYTES,
    check_file,
    crc32_of_file,
    finite,
    read_array,
    sha256_of_file,
)
from logra_kernels.store.ids import parse_metadata, read_ids
from logra_kernels.store.manifest import TENSOR_KEYS, layout_of, listed_files, read_manifest
from logra_kernels.store.self_influence import cache_problems
from logra_kernels.store.tensors import read_tensors

_BLOCK_BYTES = 16 << 20


def verify_store(
    path: str | os.PathLike[str],
    checksums: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """A sentence for each thing that is wrong with a store, with the file's name; empty if good.

    Args:
        path: the store's folder.
        checksums: read every byte; False looks at sizes and headers only.
        progress: is called with (bytes looked at, bytes in all).
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except StoreError as error:
        return [str(error)]
    problems, good = [], set()
    for entry, header in listed_files(manifest):
        try:
            check_file(folder, entry["file"], entry["bytes"], header)
            good.add(entry["file"])
        except StoreError as error:
            problems.append(str(error))
    if not checksums:
        return problems
    total = sum(entry["bytes"] for entry, _ in listed_files(manifest))
    seen = 0

    def count(size: int) -> None:
        nonlocal seen
        seen += size
        if progress is not None:
            progress(seen, total)

    for entry, header in listed_files(manifest):
        if entry["file"] not in good:
            count(entry["bytes"])
            continue
        count(len(header or b""))
        problem = _checksum_problem(folder, entry, header, count)
        if problem is not None:
            problems.append(problem)
            good.discard(entry["file"])
    for check in (_row_problems, _id_problems, _tensor_problems):
        problems += check(folder, manifest, good)
    caches = folder / "self_influence"
    problems += cache_problems(caches, manifest["shards"], len(manifest["modules"]))
    return problems


def _checksum_problem(
    folder: Path, entry: Mapping[str, Any], header: bytes | None, count: Callable[[int], None]
) -> str | None:
    path = folder / entry["file"]
    try:
        if "crc32" in entry:
            kind, got = "crc32", crc32_of_file(path, DATA_OFFSET_BYTES if header else 0, count)
        else:
            kind, got = "sha256", sha256_of_file(path, count)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if got == entry[kind]:
        return None
    return f"{path}: damaged: expected {kind} {entry[kind]}, got {got}"


def _row_problems(folder: Path, manifest: Mapping[str, Any], good: set[str]) -> Iterator[str]:
    """Values that the writer would have refused: they were wrong before the checksum was made."""
    layout, codec = layout_of(manifest), row_codec(manifest["dtype"])
    block = max(1, _BLOCK_BYTES // codec.row_bytes(layout))
    for shard in manifest["shards"]:
        if all(shard[key]["file"] in good for key in codec.data):
            paths = [folder / shard[key]["file"] for key in codec.data]
            columns = codec.columns(layout) // len(paths)
            for start in range(0, shard["rows"], block):
                count = min(block, shard["rows"] - start) * columns
                try:
                    parts = [
                        read_array(path, codec.dtype, count, start * columns) for path in paths
                    ]
                except StoreFormatError as error:
                    yield str(error)
                    break
                rows = np.concatenate([part.reshape(-1, columns) for part in parts], axis=1)
                good_rows = codec.finite(rows, layout).all(axis=1)
                if not good_rows.all():
                    row = shard["first_row"] + start + int(np.flatnonzero(~good_rows)[0])
                    path = paths[0]
                    yield f"{path}: expected finite values, got others in row {row}"
                    break
        if shard["scale"] is not None and shard["scale"]["file"] in good:
            path = folder / shard["scale"]["file"]
            scales = read_array(path, SCALE_DTYPE, shard["rows"])
            bad = np.flatnonzero(~codec.good_scales(scales))
            if len(bad):
                row = shard["first_row"] + int(bad[0])
                yield f"{path}: expected {codec.scales}, got {scales[bad[0]]} for row {row}"
        if "exponents" in shard and shard["exponents"]["file"] in good:
            path = folder / shard["exponents"]["file"]
            own = read_array(path, EXPONENT_DTYPE, shard["rows"] * len(layout))
            bad = np.flatnonzero(~row_exponents_in_range(own.reshape(shard["rows"], -1)))
            if len(bad):
                row = shard["first_row"] + int(bad[0])
                wanted = f"{SMALLEST_ROW_EXPONENT} to {LARGEST_ROW_EXPONENT}"
                yield f"{path}: expected exponents from {wanted}, got others for row {row}"


def _id_problems(folder: Path, manifest: Mapping[str, Any], good: set[str]) -> Iterator[str]:
    seen: set[str] = set()
    for shard in manifest["shards"]:
        path = folder / shard["ids"]["file"]
        if shard["ids"]["file"] not in good:
            continue
        try:
            table = read_ids(path, shard["rows"])
        except StoreError as error:
            yield str(error)
            continue
        for text in table["id"].to_pylist():
            if text in seen:
                yield f"{path}: the id {text!r} is in the store twice"
            seen.add(text)
        for row, text in enumerate(table["metadata"], shard["first_row"]):
            try:
                parse_metadata(text, path, row)
            except StoreError as error:
                yield str(error)


def _tensor_problems(folder: Path, manifest: Mapping[str, Any], good: set[str]) -> Iterator[str]:
    entries = [*map(manifest.get, TENSOR_KEYS), *manifest["curvature"].values()]
    for entry in entries:
        if entry is not None and entry["file"] in good:
            try:
                tensors = read_tensors(folder / entry["file"], entry["sha256"])
            except StoreError as error:
                yield str(error)
                continue
            for name, array in tensors.items():
                if array.dtype.kind == "f" and not finite(array).all():
                    path = folder / entry["file"]
                    yield f"{path}: expected finite values, got others in {name!r}"
