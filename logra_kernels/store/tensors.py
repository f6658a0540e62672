"""Named arrays in safetensors files: projections and curvature."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from logra_kernels.store.errors import StoreError, StoreFormatError
from logra_kernels.store.files import own_folder, replace_file, sha256_of_file, sync_folder

_NAMES: dict[np.dtype[Any], str] = {
    np.dtype("<f8"): "F64",
    np.dtype("<f4"): "F32",
    np.dtype("<f2"): "F16",
    np.dtype("<i8"): "I64",
    np.dtype("<i4"): "I32",
}
TENSOR_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*-[0-9a-f]{16}\.safetensors\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")


def check_name(name: str, argument: str) -> str:
    """The name, if it may become a file name: 1 to 64 letters, digits, dashes, underscores."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise StoreError(f"{argument}: expected 1 to 64 letters, digits, '-' or '_', got {name!r}")
    return name


def check_tensors(tensors: Mapping[str, Any], argument: str) -> dict[str, np.ndarray]:
    """The tensors as contiguous little-endian arrays, ready to be written."""
    ready = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise StoreError(f"{argument}: expected a name, got {name!r}")
        if not isinstance(value, np.ndarray):
            raise StoreError(
                f"{argument}: {name!r}: expected a numpy array, got {type(value).__name__}"
            )
        array = np.asarray(value, value.dtype.newbyteorder("<"), order="C")
        if array.dtype not in _NAMES:
            wanted = ", ".join(dtype.name for dtype in _NAMES)
            raise StoreError(f"{argument}: {name!r}: expected {wanted}, got {value.dtype}")
        ready[name] = array
    return ready


def fingerprint(array: np.ndarray) -> dict[str, Any]:
    """dtype, shape and SHA-256 of the little-endian, C-ordered elements."""
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "sha256": hashlib.sha256(_bytes(array)).hexdigest(),
    }


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write `<stem>-<first 16 digits of its SHA-256>.safetensors` and return its manifest entry.

    The content is in the name, so that a new file never takes an old one's place before the
    manifest points to it.
    """
    header: dict[str, Any] = {}
    start = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors start at a multiple of 8 bytes
    head = memoryview(len(text).to_bytes(8, "little") + text)
    pieces = [head, *map(_bytes, tensors.values())]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    name = f"{stem}-{digest.hexdigest()[:16]}.safetensors"
    own_folder(folder)
    replace_file(folder / name, *pieces)
    sync_folder(folder)
    return {
        "file": f"{folder.name}/{name}",
        "bytes": 8 + len(text) + start,
        "sha256": digest.hexdigest(),
    }


def read_tensors(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file whose checksum is known.

    Raises:
        StoreFormatError: the file is not the one that was written.
    """
    try:
        got = sha256_of_file(path)
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be read: {error.strerror}") from None
    if got != sha256:
        raise StoreFormatError(f"{path}: damaged: expected sha256 {sha256}, got {got}")
    try:
        tensors = safetensors.numpy.load_file(path)
        for name, array in tensors.items():
            if array.dtype not in _NAMES:
                raise TypeError(f"{name!r} is {array.dtype}")
        return tensors
    except Exception as error:  # whatever the library makes of a dtype that NumPy lacks
        raise StoreFormatError(f"{path}: is not a readable safetensors file: {error}") from None


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
