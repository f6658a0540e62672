"""Files, folders and standard input as rows, each with the place that it stands at.

A row is an object of a .jsonl, .json, .csv or .parquet file; a .txt file gives lines, or documents.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

STANDARD_INPUT = "-"
KINDS = ("txt", "jsonl", "parquet", "json", "csv")
ENDINGS = ", ".join(f".{kind}" for kind in KINDS) + ", or all but .parquet with .gz"
READ_CHARACTERS = 1 << 16
# A value that was cut by the end of what has been read fails this close to it.
CUT_CHARACTERS = 16


@dataclass(frozen=True)
class Source:
    """One file, or standard input (whose `path` is None); `name` is its path in the folder."""

    path: Path | None
    kind: str
    name: str = ""

    @property
    def place(self) -> str:
        """What an error calls it."""
        return "standard input" if self.path is None else str(self.path)

    @property
    def size_bytes(self) -> int:
        """The file's size as it lies on the disk; 0 for standard input."""
        return 0 if self.path is None else self.path.stat().st_size


@dataclass(frozen=True)
class Row:
    """An object of a file: its number there from 0, and the words that say where it stands."""

    source: Source
    number: int
    place: str
    values: dict[str, Any]


class Data:
    """Everything that one --data names: a file, a folder's supported files, or standard input.

    Args:
        data: a path, or "-".
        kind: of `KINDS`; by the file's ending if None, which standard input has not.
    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing of a kind that can be read.
    """

    def __init__(self, data: str | os.PathLike[str], kind: str | None = None) -> None:
        if kind is not None and kind not in KINDS:
            raise ValueError(f"format: expected one of {', '.join(KINDS)}, got {kind!r}")
        self.name, self.is_folder, self.num_ignored = Path(data).name, False, 0
        self.readable_again = os.fspath(data) != STANDARD_INPUT
        if not self.readable_again:
            self.name, self.sources = STANDARD_INPUT, [_standard_input(kind)]
        elif Path(data).is_dir():
            self.is_folder = True
            self.name = Path(data).resolve().name
            self.sources, self.num_ignored = _in_folder(Path(data), kind)
        else:
            self.sources = [_file(Path(data), kind)]
        sizes = [source.size_bytes for source in self.sources]
        # {source: the bytes of the sources up to it}
        self._ends = dict(zip(self.sources, itertools.accumulate(sizes), strict=True))
        self._all_bytes = max(sum(sizes), 1)
        self._position: Callable[[], float] = lambda: 0  # in the file that is being read, in bytes

    def fraction_read(self, source: Source) -> float | None:
        """How much has been read, if `source` is what is being read; None if that is unknown."""
        if not self.readable_again:
            return None
        left = max(0, source.size_bytes - self._position())
        return min(1.0, (self._ends[source] - left) / self._all_bytes)

    def digest(self) -> str | None:
        """SHA-256 of the file, or of the names and SHA-256 of a folder's; None if read once."""
        if not self.readable_again:
            return None
        found = {source.name: _sha256(source) for source in self.sources}
        if not self.is_folder:
            return found[""]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def rows(self, source: Source) -> Iterator[Row]:
        """The objects of a source that is no .txt file."""
        read = {
            "jsonl": self._jsonl,
            "json": self._json,
            "csv": self._csv,
            "parquet": self._parquet,
        }[source.kind]
        for number, (where, values) in enumerate(read(source)):
            if not isinstance(values, dict):
                got = type(values).__name__
                raise ValueError(f"data: {source.place}, {where}: expected an object, got {got}")
            yield Row(source, number, f"{source.place}, {where}", values)

    def lines(self, source: Source) -> Iterator[str]:
        """The lines of a .txt file, with their ends as they are."""
        with self._open(source) as stream:
            yield from io.TextIOWrapper(stream, encoding="utf-8", newline="")

    def documents(self, source: Source) -> Iterator[Row]:
        """What stands between blank lines in a .txt file, as rows {"text": …}."""
        held: list[str] = []
        number = first = 0
        for line_number, line in enumerate(self.lines(source), 1):
            if line.strip():
                first = first if held else line_number
                held.append(line)
            elif held:
                yield _document(source, number, first, held)
                number, held = number + 1, []
        if held:
            yield _document(source, number, first, held)

    @contextmanager
    def _open(self, source: Source) -> Iterator[IO[bytes]]:
        """The decompressed bytes of a source; what is wrong with them is said with its place."""
        try:
            if source.path is None:
                yield sys.stdin.buffer
                return
            with source.path.open("rb") as raw:
                self._position = raw.tell
                packed = source.path.suffix.lower() == ".gz"
                yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {source.place}: not UTF-8 text: {error}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"data: {source.place}: not a whole gzip file: {error}") from error
        finally:
            size_bytes = source.size_bytes
            self._position = lambda: size_bytes

    def _jsonl(self, source: Source) -> Iterator[tuple[str, Any]]:
        with self._open(source) as stream:
            for number, value in json_lines(stream, f"data: {source.place}"):
                yield f"line {number}", value

    def _json(self, source: Source) -> Iterator[tuple[str, Any]]:
        with self._open(source) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig")
            for number, value in _JsonList(text, f"data: {source.place}"):
                yield f"line {number}", value

    def _csv(self, source: Source) -> Iterator[tuple[str, Any]]:
        # The reader refuses a field of more than this, for the whole process: 131,072 by default.
        csv.field_size_limit(1 << 30)
        with self._open(source) as stream:
            lines = csv.reader(
                io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True
            )
            names: list[str] = []
            number = 1
            try:
                for fields in lines:
                    if fields and not names:
                        names = fields
                        if len(set(names)) != len(names):
                            raise ValueError(
                                f"data: {source.place}, line {number}: expected different column"
                                f" names, got {', '.join(names)}"
                            )
                    elif fields:
                        if len(fields) != len(names):
                            raise ValueError(
                                f"data: {source.place}, line {number}: expected {len(names)}"
                                f" fields, got {len(fields)}"
                            )
                        yield f"line {number}", dict(zip(names, fields, strict=True))
                    number = lines.line_num + 1
            except csv.Error as error:
                raise ValueError(
                    f"data: {source.place}, line {number}: not CSV: {error}"
                ) from error

    def _parquet(self, source: Source) -> Iterator[tuple[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        assert source.path is not None
        try:
            table = pyarrow.parquet.ParquetFile(source.path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"data: {source.path}: not a Parquet file: {error}") from error
        schema = table.schema_arrow
        columns = [field.name for field in schema if not _is_bytes(field.type)]
        size_bytes, total, number = source.size_bytes, max(table.metadata.num_rows, 1), 0
        self._position = lambda: size_bytes * number / total
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for values in batch.to_pylist():
                number += 1
                yield f"record {number - 1}", values


def json_lines(stream: IO[bytes], place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, the object) of JSON lines; blank lines are passed over.

    Raises:
        ValueError: a line that is no JSON object; the message begins with `place` and the line.
    """
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{place}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
        yield number, row


class _JsonList:
    """The objects of a JSON list with their line numbers, one in memory at a time."""

    def __init__(self, text: IO[str], place: str) -> None:
        self._text = text
        self._place = place
        self._buffer, self._at, self._line = "", 0, 1

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._next() != "[":
            raise self._error("expected a list of objects; one object a line is --format jsonl")
        self._at += 1
        after = "," if self._next() != "]" else "]"
        while after == ",":
            if self._next() != "{":
                raise self._error(f"expected an object, got {self._shown()}")
            line = self._line
            yield line, self._value()
            after = self._next()
            if after not in (",", "]"):
                raise self._error(f"expected , or ] after an object, got {self._shown()}")
            self._at += after == ","
        self._at += 1
        if self._next():
            raise self._error(f"expected nothing after the list, got {self._shown()}")

    def _next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            rest = self._buffer[self._at :]
            white = len(rest) - len(rest.lstrip(" \t\r\n"))
            self._line += rest.count("\n", 0, white)
            self._at += white
            if white < len(rest) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def _value(self) -> dict[str, Any]:
        """The object that begins here."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._buffer, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                if not _is_cut(error, len(self._buffer)) or not self._more():
                    raise self._error(f"not JSON: {error}") from error
                continue
            self._line += self._buffer.count("\n", self._at, end)
            self._at = end
            return dict(value)

    def _more(self) -> bool:
        """Read on, twice as much as is held; False at the end."""
        held = self._buffer[self._at :]
        more = self._text.read(max(READ_CHARACTERS, len(held)))
        self._buffer, self._at = held + more, 0
        return bool(more)

    def _shown(self) -> str:
        return repr(self._buffer[self._at : self._at + 20]) if self._next() else "the end"

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self._place}, line {self._line}: {what}")


def _is_cut(error: json.JSONDecodeError | RecursionError, length: int) -> bool:
    """Whether more text might mend the error."""
    if isinstance(error, RecursionError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= length - CUT_CHARACTERS


def _standard_input(kind: str | None) -> Source:
    if kind is None or kind == "parquet":
        wanted = ", ".join(name for name in KINDS if name != "parquet")
        got = "none" if kind is None else "parquet, which is not read from front to back"
        raise ValueError(f"format: standard input needs one of {wanted}, got {got}")
    return Source(None, kind)


def _in_folder(folder: Path, kind: str | None) -> tuple[list[Source], int]:
    """A folder's supported files by name, and the number of its other files."""
    if kind is not None:
        raise ValueError(f"format: a folder's files are told by their endings, got {kind!r}")
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )
    kinds = {name: _kind(name) for name in names}
    found = [Source(folder / name, told, name) for name, told in kinds.items() if told]
    if not found:
        raise ValueError(f"data: {folder}: expected files ending in {ENDINGS}, got none")
    return found, len(names) - len(found)


def _file(path: Path, kind: str | None) -> Source:
    told = kind or _kind(path.name)
    if told is None:
        raise ValueError(f"data: expected a file ending in {ENDINGS}, got {path.name!r}")
    if not path.is_file():
        pipe = "; a pipe is given as -, on standard input" if path.exists() else ""
        raise FileNotFoundError(f"data: no file {path}{pipe}")
    return Source(path, told)


def _kind(name: str) -> str | None:
    """The kind that a file's ending names."""
    name = name.lower()
    kind = Path(name.removesuffix(".gz")).suffix[1:]
    return kind if kind in KINDS and not name.endswith(".parquet.gz") else None


def _document(source: Source, number: int, first: int, lines: list[str]) -> Row:
    text = "".join(lines).rstrip("\r\n")
    return Row(source, number, f"{source.place}, line {first}", {"text": text})


def _sha256(source: Source) -> str:
    digest = hashlib.sha256()
    assert source.path is not None
    with source.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_bytes(kind: Any) -> bool:
    """Whether a Parquet column holds pictures and the like, which no field can."""
    return str(kind) in ("binary", "large_binary") or str(kind).startswith("fixed_size_binary")
