"""Small stores whose content follows from the ids, for the store's tests."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import refusals

from logra_kernels.store import (
    Module,
    RowLayout,
    Store,
    StoreError,
    StoreFormatError,
    StoreWriter,
    row_codec,
)
from logra_kernels.store.basis import Basis
from logra_kernels.store.manifest import seal

MODULES = [Module("layers.0.mlp", 2, 3), Module("layers.1.mlp", 1, 4)]
DIM = 10
EXPONENTS = [-3, 5]

refused = partial(refusals.refused, error=StoreError)
unreadable = partial(refusals.refused, error=StoreFormatError)


def rows_of(ids: list[int], dtype: str = "float16") -> np.ndarray:
    """[n, W]: integers that float16 holds exactly, different in each row and column; or planes."""
    codec = row_codec(dtype)
    columns = codec.columns(RowLayout.of(MODULES))
    grid: np.ndarray = np.add.outer(31 * np.asarray(ids, np.int64), 7 * np.arange(columns))
    if columns != DIM:  # two bytes for each plane: eight columns, and two
        planes = (grid * 37 % 256).astype(np.uint8)
        planes[:, 1::2] &= 3
        return planes
    if dtype == "int8":
        return (grid % 255 - 127).astype(dtype)
    return (grid % 2039 - 1019).astype(dtype)


def scales_of(ids: list[int]) -> np.ndarray:
    """[n] float32 powers of two."""
    scales: np.ndarray = np.ldexp(np.float32(1), np.asarray(ids, np.int32) % 7 - 3)
    return scales


def unpacked(ids: list[int], dtype: str = "float16") -> np.ndarray:
    """[n, D] float32: what the packed rows mean, by the formula of FORMAT.md."""
    if not row_codec(dtype).faithful:
        stored = rows_of(ids, dtype), scales_of(ids), None
        return Basis(RowLayout.of(MODULES), EXPONENTS, 0).decode(row_codec(dtype), *stored)
    factors: np.ndarray = np.repeat([2.0**value for value in EXPONENTS], [6, 4])  # [D]
    wide: np.ndarray = (
        rows_of(ids, dtype).astype(np.float64)
        * scales_of(ids).astype(np.float64)[:, None]
        * factors
    )
    return wide.astype(np.float32)


def writer_of(path: Path, **options: Any) -> StoreWriter:
    """A float16 store of three rows a shard."""
    writer = StoreWriter.create(path, **{"modules": MODULES, "shard_rows": 3, **options})
    if writer.codec.scaled:
        writer.set_module_exponents(EXPONENTS)
    return writer


def append(writer: StoreWriter, ids: list[int], **options: Any) -> np.ndarray:
    """Append the rows that belong to the ids."""
    scale = scales_of(ids) if writer.codec.scaled else None
    return writer.append(ids, rows_of(ids, writer.dtype), scale, **options)


def stored(path: Path, ids: list[int], **options: Any) -> Store:
    """A store of the rows that belong to the ids."""
    with writer_of(path, **options) as writer:
        append(writer, ids)
    return Store.open(path)


def stored_rows(store: Store) -> np.ndarray:
    """[N, D] as the shards hold them."""
    return np.concatenate([shard.rows for shard in store.shards])


def full_store(path: Path, dtype: str = "float16") -> Store:
    """Eight rows in three shards, with everything that the format knows."""
    projection = {"layers.0.mlp.in": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with writer_of(
        path,
        projection={"kind": "random", "seed": 7, "scaling": [0.5, 1.0]},
        projection_tensors=projection,
        fingerprints={"model": {"name": "tiny"}, "data": None},
        dtype=dtype,
    ) as writer:
        append(writer, list(range(8)), metadata=[{"text": f"passage {row}"} for row in range(8)])
    store = Store.open(path)
    store.save_curvature("raw", {"layers.0.mlp": np.eye(6)}, {"count": 8, "kind": "raw"})
    cache = store.self_influence_cache("raw-01", {"damping_scale": 0.1})
    for index, shard in enumerate(store.shards):
        cache.write(index, np.full((shard.num_rows, 2), index + 1, np.float32))
    return Store.open(path)


def resumed(path: Path, **options: Any) -> StoreWriter:
    """Goes on with a store, whatever projection and fingerprints it was made with."""
    store = Store.open(path)
    return writer_of(
        path,
        resume=True,
        projection=store.projection,
        projection_tensors=store.load_tensors(),
        fingerprints=store.fingerprints,
        **options,
    )


# Files of a full store, one of each kind: those the manifest lists, itself, and a cache's.
LISTED = [
    "manifest.json",
    "shard-00000.npy",
    "shard-00001.scale.npy",
    "shard-00002.ids.arrow",
    "projection/projection-*.safetensors",
    "curvature/raw-*.safetensors",
]
CACHED = ["self_influence/raw-01/key.json", "self_influence/raw-01/shard-00001-*.npy"]


def find(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def listed_files(store: Store) -> set[str]:
    """The names of the shards' files."""
    shards = store.manifest["shards"]
    return {
        entry["file"] for shard in shards for entry in shard.values() if isinstance(entry, dict)
    }


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every value inside a JSON value, itself left out."""
    items: Any = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield (*way, key)
        yield from places(inner, (*way, key))


def wide_store(path: Path, dtype: str = "float16", shard_rows: int = 7, dim: int = 3001) -> Store:
    """23 rows of 6,002 or 12,004 bytes, or planes of 376: no block ends on a page."""
    modules = [Module("m", 1, dim)]
    codec = row_codec(dtype)
    columns = codec.columns(RowLayout.of(modules))
    rows = np.arange(23 * columns).reshape(23, columns) % 2039
    if np.issubdtype(codec.dtype, np.integer):
        rows = rows % 255 - (127 if codec.dtype == np.int8 else 0)
    with StoreWriter.create(path, modules=modules, dtype=dtype, shard_rows=shard_rows) as writer:
        if codec.scaled:
            writer.set_module_exponents([0])
        scales = np.ones(23, np.float32) if codec.scaled else None
        writer.append(range(23), rows.astype(codec.dtype), scales)
    return Store.open(path)


def edit_manifest(path: Path, change: Any) -> None:
    """Change manifest.json and seal it again, as a malicious or buggy writer would."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_bytes())
    change(manifest)
    file.write_bytes(seal(manifest))
