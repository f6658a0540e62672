"""The ids and the metadata of a shard's rows, as an Arrow IPC file."""

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logra_kernels.store.errors import StoreError, StoreFormatError
from logra_kernels.store.files import open_to_read
from logra_kernels.store.maps import map_array

SCHEMA = pa.schema(
    [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("metadata", pa.large_string(), nullable=True),
    ]
)


def id_texts(ids: Iterable[Any]) -> list[str]:
    """Ids as they are stored: strings as they are, integers in decimal.

    Raises:
        StoreError: an id is empty, neither string nor integer, or not valid Unicode.
    """
    if isinstance(ids, (str, bytes)):
        raise StoreError(
            f"ids: expected one id per row, got the single {type(ids).__name__} {ids!r}"
        )
    texts = []
    for index, value in enumerate(ids):
        text = value
        if not isinstance(value, str):
            try:
                if isinstance(value, bool):
                    raise TypeError
                text = str(operator.index(value))
            except TypeError:
                raise StoreError(
                    f"ids: expected strings or integers, got {value!r} at {index}"
                ) from None
        if not text:
            raise StoreError(f"ids: expected an id, got an empty string at {index}")
        _check_unicode(text, f"ids: the id at {index}")
        texts.append(text)
    return texts


def metadata_texts(metadata: Sequence[Mapping[str, Any] | None]) -> list[str | None]:
    """Each row's metadata as JSON; None where there is none.

    Raises:
        StoreError: an entry is no mapping, or cannot be written as JSON.
    """
    texts: list[str | None] = []
    for index, entry in enumerate(metadata):
        if entry is None:
            texts.append(None)
            continue
        if not isinstance(entry, Mapping):
            raise StoreError(f"metadata: expected a dict or None, got {entry!r} at {index}")
        try:
            text = json.dumps(dict(entry), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise StoreError(
                f"metadata: the entry at {index} cannot be written as JSON: {error}"
            ) from None
        _check_unicode(text, f"metadata: the entry at {index}")
        texts.append(text)
    return texts


def encode_ids(ids: Sequence[str], metadata: Sequence[str | None]) -> memoryview:
    """The bytes of a shard's ids file."""
    table = pa.Table.from_arrays(
        [pa.array(ids, pa.large_string()), pa.array(metadata, pa.large_string())], schema=SCHEMA
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def read_ids(path: Path, rows: int) -> pa.Table:
    """The columns of an ids file, mapped into memory.

    Every offset into the texts is checked, for pyarrow follows a wrong one out of the file. The
    ids are checked to be UTF-8; the metadata, which may be large, is not read.

    Raises:
        StoreFormatError: no Arrow file, other columns, or another number of rows.
    """
    try:
        with open_to_read(path) as file:
            size = os.fstat(file.fileno()).st_size
        data = pa.py_buffer(map_array(path, np.dtype(np.uint8), (size,), 0))
        schema = pa.ipc.open_file(data).schema
        places = [schema.get_field_index(field.name) for field in SCHEMA]  # -1: none, or two
        if [schema.types[place] for place in places if place >= 0] != SCHEMA.types:
            raise StoreFormatError(
                f"{path}: expected the columns {_columns(SCHEMA)}, got {_columns(schema)}"
            )
        options = pa.ipc.IpcReadOptions(included_fields=places)
        table = pa.ipc.open_file(data, options=options).read_all().select(SCHEMA.names)
        table["id"].validate(full=True)
        for chunk in table["metadata"].chunks:
            chunk.view(pa.large_binary()).validate(full=True)
    except StoreError:
        raise
    except Exception as error:  # pyarrow raises MemoryError and SystemError too
        raise StoreFormatError(f"{path}: is not a readable Arrow file: {error}") from None
    if not table.num_rows == len(table["id"]) == len(table["metadata"]) == rows:
        raise StoreFormatError(f"{path}: expected {rows} rows, got {table.num_rows}")
    if table["id"].null_count:
        raise StoreFormatError(f"{path}: expected an id for every row, got none for some")
    return table


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"


def parse_metadata(value: pa.Scalar, path: Path, row: int) -> dict[str, Any] | None:
    """What the ids file at `path` holds of a row's metadata.

    Raises:
        StoreFormatError: it is no JSON object.
    """
    try:
        text = value.as_py()
        found: Any = None if text is None else json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also not UTF-8
        found = ()
    if found is not None and not isinstance(found, dict):
        raise StoreFormatError(f"{path}: the metadata of row {row} is no JSON object")
    return found


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"{what} is not valid Unicode: {error.reason}") from None
