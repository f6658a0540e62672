"""The bytes of a store's rows, ids and norms, said before there is a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from logra_kernels.store import Module, RowLayout, Store, StoreWriter, planned_bytes, row_codec
from logra_kernels.store.codecs import codec_names
from logra_kernels.store.ids import metadata_texts

MODULES = [Module("a", 3, 5), Module("b", 2, 2), Module("c", 1, 7)]
LAYOUT = RowLayout.of(MODULES)
Metadata = list[dict[str, str] | None]


def written(
    path: Path, dtype: str, count: int, shard_rows: int | None, metadata: Metadata
) -> Store:
    """Rows of noise, the last of which needs exponents of its own in float16."""
    codec = row_codec(dtype)
    rows = np.random.default_rng(count).standard_normal((count, LAYOUT.dim)).astype(np.float32)
    with StoreWriter.create(path, modules=MODULES, dtype=dtype, shard_rows=shard_rows) as writer:
        if codec.scaled:
            writer.set_module_exponents([0] * len(MODULES))
        ids = [f"id {'é' * n}" for n in range(count)]
        stored, scale, own = codec.encode(rows, LAYOUT, [0] * len(MODULES))
        writer.append(ids, stored, scale, metadata, own)
    return Store.open(path)


def sizes(store: Store, key: str) -> int:
    """The bytes of the shards' files under a key, or with "rows" under all keys but "ids"."""
    found = 0
    for entry in store.manifest["shards"]:
        for name, file in entry.items():
            if isinstance(file, dict) and (name == key or (key == "rows" and name != "ids")):
                assert (store.path / file["file"]).stat().st_size == file["bytes"]
                found += file["bytes"]
    return found


@pytest.mark.parametrize("dtype", codec_names())
@pytest.mark.parametrize("shard_rows", [None, 8])
@pytest.mark.parametrize("kind", ["none", "some", "all"])
def test_the_bytes_are_exact(tmp_path: Path, dtype: str, shard_rows: int | None, kind: str) -> None:
    for count in (1, 16, 17):
        every = {"none": count + 1, "some": 3, "all": 1}[kind]
        metadata: Metadata = [
            {"text": "ü" * n} if n % every == every - 1 else None for n in range(count)
        ]
        store = written(tmp_path / str(count), dtype, count, shard_rows, metadata)
        texts = metadata_texts(metadata)
        planned = planned_bytes(
            row_codec(dtype),
            LAYOUT,
            [len(name.encode()) for name in store.ids.to_pylist()],
            [-1 if text is None else len(text.encode()) for text in texts],
            shard_rows=shard_rows,
        )
        assert planned["shards"] == len(store.shards)
        assert (planned["rows"], planned["ids"]) == (sizes(store, "rows"), sizes(store, "ids"))
        cache = store.self_influence_cache("key", {})
        for index, shard in enumerate(store.shards):
            cache.write(index, np.ones((shard.num_rows, len(MODULES)), np.float32))
        files = (store.path / "self_influence" / "key").glob("*.npy")
        assert planned["norms"] == sum(file.stat().st_size for file in files)


def test_exponents_of_rows_are_counted_where_they_are_said_to_be(tmp_path: Path) -> None:
    rows = np.ones((3, LAYOUT.dim), np.float32)
    rows[:, :15] *= 2.0**-60
    codec = row_codec("float16")
    with StoreWriter.create(tmp_path / "s", modules=MODULES) as writer:
        writer.set_module_exponents([0, 0, 0])
        stored, scale, own = codec.encode(rows, LAYOUT, [0, 0, 0])
        writer.append([0, 1, 2], stored, scale, None, own)
    store = Store.open(tmp_path / "s")
    lengths = ([1, 1, 1], [-1, -1, -1])
    assert planned_bytes(codec, LAYOUT, *lengths, row_exponents=True)["rows"] == sizes(
        store, "rows"
    )
    assert planned_bytes(codec, LAYOUT, *lengths)["rows"] == sizes(store, "data") + sizes(
        store, "scale"
    )


def test_no_rows_take_no_bytes() -> None:
    planned = planned_bytes(row_codec("float16"), LAYOUT, [], [])
    assert planned == {"rows": 0, "ids": 0, "norms": 0, "shards": 0}
