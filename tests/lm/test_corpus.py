"""Readers, tokenisation, splitting and batching of text, JSONL and Parquet files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from refusals import refused
from tiny_lm import make_tokenizer, write_jsonl

from logra_kernels.lm.corpus import (
    Corpus,
    Example,
    Record,
    TokenSettings,
    batches,
    encode,
)
from logra_kernels.lm.sources import json_lines

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def read(
    path: Path, tokenizer: Any, settings: TokenSettings | None = None, **fields: Any
) -> list[Example]:
    return list(Corpus(path, tokenizer, settings or TokenSettings(), **fields))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# --- plain text


@pytest.mark.parametrize(
    ("text", "stride", "starts"),
    [
        ("abcdefghij", None, [0, 4, 8]),
        ("abcdefghij", 2, [0, 2, 4, 6]),
        ("abcdefghij", 3, [0, 3, 6]),
        ("abcdefgh", 2, [0, 2, 4]),  # nothing new at the end, no short tail
    ],
)
def test_text_windows_cover_every_token(
    tmp_path: Path, tokenizer: Any, text: str, stride: int | None, starts: list[int]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    examples = read(path, tokenizer, TokenSettings(max_tokens=4, stride=stride))
    assert [e.text for e in examples] == [text[s : s + 4] for s in starts]
    assert [e.id for e in examples] == [str(i) for i in range(len(starts))]
    assert all(e.loss_start == 1 for e in examples)


def test_text_windows_do_not_depend_on_the_block_size(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} é\n" for i in range(50)), encoding="utf-8")
    settings = TokenSettings(max_tokens=16, stride=5)
    whole = read(path, tokenizer, settings)
    monkeypatch.setattr("logra_kernels.lm.corpus.BLOCK_CHARACTERS", 40)
    assert read(path, tokenizer, settings) == whole


def test_bos_stands_before_every_window_and_counts_as_a_token(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdef", encoding="utf-8")
    examples = read(path, make_tokenizer(bos=True), TokenSettings(max_tokens=4))
    assert [e.text for e in examples] == ["abc", "def"]
    assert all(e.tokens[0] == 0 and len(e.tokens) == 4 for e in examples)


def test_a_character_of_several_tokens_is_not_lost_or_doubled(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aéb✓c", encoding="utf-8")  # 1 + 2 + 1 + 3 + 1 bytes
    examples = read(path, tokenizer, TokenSettings(max_tokens=2))
    assert "".join(e.text for e in examples) == "aéb✓c"


# --- records


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_records_take_ids_from_a_field_or_their_number(
    tmp_path: Path, tokenizer: Any, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    name = "a.jsonl" if write is write_jsonl else "a.parquet"
    path = write(tmp_path / name, [{"text": "one", "key": 7}, {"text": "two", "key": 9}])
    assert [(e.id, e.text) for e in read(path, tokenizer)] == [("0", "one"), ("1", "two")]
    assert [e.id for e in read(path, tokenizer, id_field="key")] == ["7", "9"]


def test_prompt_bears_no_loss(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": " yes", "question": "well?"}])
    (example,) = read(path, tokenizer, prompt_field="question")
    assert example.loss_start == 5
    assert len(example.tokens) == 9
    assert example.text == " yes"
    assert Example.from_metadata(example.id, example.metadata()) == example


def test_long_records_are_truncated_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdef"}, {"text": "abc"}])
    corpus = Corpus(path, tokenizer, TokenSettings(max_tokens=4))
    assert [(e.id, e.text) for e in corpus] == [("0", "abcd"), ("1", "abc")]
    assert corpus.num_truncated == 1


def test_long_records_are_split_with_the_prompt_before_every_piece(tokenizer: Any) -> None:
    record = Record("x", "abcdefg", "P:")
    examples, truncated = encode(record, tokenizer, TokenSettings(max_tokens=5, long="split"))
    assert [(e.id, e.text) for e in examples] == [("x#0", "abc"), ("x#1", "def"), ("x#2", "g")]
    assert all(e.tokens[:2] == examples[0].tokens[:2] and e.loss_start == 2 for e in examples)
    assert not truncated


def test_split_pieces_overlap_by_the_stride(tokenizer: Any) -> None:
    settings = TokenSettings(max_tokens=4, long="split", stride=2)
    examples, _ = encode(Record("x", "abcdefg"), tokenizer, settings)
    assert [e.text for e in examples] == ["abcd", "cdef", "efg"]


def test_records_with_nothing_to_predict_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"text": "ab"}])
    corpus = Corpus(path, tokenizer, TokenSettings())
    assert [e.id for e in corpus] == ["2"]
    assert corpus.num_skipped == 2


def test_limit_stops_early(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}] * 5)
    corpus = Corpus(path, tokenizer, TokenSettings(), limit=2)
    assert [e.id for e in corpus] == ["0", "1"]
    assert corpus.fraction_read == 1.0


# --- bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "x"}\n', r"line 1: no field 'text' \(it has: body\)"),
        ('{"text": "x y"}\n{"text": 3}\n', r"line 2: field 'text': expected a string, got int"),
        ("{not json\n", r"line 1: not JSON"),
        ("[1]\n", r"line 1: expected an object, got list"),
        ("", r"holds no text of two tokens or more"),
        ('{"text": ""}\n', r"holds no text of two tokens or more"),
    ],
)
def test_bad_jsonl_names_the_record(
    tmp_path: Path, tokenizer: Any, content: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read(path, tokenizer)


def test_bad_files(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"data: no file .*none\.txt"):
        read(tmp_path / "none.txt", tokenizer)
    refused("expected a file ending in .txt, .jsonl, .parquet", read, tmp_path / "a.doc", tokenizer)
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    refused("not a Parquet file", read, tmp_path / "a.parquet", tokenizer)
    write_parquet(tmp_path / "b.parquet", [{"body": "x"}])
    refused("no column 'text' (it has: body)", read, tmp_path / "b.parquet", tokenizer)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff")
    refused("a.txt: not UTF-8 text", read, tmp_path / "a.txt", tokenizer)
    write_jsonl(tmp_path / "c.jsonl", [{"text": "ab", "id": "x"}, {"text": "cd", "id": "x"}])
    refused("the id 'x' stands twice", read, tmp_path / "c.jsonl", tokenizer, id_field="id")


def test_bad_settings(tokenizer: Any) -> None:
    refused("max_tokens: expected at least 2, got 1", TokenSettings, max_tokens=1)
    refused("long: expected 'split' or 'truncate', got 'drop'", TokenSettings, long="drop")
    refused("stride: expected 1 to max_tokens = 4, got 5", TokenSettings, max_tokens=4, stride=5)
    with pytest.raises(ValueError, match="record 'x': the prompt has 6 tokens, no room"):
        encode(Record("x", "a", "prompt"), tokenizer, TokenSettings(max_tokens=6))


# --- batches


def example_of(length: int, id: str = "x") -> Example:
    return Example(id, "", "", tuple(range(length)), 1)


def test_batches_keep_within_the_padded_size() -> None:
    lengths = [5, 1, 9, 3, 3, 8, 2, 30]
    made = list(batches([example_of(n) for n in lengths], batch_tokens=16, batch_size=3))
    assert [[len(e.tokens) for e in batch] for batch in made] == [[30], [9], [8, 5], [3, 3, 2], [1]]


def test_batches_sort_within_a_window_only() -> None:
    made = list(batches([example_of(n) for n in (2, 4, 9, 7)], batch_tokens=100, window=2))
    assert [[len(e.tokens) for e in batch] for batch in made] == [[4, 2], [9, 7]]


def test_a_line_of_jsonl_ends_where_the_file_says(tmp_path: Path) -> None:
    """U+2028 may stand in a JSON string, and str.splitlines would cut the line there."""
    path = tmp_path / "q.jsonl"
    path.write_text('\n{"text": "a\u2028b"}\n{"text": "c"}\n', encoding="utf-8")
    with path.open("rb") as lines:
        assert [(n, row["text"]) for n, row in json_lines(lines, "data")] == [
            (2, "a\u2028b"),
            (3, "c"),
        ]
