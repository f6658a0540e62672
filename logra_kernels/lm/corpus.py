"""Texts, records and conversations as tokenised examples, in batches of similar length.

    rows -> records (id, prompt, text) -> examples (tokens, loss on some) -> windows -> batches

Everything streams: at no time is more than one window of examples in memory. Batches depend on the
data, the tokenizer and the settings only, so a run that is continued forms the same batches as one
that was never stopped.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from logra_kernels.lm import chat
from logra_kernels.lm.sources import Data, Row, Source

# A plain text file is tokenised in blocks of about a million characters, cut at line ends.
BLOCK_CHARACTERS = 1 << 20
# Examples are sorted by length within a window of this many: hardly any padding is left.
WINDOW_EXAMPLES = 2048
DOCUMENTS = ("file", "blank-lines")


@dataclass(frozen=True)
class Record:
    """One entry of the data: the loss is on `text`; `prompt` stands before it and bears none.

    loss: the spans of characters of the text that bear the loss; None for all of it.
    templated: the text has its special tokens already, as a chat template writes them.
    kept: what else the store keeps of it.
    """

    id: str
    text: str
    prompt: str = ""
    title: str = ""
    loss: chat.Spans | None = None
    templated: bool = False
    kept: Mapping[str, Any] = field(default_factory=dict)


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
    """A tokenised example: tokens `loss_start` … end are predicted and bear the loss.

    no_loss: ranges [start, end) of those tokens that bear none: turns of others in a conversation.
    kept: what else the store keeps of it.
    """

    id: str
    text: str
    prompt: str
    tokens: tuple[int, ...]
    loss_start: int
    title: str = ""
    no_loss: tuple[tuple[int, int], ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """What the store keeps beside the row, so that the passage can be shown and run again."""
        known: dict[str, Any] = {
            "text": self.text,
            "tokens": list(self.tokens),
            "loss_start": self.loss_start,
        }
        for name, value in (
            ("prompt", self.prompt),
            ("title", self.title),
            ("no_loss", [list(each) for each in self.no_loss]),
        ):
            if value:
                known[name] = value
        return {**known, **self.kept}

    @classmethod
    def from_metadata(cls, id: str, metadata: dict[str, Any]) -> "Example":
        """The example that `metadata` was made from, as far as it is run again."""
        return cls(
            id=id,
            text=metadata["text"],
            prompt=metadata.get("prompt", ""),
            tokens=tuple(metadata["tokens"]),
            loss_start=metadata["loss_start"],
            title=metadata.get("title", ""),
            no_loss=tuple((start, end) for start, end in metadata.get("no_loss", ())),
        )


class Corpus:
    """A file, a folder of files or standard input, read as examples.

    A text file is one long record, always split, with examples `0`, `1`, …, or a record for each
    document between blank lines; the other kinds hold a record a line, row or object. In a folder
    a file's name stands before the numbers, `part.jsonl:0`.

    Args:
        data: a path, or "-" for standard input, which can be read once.
        tokenizer: a fast Hugging Face tokenizer (one that gives character offsets).
        settings: lengths, splitting.
        kind: of `sources.KINDS`; by the file's ending if None.
        text_field, prompt_field, title_field, id_field: columns or keys; without `id_field` the
            record's number is its id.
        messages_field: the field of conversations. Without this and `text_field` the first record
            decides: its field text, or else messages or conversations.
        chat_loss: of a conversation, "assistant" or "all" tokens bear the loss.
        documents: in a .txt file, "file" (all of it is one) or "blank-lines" (which part them).
        limit: stop after this many examples.
    Raises:
        FileNotFoundError, ValueError: the data is missing, of another kind, or lacks a field.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        tokenizer: Any,
        settings: TokenSettings,
        *,
        kind: str | None = None,
        text_field: str | None = None,
        prompt_field: str | None = None,
        title_field: str | None = None,
        id_field: str | None = None,
        messages_field: str | None = None,
        chat_loss: str = chat.CHAT_LOSSES[0],
        documents: str = DOCUMENTS[0],
        limit: int | None = None,
    ) -> None:
        self.data = Data(data, kind)
        self.tokenizer = tokenizer
        self.settings = settings
        self.chat_loss = chat_loss
        self.documents = documents
        self.limit = limit
        self.fraction_read: float | None = 0.0  # None: unknown
        self.num_examples = 0
        self.num_skipped = 0
        self.num_truncated = 0
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "tokenizer: expected a fast tokenizer (tokenizer.json), got a slow one"
            )
        named = (text_field, prompt_field, messages_field, title_field, id_field)
        self._check_texts(any(name is not None for name in named))
        if messages_field is not None and (text_field or prompt_field):
            raise ValueError(
                "messages_field: a conversation has no text_field or prompt_field; its roles say"
                " what is asked and what is answered"
            )
        self._held: tuple[Iterator[Row], Row | None] | None = None  # of standard input, when begun
        if messages_field is None and text_field is None:
            text_field, messages_field = self._by_first_record(prompt_field)
        if messages_field is None and chat_loss != chat.CHAT_LOSSES[0]:
            raise ValueError(f"chat_loss: {chat_loss} is for conversations, but there are none")
        self.messages_field = messages_field
        # {role: field or None}; the store keeps them
        self.fields = {
            "text": text_field,
            "prompt": prompt_field,
            "title": title_field,
            "id": id_field,
        }

    def __iter__(self) -> Iterator[Example]:
        """The examples, in the data's order; records with no token to predict are left out."""
        self.fraction_read = 0.0
        self.num_examples = self.num_skipped = self.num_truncated = 0
        seen: set[str] = set()
        for source in self.data.sources:
            whole = source.kind == "txt" and self.documents == "file"
            for example in self._from_text(source) if whole else self._from_records(source, seen):
                self.fraction_read = self.data.fraction_read(source)
                self.num_examples += 1
                yield example
                if self.limit is not None and self.num_examples >= self.limit:
                    self.fraction_read = 1.0
                    return
        self.fraction_read = 1.0
        if self.num_examples == 0:
            place = self.data.sources[0].place if len(self.data.sources) == 1 else self.data.name
            raise ValueError(f"data: {place} holds no text of two tokens or more")

    def fingerprint(self) -> dict[str, Any]:
        """Which text this is: name and SHA-256 (None: read once), and how it is read."""
        texts = all(source.kind == "txt" for source in self.data.sources)
        found: dict[str, Any] = {
            "file": self.data.name,
            "sha256": self.data.digest(),
            "fields": {} if texts else self.fields,
        }
        if self.messages_field is not None:
            template = json.dumps(getattr(self.tokenizer, "chat_template", None))
            found["chat"] = {
                "field": self.messages_field,
                "loss": self.chat_loss,
                "template": hashlib.sha256(template.encode()).hexdigest()[:16],
            }
        if self.documents != "file":
            found["documents"] = self.documents
        return found

    def _check_texts(self, has_fields: bool) -> None:
        """Refuse options for which there is no file."""
        texts = [source.kind == "txt" for source in self.data.sources]
        if all(texts) and has_fields:
            raise ValueError(
                "text_field, prompt_field, messages_field, title_field, id_field: a .txt file has"
                " no fields"
            )
        for name, value, allowed in (
            ("chat_loss", self.chat_loss, chat.CHAT_LOSSES),
            ("documents", self.documents, DOCUMENTS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(allowed)}, got {value!r}")
        if not any(texts) and self.documents != "file":
            raise ValueError(f"documents: {self.documents} is for .txt files, but there is none")

    def _by_first_record(self, prompt_field: str | None) -> tuple[str | None, str | None]:
        """(text_field, messages_field) by the fields of the first record."""
        source = next((each for each in self.data.sources if each.kind != "txt"), None)
        if source is None or prompt_field is not None:
            return "text", None
        rows = self.data.rows(source)
        first = next(rows, None)
        if not self.data.readable_again:
            self._held = rows, first
        names = () if first is None else first.values
        chats = [] if "text" in names else [name for name in chat.CHAT_FIELDS if name in names]
        return (None, chats[0]) if chats else ("text", None)

    def _rows(self, source: Source) -> Iterator[Row]:
        if source.kind == "txt":
            return self.data.documents(source)
        if self._held is None:
            return self.data.rows(source)
        rows, first = self._held
        return rows if first is None else itertools.chain([first], rows)

    def _from_records(self, source: Source, seen: set[str]) -> Iterator[Example]:
        for row in self._rows(source):
            record = self._record(row)
            if record.id in seen:
                raise ValueError(f"data: {row.place}: the id {record.id!r} stands twice")
            seen.add(record.id)
            examples, truncated = encode(record, self.tokenizer, self.settings)
            self.num_skipped += not examples
            self.num_truncated += truncated and bool(examples)
            yield from examples

    def _record(self, row: Row) -> Record:
        place = f"data: {row.place}"
        texts = dict(self.fields) if row.source.kind != "txt" else {"text": "text"}
        values = {role: _text(row, role, name) for role, name in texts.items() if name is not None}
        text, title = values.get("text", ""), values.get("title", "")
        loss, templated = None, False
        used = {name for name in texts.values() if name is not None}
        if self.messages_field is not None and row.source.kind != "txt":
            used.add(self.messages_field)
            where = f"{place}: {self.messages_field}"
            messages = chat.conversation(_value(row, self.messages_field), where)
            text, loss = chat.write(messages, self.tokenizer, self.chat_loss, where)
            templated = chat.has_template(self.tokenizer)
            title = title or chat.topic(messages)
        _check_unicode("".join((text, title, *values.values())), place)
        return Record(
            id=values.get("id", self._id(row.source, row.number)),
            text=text,
            prompt=values.get("prompt", ""),
            title=title,
            loss=loss,
            templated=templated,
            kept=self._kept(row, used),
        )

    def _id(self, source: Source, number: int) -> str:
        return f"{source.name}:{number}" if source.name else str(number)

    def _kept(self, row: Row, used: set[str]) -> dict[str, Any]:
        """The file's name in a folder, and the fields that have no part in the example."""
        kept: dict[str, Any] = {"file": row.source.name} if row.source.name else {}
        fields = {name: value for name, value in row.values.items() if name not in used}
        if fields:
            kept["fields"] = _as_json(fields)
        return kept

    def _from_text(self, source: Source) -> Iterator[Example]:
        """Windows of `max_tokens` tokens over the whole file, `stride` apart."""
        prefix = special_prefix(self.tokenizer)
        length = self.settings.max_tokens - len(prefix)
        stride = min(self.settings.stride or length, length)
        if length < 1:
            raise ValueError(f"max_tokens: expected more than {len(prefix)} special tokens")
        tokens: list[int] = []
        pieces: list[str] = []  # pieces[i]: the characters of tokens[i]
        number, covered = 0, 0  # covered: how many of `tokens` an example holds already
        for block in self._text_blocks(source):
            encoded = self.tokenizer(
                block, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            spans = encoded["offset_mapping"]
            tokens.extend(encoded["input_ids"])
            pieces.extend(token_pieces(block, spans))
            start = 0
            while len(tokens) - start >= length:
                yield self._window(source, number, prefix, tokens, pieces, start, length)
                number += 1
                covered = start + length
                start += stride
            del tokens[:start], pieces[:start]
            covered -= start
        if len(tokens) > covered:
            last = self._window(source, number, prefix, tokens, pieces, 0, len(tokens))
            if len(last.tokens) >= 2:
                yield last

    def _window(
        self,
        source: Source,
        number: int,
        prefix: list[int],
        tokens: list[int],
        pieces: list[str],
        start: int,
        length: int,
    ) -> Example:
        return Example(
            id=self._id(source, number),
            text="".join(pieces[start : start + length]),
            prompt="",
            tokens=(*prefix, *tokens[start : start + length]),
            loss_start=max(1, len(prefix)),
            kept={"file": source.name} if source.name else {},
        )

    def _text_blocks(self, source: Source) -> Iterator[str]:
        lines: list[str] = []
        held = 0
        for line in self.data.lines(source):
            lines.append(line)
            held += len(line)
            if held >= BLOCK_CHARACTERS:
                yield "".join(lines)
                lines, held = [], 0
        if lines:
            yield "".join(lines)


def _value(row: Row, name: str) -> Any:
    """The field of a row; a ValueError says which fields it has."""
    if name in row.values:
        return row.values[name]
    noun = "column" if row.source.kind in ("parquet", "csv") else "field"
    names = ", ".join(sorted(map(str, row.values)))
    raise ValueError(f"data: {row.place}: no {noun} {name!r} (it has: {names})")


def _text(row: Row, role: str, name: str) -> str:
    """The text of a field; an id may be an integer."""
    value = _value(row, name)
    if role == "id" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or (role == "id" and not value):
        got = "an empty string" if value == "" else type(value).__name__
        raise ValueError(f"data: {row.place}: field {name!r}: expected a string, got {got}")
    return value


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: not valid Unicode: {error.reason}") from None


def _as_json(values: Mapping[str, Any]) -> Any:
    """The values as the store's JSON holds them: dates, NaN and the like as text."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    return json.loads(text.encode("utf-8", "replace"), parse_constant=str)


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

    The prompt is kept whole in every piece. A piece with no token to predict is left out.

    Returns:
        the examples, and whether anything was cut off.
    Raises:
        ValueError: the prompt alone fills `max_tokens`.
    """
    text = record.prompt + record.text
    encoded = tokenizer(
        text,
        add_special_tokens=not record.templated,
        return_offsets_mapping=True,
        verbose=False,
    )
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
    bears = _bearing(record, spans)

    def example(id: str, text: str, start: int) -> Example | None:
        places = [*range(head), *range(start, min(start + room, len(tokens)))]
        chosen = [place for place, i in enumerate(places) if place >= max(1, head) and bears[i]]
        if not chosen:
            return None
        return Example(
            id,
            text,
            record.prompt,
            tuple(tokens[i] for i in places),
            chosen[0],
            record.title,
            _gaps(chosen, len(places)),
            record.kept,
        )

    def piece(id: str, start: int) -> Example | None:
        return example(id, "".join(pieces[start : start + room]), start)

    if body <= room:
        found = [example(record.id, record.text, head)]
    elif settings.long == "truncate":
        found = [piece(record.id, head)]
    else:
        stride = min(settings.stride or room, room)
        # The last piece is the first that reaches the end.
        starts = range(head, head + body - room + stride, stride)
        found = [piece(f"{record.id}#{number}", start) for number, start in enumerate(starts)]
    truncated = body > room and settings.long == "truncate"
    return [one for one in found if one is not None], truncated


def _bearing(record: Record, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token is of the text's characters that bear the loss."""
    if record.loss is None:
        return [True] * len(spans)
    shift = len(record.prompt)
    return [
        any(start < last + shift and end > first + shift for first, last in record.loss)
        for start, end in spans
    ]


def _gaps(chosen: Sequence[int], length: int) -> tuple[tuple[int, int], ...]:
    """The ranges between the first chosen place and `length` that hold no chosen one."""
    ends = zip(chosen, [*chosen[1:], length], strict=True)
    return tuple((place + 1, following) for place, following in ends if following > place + 1)


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
