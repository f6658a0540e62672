"""Text, JSONL and Parquet files as tokenised examples, in batches of similar length.

    records (id, prompt, text) -> examples (tokens, where the loss starts) -> windows -> batches

Everything streams: at no time is more than one window of examples in memory. Batches depend on the
file, the tokenizer and the settings only, so a run that is continued forms the same batches as one
that was never stopped.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A plain text file is tokenised in blocks of about a million characters, cut at line ends.
BLOCK_CHARACTERS = 1 << 20
# Examples are sorted by length within a window of this many: hardly any padding is left.
WINDOW_EXAMPLES = 2048
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Record:
    """One entry of a file: the loss is on `text`; `prompt` stands before it and bears none."""

    id: str
    text: str
    prompt: str = ""
    title: str = ""


@dataclass(frozen=True)
class TokenSettings:
    """How a record becomes examples; kept in the store so that a reader knows what a row is.

    max_tokens: the longest example, prompt and special tokens included.
    long: what happens to a longer record: "split" into examples `id#0`, `id#1`, …, or "truncate".
    stride: tokens between the starts of two pieces of a split record; max_tokens if None (no
        overlap).
    """

    max_tokens: int = 512
    long: str = "truncate"
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens: expected at least 2, got {self.max_tokens}")
        if self.long not in ("split", "truncate"):
            raise ValueError(f"long: expected 'split' or 'truncate', got {self.long!r}")
        if self.stride is not None and not 1 <= self.stride <= self.max_tokens:
            raise ValueError(
                f"stride: expected 1 to max_tokens = {self.max_tokens}, got {self.stride}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Example:
    """A tokenised example: tokens `loss_start` … end are predicted and bear the loss."""

    id: str
    text: str
    prompt: str
    tokens: tuple[int, ...]
    loss_start: int
    title: str = ""

    def metadata(self) -> dict[str, Any]:
        """What the store keeps beside the row, so that the passage can be shown and run again."""
        kept: dict[str, Any] = {
            "text": self.text,
            "tokens": list(self.tokens),
            "loss_start": self.loss_start,
        }
        for name, value in (("prompt", self.prompt), ("title", self.title)):
            if value:
                kept[name] = value
        return kept

    @classmethod
    def from_metadata(cls, id: str, metadata: dict[str, Any]) -> "Example":
        """The example that `metadata` was made from."""
        return cls(
            id=id,
            text=metadata["text"],
            prompt=metadata.get("prompt", ""),
            tokens=tuple(metadata["tokens"]),
            loss_start=metadata["loss_start"],
            title=metadata.get("title", ""),
        )


class Corpus:
    """A .txt, .jsonl or .parquet file, read as examples.

    A text file is one long record, always split, with examples `0`, `1`, …; the other two hold a
    record a line or row.

    Args:
        path: the file.
        tokenizer: a fast Hugging Face tokenizer (one that gives character offsets).
        settings: lengths, splitting.
        text_field, prompt_field, title_field, id_field: columns or keys; without `id_field` the
            record's number is its id.
        limit: stop after this many examples.
    Raises:
        FileNotFoundError, ValueError: the file is missing, of another kind, or lacks a field.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any,
        settings: TokenSettings,
        *,
        text_field: str = "text",
        prompt_field: str | None = None,
        title_field: str | None = None,
        id_field: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.settings = settings
        self.fields = {
            "text": text_field,
            "prompt": prompt_field,
            "title": title_field,
            "id": id_field,
        }
        self.limit = limit
        self.fraction_read = 0.0
        self.num_examples = 0
        self.num_skipped = 0
        self.num_truncated = 0
        if self.path.suffix not in SUFFIXES:
            wanted = ", ".join(SUFFIXES)
            raise ValueError(f"data: expected a file ending in {wanted}, got {self.path.name!r}")
        if not self.path.is_file():
            raise FileNotFoundError(f"data: no file {self.path}")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "tokenizer: expected a fast tokenizer (tokenizer.json), got a slow one"
            )
        if self.path.suffix == ".txt" and (prompt_field or title_field or id_field):
            raise ValueError("prompt_field, title_field, id_field: a .txt file has no fields")

    def __iter__(self) -> Iterator[Example]:
        """The examples, in the file's order; records of fewer than two tokens are left out."""
        self.fraction_read = 0.0
        self.num_examples = self.num_skipped = self.num_truncated = 0
        source = self._from_text() if self.path.suffix == ".txt" else self._from_records()
        for example in source:
            self.num_examples += 1
            yield example
            if self.limit is not None and self.num_examples >= self.limit:
                self.fraction_read = 1.0
                return
        self.fraction_read = 1.0
        if self.num_examples == 0:
            raise ValueError(f"data: {self.path} holds no text of two tokens or more")

    def _from_records(self) -> Iterator[Example]:
        seen: set[str] = set()
        for record in self._records():
            if record.id in seen:
                raise ValueError(f"data: {self.path}: the id {record.id!r} stands twice")
            seen.add(record.id)
            examples, truncated = encode(record, self.tokenizer, self.settings)
            self.num_skipped += not examples
            self.num_truncated += truncated
            yield from examples

    def _records(self) -> Iterator[Record]:
        rows = self._jsonl_rows() if self.path.suffix == ".jsonl" else self._parquet_rows()
        for number, (place, row) in enumerate(rows):
            values: dict[str, str] = {}
            for role, field in self.fields.items():
                if field is None:
                    continue
                if field not in row:
                    names = ", ".join(sorted(row))
                    raise ValueError(f"data: {place}: no field {field!r} (it has: {names})")
                value = row[field]
                if role == "id" and isinstance(value, int):
                    value = str(value)
                if not isinstance(value, str):
                    got = type(value).__name__
                    raise ValueError(
                        f"data: {place}: field {field!r}: expected a string, got {got}"
                    )
                values[role] = value
            yield Record(
                id=values.get("id", str(number)),
                text=values["text"],
                prompt=values.get("prompt", ""),
                title=values.get("title", ""),
            )

    def _jsonl_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Pairs of ("file, line n", the object)."""
        size_bytes = max(self.path.stat().st_size, 1)
        for number, position, row in json_lines(self.path, "data"):
            self.fraction_read = position / size_bytes
            yield f"{self.path}, line {number}", row

    def _parquet_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """As `_jsonl_rows`; only the columns that are needed are read."""
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"data: {self.path}: not a Parquet file: {error}") from error
        wanted = [field for field in self.fields.values() if field is not None]
        names = table.schema_arrow.names
        for field in wanted:
            if field not in names:
                raise ValueError(
                    f"data: {self.path}: no column {field!r} (it has: {', '.join(sorted(names))})"
                )
        total, number = max(table.metadata.num_rows, 1), 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                self.fraction_read = (number + 1) / total
                yield f"{self.path}, record {number}", row
                number += 1

    def _from_text(self) -> Iterator[Example]:
        """Windows of `max_tokens` tokens over the whole file, `stride` apart."""
        prefix = special_prefix(self.tokenizer)
        length = self.settings.max_tokens - len(prefix)
        stride = min(self.settings.stride or length, length)
        if length < 1:
            raise ValueError(f"max_tokens: expected more than {len(prefix)} special tokens")
        tokens: list[int] = []
        pieces: list[str] = []  # pieces[i]: the characters of tokens[i]
        number, covered = 0, 0  # covered: how many of `tokens` an example holds already
        for block in self._text_blocks():
            encoded = self.tokenizer(
                block, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            spans = encoded["offset_mapping"]
            tokens.extend(encoded["input_ids"])
            pieces.extend(token_pieces(block, spans))
            start = 0
            while len(tokens) - start >= length:
                yield self._window(number, prefix, tokens, pieces, start, length)
                number += 1
                covered = start + length
                start += stride
            del tokens[:start], pieces[:start]
            covered -= start
        if len(tokens) > covered:
            last = self._window(number, prefix, tokens, pieces, 0, len(tokens))
            if len(last.tokens) >= 2:
                yield last

    def _window(
        self,
        number: int,
        prefix: list[int],
        tokens: list[int],
        pieces: list[str],
        start: int,
        length: int,
    ) -> Example:
        return Example(
            id=str(number),
            text="".join(pieces[start : start + length]),
            prompt="",
            tokens=(*prefix, *tokens[start : start + length]),
            loss_start=max(1, len(prefix)),
        )

    def _text_blocks(self) -> Iterator[str]:
        size_bytes, read_bytes = max(self.path.stat().st_size, 1), 0
        lines: list[str] = []
        held = 0
        try:
            with self.path.open(encoding="utf-8", newline="") as text:
                for line in text:
                    lines.append(line)
                    held += len(line)
                    read_bytes += len(line.encode())
                    if held >= BLOCK_CHARACTERS:
                        self.fraction_read = read_bytes / size_bytes
                        yield "".join(lines)
                        lines, held = [], 0
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {self.path}: not UTF-8 text: {error}") from error
        if lines:
            self.fraction_read = 1.0
            yield "".join(lines)


def json_lines(path: Path, argument: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, bytes read so far, the object) of a JSONL file; blank lines are passed over.

    Raises:
        ValueError: a line that is no JSON object; the message names the argument and the line.
    """
    position = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            position += len(line)
            if not line.strip():
                continue
            place = f"{argument}: {path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: not JSON: {error}") from error
            if not isinstance(row, dict):
                got = type(row).__name__
                raise ValueError(f"{place}: expected an object, got {got}")
            yield number, position, row


def token_pieces(text: str, spans: Iterable[tuple[int, int]]) -> list[str]:
    """The characters that each token adds, so that "".join gives the text back.

    A character that several byte-level tokens share belongs to the first of them; what no token
    covers (white space that the tokenizer drops) goes to the token after it.
    """
    pieces, reached = [], 0
    for _, end in spans:
        pieces.append(text[reached : max(end, reached)])
        reached = max(end, reached)
    return pieces


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text (a BOS token, or nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def encode(record: Record, tokenizer: Any, settings: TokenSettings) -> tuple[list[Example], bool]:
    """Tokenise a record into one example, or several if it is long and is to be split.

    The prompt is kept whole in every piece. A record whose text has no token to predict gives none.

    Returns:
        the examples, and whether anything was cut off.
    Raises:
        ValueError: the prompt alone fills `max_tokens`.
    """
    text = record.prompt + record.text
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    tokens, spans = encoded["input_ids"], encoded["offset_mapping"]
    # Every piece starts with the head: special tokens, whose span is empty, and the tokens of the
    # prompt. A token that reaches over the end of the prompt belongs to the text.
    head = next((i for i, (_, end) in enumerate(spans) if end > len(record.prompt)), len(spans))
    body, room = len(tokens) - head, settings.max_tokens - head
    if body == 0 or len(tokens) < 2:
        return [], False
    if room < 1 or head + room < 2:
        raise ValueError(
            f"data: record {record.id!r}: the prompt has {head} tokens,"
            f" no room for text within max_tokens = {settings.max_tokens}"
        )
    pieces = token_pieces(text, spans)

    def example(id: str, text: str, start: int) -> Example:
        shown = (*tokens[:head], *tokens[start : start + room])
        return Example(id, text, record.prompt, shown, max(1, head), record.title)

    def piece(id: str, start: int) -> Example:
        return example(id, "".join(pieces[start : start + room]), start)

    if body <= room:
        return [example(record.id, record.text, head)], False
    if settings.long == "truncate":
        return [piece(record.id, head)], True
    stride = min(settings.stride or room, room)
    # The last piece is the first that reaches the end.
    starts = range(head, head + body - room + stride, stride)
    split = [piece(f"{record.id}#{number}", start) for number, start in enumerate(starts)]
    # A piece of one token, without a head, has nothing to predict.
    return [one for one in split if len(one.tokens) >= 2], False


def batches(
    examples: Iterable[Example],
    *,
    batch_tokens: int,
    batch_size: int | None = None,
    window: int = WINDOW_EXAMPLES,
) -> Iterator[list[Example]]:
    """Batches of similar length: longest first within each window of examples.

    A batch holds at most `batch_tokens` tokens, padding included, and at most `batch_size`
    examples; a single example longer than that is a batch of its own.
    """
    held: list[Example] = []
    for example in examples:
        held.append(example)
        if len(held) == window:
            yield from _window_batches(held, batch_tokens, batch_size)
            held = []
    yield from _window_batches(held, batch_tokens, batch_size)


def _window_batches(
    window: list[Example], batch_tokens: int, batch_size: int | None
) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in sorted(window, key=lambda example: -len(example.tokens)):
        longest = len(batch[0].tokens) if batch else 0
        full = batch_size is not None and len(batch) == batch_size
        if batch and (full or longest * (len(batch) + 1) > batch_tokens):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
