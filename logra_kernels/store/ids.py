"""The ids and the metadata of a shard's rows, as an Arrow IPC file."""

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from logra_kernels.store.errors import StoreError, StoreFormatError

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
    """The table of an ids file, mapped into memory.

    Raises:
        StoreFormatError: no Arrow file, other columns, or another number of rows.
    """
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise StoreFormatError(f"{path}: is not a readable Arrow file: {error}") from None
    for field in SCHEMA:
        if field.name not in table.column_names or table[field.name].type != field.type:
            raise StoreFormatError(
                f"{path}: expected the columns {_columns(SCHEMA)}, got {_columns(table.schema)}"
            )
    if table.num_rows != rows:
        raise StoreFormatError(f"{path}: expected {rows} rows, got {table.num_rows}")
    if table["id"].null_count:
        raise StoreFormatError(f"{path}: expected an id for every row, got none for some")
    return table


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"{what} is not valid Unicode: {error.reason}") from None
