"""manifest.json: what a store says about itself. FORMAT.md describes every key."""

import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from logra_kernels.store.basis import Basis
from logra_kernels.store.codecs import RowCodec, codec_names, row_codec
from logra_kernels.store.errors import StoreError, StoreFormatError, StoreMismatchError
from logra_kernels.store.files import (
    check_file,
    crc32_text,
    npy_bytes,
    npy_header,
    open_to_read,
    replace_file,
)
from logra_kernels.store.layout import Module, RowLayout
from logra_kernels.store.tensors import read_tensors

FORMAT = "logra_kernels.store"
# Version 2 is a store in which a shard has exponents of rows, which an older reader would leave
# out, or one of a codec that it does not know; only such codecs go with a rotation or whitening.
PLAIN_VERSION, VERSION = 1, 2
MANIFEST = "manifest.json"
LOCK = "lock"
LARGEST_JSON_BYTES = 256 << 20  # a manifest of half a million shards
DEEPEST_JSON = 100  # objects and lists within each other, of what a user gives
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127  # 2**e is a normal float32
PLANE_KEYS = ("plane0", "plane1", "plane2", "plane3")
TENSOR_KEYS = ("projection_tensors", "whitening")  # files in projection/
ROTATION = "hadamard"
SEED, LARGEST_SEED = 0, 2**63 - 1

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_CRC32 = re.compile(r"[0-9a-f]{8}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def shard_names(index: int) -> dict[str, str]:
    """The names of a shard's files, by their key in the manifest."""
    stem = f"shard-{index:05d}"
    return {
        "data": f"{stem}.npy",
        **{key: f"{stem}.{key}.npy" for key in PLANE_KEYS},
        "scale": f"{stem}.scale.npy",
        "exponents": f"{stem}.exponents.npy",
        "ids": f"{stem}.ids.arrow",
    }


def version_of(manifest: Mapping[str, Any]) -> int:
    """The lowest version whose readers read the store rightly; never lower than it was."""
    needed = any("exponents" in shard for shard in manifest["shards"])
    codec = row_codec(manifest["dtype"])
    return max(int(manifest["version"]), codec.version, VERSION if needed else PLAIN_VERSION)


def check_modules(modules: Sequence[Module]) -> list[Module]:
    """The modules as a list, or StoreError if a name is not unique or a size not positive."""
    modules = list(modules)
    if not modules:
        raise StoreError("modules: expected at least one, got none")
    seen = set()
    for module in modules:
        if not isinstance(module, Module):
            raise StoreError(f"modules: expected Module(name, ko, ki), got {module!r}")
        if not isinstance(module.name, str) or not module.name:
            raise StoreError(f"modules: expected a name, got {module.name!r}")
        if module.name in seen:
            raise StoreError(f"modules: the name {module.name!r} is there twice")
        seen.add(module.name)
        for axis in ("ko", "ki"):
            extent = getattr(module, axis)
            if not _is_count(extent, 1):
                raise StoreError(
                    f"modules: {axis} of {module.name!r}: expected a positive integer, "
                    f"got {extent!r}"
                )
    return modules


def plain_json(value: Any, name: str) -> Any:
    """`value` as it will be read back: tuples become lists, keys become strings.

    Raises:
        StoreError: it cannot be written as JSON (NaN and infinity included).
    """
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
        _check_values(plain, DEEPEST_JSON)
        return plain
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{name}: cannot be written as JSON: {error}") from None


def read_json(path: Path) -> tuple[bytes, Any]:
    """The bytes of a JSON file, and their value.

    Raises:
        FileNotFoundError: there is none.
        StoreFormatError: it is not JSON that this package would write.
    """
    try:
        with open_to_read(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_JSON_BYTES:
                raise StoreFormatError(
                    f"{path}: expected at most {LARGEST_JSON_BYTES} bytes, got {size}"
                )
            data = file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        value = json.loads(data)
        # What a user gives lies inside other objects.
        _check_values(value, DEEPEST_JSON + 10)
    except (ValueError, RecursionError, MemoryError) as error:
        raise StoreFormatError(f"{path}: is not JSON: {error}") from None
    return data, value


def _check_values(value: Any, deepest: int) -> None:
    """Raise ValueError for what cannot be written again, or only by more than Python's stack."""
    level = [value]
    for _ in range(deepest):
        if any(type(inner) is float and not math.isfinite(inner) for inner in level):
            raise ValueError("a number is not finite")
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"lists and objects lie deeper in each other than {deepest}")


def first_difference(stored: Any, given: Any, name: str) -> str | None:
    """Where two JSON values first differ, as a sentence; None when they are equal."""
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        for key in [*stored, *(key for key in given if key not in stored)]:
            where = f"{name}.{key}"
            if key not in given:
                return f"{where}: the store has {_short(stored[key])}, this run has nothing"
            if key not in stored:
                return f"{where}: the store has nothing, this run has {_short(given[key])}"
            if found := first_difference(stored[key], given[key], where):
                return found
        return None
    if isinstance(stored, list) and isinstance(given, list):
        if len(stored) != len(given):
            return f"{name}: the store has {len(stored)} entries, this run has {len(given)}"
        for index, (left, right) in enumerate(zip(stored, given, strict=True)):
            if found := first_difference(left, right, f"{name}[{index}]"):
                return found
        return None
    if stored == given:
        return None
    return f"{name}: the store has {_short(stored)}, this run has {_short(given)}"


def new_manifest(
    layout: RowLayout,
    codec: RowCodec,
    projection: Any,
    fingerprints: Any,
    coverage: Any = None,
    rotation: int | None = None,
) -> dict[str, Any]:
    """The manifest of a store without rows and matrices; `rotation` is a seed.

    Raises:
        StoreError: projection, fingerprints or coverage cannot be written as JSON, or the codec's
            rows are not rotated.
    """
    described = {} if coverage is None else {"coverage": plain_json(coverage, "coverage")}
    if rotation is None and not codec.faithful:
        rotation = SEED
    if rotation is not None:
        check_rotated(codec, "rotation")
        if not _is_count(rotation, 0, LARGEST_SEED):
            raise StoreError(f"rotation: expected a seed from 0 to {LARGEST_SEED}, got {rotation}")
        described["rotation"] = {"kind": ROTATION, "seed": rotation}
    entries = [
        {"name": module.name, "ko": module.ko, "ki": module.ki, "offset": offset}
        for module, offset in zip(layout, layout.offsets, strict=False)
    ]
    return {
        "format": FORMAT,
        "version": max(PLAIN_VERSION, codec.version),
        "state": "open",
        "dtype": codec.name,
        "endianness": "little",
        "modules": entries,
        "module_exponents": None,
        "projection": plain_json(projection, "projection"),
        "projection_tensors": None,
        "fingerprints": plain_json(fingerprints, "fingerprints"),
        **described,
        "rows": 0,
        "shards": [],
        "curvature": {},
    }


def check_rotated(codec: RowCodec, argument: str) -> None:
    """Raise StoreError for a codec whose rows are neither rotated nor whitened."""
    if not codec.rotated:
        raise StoreError(f"{argument}: expected none, for the store's rows are {codec.name}")


def basis_of(manifest: Mapping[str, Any], folder: Path) -> Basis:
    """The basis of a checked manifest's rows; its factors are read from their file.

    Raises:
        StoreFormatError: the file is damaged, or holds other arrays than the format allows.
    """
    seed = manifest["rotation"]["seed"] if "rotation" in manifest else None
    entry, factors = manifest.get("whitening"), None
    if entry is not None:
        factors = read_tensors(folder / entry["file"], entry["sha256"])
    try:
        return Basis(layout_of(manifest), manifest["module_exponents"] or (), seed, factors)
    except StoreError as error:
        raise StoreFormatError(f"{folder / entry['file'] if entry else folder}: {error}") from None


def check_same_run(stored: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> None:
    """A run may resume a store only if its rows mean the same as the store's.

    Raises:
        StoreMismatchError: names the first difference.
    """
    for key in ("modules", "dtype", "projection", "rotation", *TENSOR_KEYS, "fingerprints"):
        left, right = stored.get(key), given.get(key)
        if key in TENSOR_KEYS and left and right:
            left, right = left["tensors"], right["tensors"]
        if found := first_difference(left, right, key):
            raise StoreMismatchError(f"{folder}: cannot resume: {found}")


def seal(value: Mapping[str, Any]) -> bytes:
    """A JSON object as a file that ends with the CRC-32 of everything before that key."""
    body = {key: entry for key, entry in value.items() if key != "crc32"}
    text = json.dumps(body, indent=1, ensure_ascii=True, allow_nan=False)
    sealed = text[:-2].encode()  # without the last line break and brace
    return sealed + _end_of(sealed)


def check_seal(data: bytes, path: Path) -> None:
    """Raise StoreFormatError if a byte is not as it was written."""
    sealed, mark, _ = data.rpartition(b',\n "crc32": "')
    if not mark or data[len(sealed) :] != _end_of(sealed):
        raise StoreFormatError(f"{path}: damaged: its bytes do not agree with its own crc32")


def _end_of(sealed: bytes) -> bytes:
    return f',\n "crc32": "{crc32_text(zlib.crc32(sealed))}"\n}}\n'.encode()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace manifest.json atomically. The folder is left for the caller to sync."""
    replace_file(folder / MANIFEST, seal(manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of manifest.json. The files that it lists are not looked at.

    Raises:
        StoreFormatError: no store, another format, a newer version, or a damaged manifest.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise StoreFormatError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise StoreFormatError(f"{folder}: expected a folder with a store, got a file")
    try:
        data, manifest = read_json(path)
    except FileNotFoundError:
        raise StoreFormatError(f"{folder}: is no store: there is no {MANIFEST} in it") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise StoreFormatError(f'{path}: expected the format "{FORMAT}", got {_short(found)}')
    version: Any = manifest.get("version")
    if not _is_count(version, 1):
        raise StoreFormatError(f"{path}: version: expected a positive integer, got {version!r}")
    if version > VERSION:
        raise StoreFormatError(
            f"{path}: this store has format version {version}, and this logra_kernels reads "
            f"versions up to {VERSION}; install a newer logra_kernels"
        )
    check_seal(data, path)
    checked: dict[str, Any] = manifest
    try:
        _check(checked)
    except _Wrong as wrong:
        raise StoreFormatError(f"{path}: {wrong}") from None
    return checked


def layout_of(manifest: Mapping[str, Any]) -> RowLayout:
    """The columns of a checked manifest's rows."""
    return RowLayout.of(Module(m["name"], m["ko"], m["ki"]) for m in manifest["modules"])


def listed_files(manifest: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    """Every file's entry, and the header it must have if it is an .npy file."""
    layout, codec = layout_of(manifest), row_codec(manifest["dtype"])
    for shard in manifest["shards"]:
        for key, array in codec.arrays(shard["rows"], layout, "exponents" in shard).items():
            yield shard[key], npy_header(*array)
        yield shard["ids"], None
    for key in TENSOR_KEYS:
        if manifest.get(key) is not None:
            yield manifest[key], None
    for entry in manifest["curvature"].values():
        yield entry, None


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise StoreFormatError for a listed file that is missing, or of another size or header."""
    for entry, header in listed_files(manifest):
        check_file(folder, entry["file"], entry["bytes"], header)


class _Wrong(Exception):
    """A key of the manifest is wrong."""


def _check(manifest: dict[str, Any]) -> None:
    _one_of(manifest, "state", ("open", "finalized"))
    _one_of(manifest, "dtype", codec_names())
    lowest = row_codec(manifest["dtype"]).version
    if manifest["version"] < lowest:
        raise _Wrong(
            f"version: expected {lowest} for {manifest['dtype']} rows, got {manifest['version']}"
        )
    _one_of(manifest, "endianness", ("little",))
    for key in ("projection", "fingerprints"):
        if key not in manifest:
            raise _Wrong(f"{key}: missing")
    _check_modules(_list(manifest, "modules"))
    _check_exponents(manifest)
    _check_shards(manifest)
    keys = shard_names(0)
    entries = [shard.get(key) for shard in manifest["shards"] for key in keys]
    names = [entry["file"] for entry in entries if isinstance(entry, dict) and "file" in entry]
    if len(set(names)) != len(names):
        raise _Wrong("shards: two entries name the same file")
    if "projection_tensors" not in manifest:
        raise _Wrong("projection_tensors: missing")
    for key in TENSOR_KEYS:
        if manifest.get(key) is not None:
            entry = _object(manifest[key], key)
            _check_file_entry(entry, key, "projection/", "sha256", _SHA256)
            _object(entry.get("tensors"), f"{key}.tensors")
    _check_basis(manifest)
    for name, entry in _object(manifest.get("curvature"), "curvature").items():
        where = f"curvature.{name}"
        _check_file_entry(_object(entry, where), where, "curvature/", "sha256", _SHA256)
        _count(entry, "rows", where, 0)
        if "meta" not in entry:
            raise _Wrong(f"{where}.meta: missing")


def _check_modules(entries: list[Any]) -> None:
    if not entries:
        raise _Wrong("modules: expected at least one, got none")
    offset, names = 0, set()
    for index, entry in enumerate(entries):
        where = f"modules[{index}]"
        name = _object(entry, where).get("name")
        if not isinstance(name, str) or not name or name in names:
            raise _Wrong(f"{where}.name: expected a name of its own, got {_short(name)}")
        names.add(name)
        size = _count(entry, "ko", where, 1) * _count(entry, "ki", where, 1)
        if _count(entry, "offset", where, 0) != offset:
            raise _Wrong(f"{where}.offset: expected {offset}, got {entry['offset']}")
        offset += size


def _check_exponents(manifest: dict[str, Any]) -> None:
    if "module_exponents" not in manifest:
        raise _Wrong("module_exponents: missing")
    exponents = manifest["module_exponents"]
    if exponents is None:
        return
    count = len(manifest["modules"])
    if (
        not isinstance(exponents, list)
        or len(exponents) != count
        or not all(_is_count(value, SMALLEST_EXPONENT, LARGEST_EXPONENT) for value in exponents)
    ):
        raise _Wrong(
            f"module_exponents: expected {count} integers from {SMALLEST_EXPONENT} to "
            f"{LARGEST_EXPONENT}, got {_short(exponents)}"
        )


def _check_basis(manifest: dict[str, Any]) -> None:
    codec = row_codec(manifest["dtype"])
    for key in ("rotation", "whitening"):
        if manifest.get(key) is not None and not codec.rotated:
            raise _Wrong(f"{key}: expected none, for the rows are {codec.name}")
    if "rotation" in manifest or not codec.faithful:
        rotation = _object(manifest.get("rotation"), "rotation")
        if rotation.get("kind") != ROTATION:
            raise _Wrong(
                f'rotation.kind: expected "{ROTATION}", got {_short(rotation.get("kind"))}'
            )
        if not _is_count(rotation.get("seed"), 0, LARGEST_SEED):
            raise _Wrong(
                f"rotation.seed: expected an integer from 0 to {LARGEST_SEED}, "
                f"got {_short(rotation.get('seed'))}"
            )


def _check_shards(manifest: dict[str, Any]) -> None:
    layout, codec = layout_of(manifest), row_codec(manifest["dtype"])
    first_row = 0
    for index, shard in enumerate(_list(manifest, "shards")):
        where = f"shards[{index}]"
        rows = _count(_object(shard, where), "rows", where, 1)
        if _count(shard, "first_row", where, 0) != first_row:
            raise _Wrong(f"{where}.first_row: expected {first_row}, got {shard['first_row']}")
        first_row += rows
        arrays = codec.arrays(rows, layout, "exponents" in shard)
        if "exponents" in arrays and codec.rotated:
            raise _Wrong(f"{where}.exponents: expected none, for the rows are {codec.name}")
        if "exponents" in arrays and (manifest["version"] < VERSION or not codec.scaled):
            raise _Wrong(
                f"{where}.exponents: expected in scaled rows of a store of version {VERSION}, got "
                f"one in {codec.name} rows of a store of version {manifest['version']}"
            )
        for key in (*codec.data, "scale", "exponents", "ids"):
            if key == "exponents" and key not in arrays:
                continue
            if key == "scale" and not codec.scaled:
                if shard.get(key, "missing") is not None:
                    raise _Wrong(f"{where}.scale: expected null, for the rows are {codec.name}")
                continue
            entry = _object(shard.get(key), f"{where}.{key}")
            _check_file_entry(entry, f"{where}.{key}", "", "crc32", _CRC32)
            if key in arrays and entry["bytes"] != npy_bytes(*arrays[key]):
                raise _Wrong(
                    f"{where}.{key}.bytes: expected {npy_bytes(*arrays[key])}, got {entry['bytes']}"
                )
    if _count(manifest, "rows", "", 0) != first_row:
        raise _Wrong(f"rows: expected {first_row}, got {manifest['rows']}")
    if first_row and codec.scaled and manifest["module_exponents"] is None:
        raise _Wrong(
            f"module_exponents: expected integers, for there are {codec.name} rows, got null"
        )


def _check_file_entry(
    entry: dict[str, Any], where: str, folder: str, checksum: str, pattern: "re.Pattern[str]"
) -> None:
    name = entry.get("file")
    # A manifest from elsewhere must not make us read, or delete, a file outside the store.
    if (
        not isinstance(name, str)
        or not name.startswith(folder)
        or not _PLAIN_NAME.match(name[len(folder) :])
    ):
        raise _Wrong(
            f"{where}.file: expected a plain file name in {folder or 'the store'}, "
            f"got {_short(name)}"
        )
    _count(entry, "bytes", where, 0)
    if not isinstance(entry.get(checksum), str) or not pattern.match(entry[checksum]):
        raise _Wrong(
            f"{where}.{checksum}: expected hexadecimal digits, got {_short(entry.get(checksum))}"
        )


def _is_count(value: Any, smallest: int, largest: int = 2**62) -> bool:
    return type(value) is int and smallest <= value <= largest


def _count(entry: dict[str, Any], key: str, where: str, smallest: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not _is_count(value, smallest):
        name = f"{where}.{key}" if where else key
        raise _Wrong(f"{name}: expected an integer of at least {smallest}, got {_short(value)}")
    return value


def _list(entry: dict[str, Any], key: str) -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list):
        raise _Wrong(f"{key}: expected a list, got {_short(value)}")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where}: expected an object, got {_short(value)}")
    return value


def _one_of(entry: dict[str, Any], key: str, allowed: tuple[str, ...]) -> None:
    if entry.get(key) not in allowed:
        wanted = " or ".join(f'"{value}"' for value in allowed)
        raise _Wrong(f"{key}: expected {wanted}, got {_short(entry.get(key))}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
