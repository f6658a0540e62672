"""Files of every kind, folders and standard input as examples; what bad ones are told."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_lm import make_tokenizer, write_jsonl

from logra_kernels.lm import sources
from logra_kernels.lm.corpus import Corpus, Example, TokenSettings

pytest.importorskip("transformers")

ROWS = [
    {"text": "one two", "lang": "en", "key": "a"},
    {"text": 'quoted "é", and\nanother line', "lang": "fr", "key": "b"},
    {"text": "[{three}]", "lang": "", "key": "c"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def read(data: Path | str, tokenizer: Any, **options: Any) -> list[Example]:
    return list(Corpus(data, tokenizer, TokenSettings(), **options))


def csv_text(rows: list[dict[str, str]]) -> str:
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join('"' + value.replace('"', '""') + '"' for value in row.values()))
    return "\n".join(lines) + "\n"


WRITERS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "csv": csv_text,
}


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_kind_gives_the_same_examples(
    tmp_path: Path, tokenizer: Any, kind: str, packed: str
) -> None:
    path = write(tmp_path / f"a.{kind}{packed}", WRITERS[kind](ROWS))
    corpus = Corpus(path, tokenizer, TokenSettings(), id_field="key")
    examples = list(corpus)
    assert [(e.id, e.text) for e in examples] == [(r["key"], r["text"]) for r in ROWS]
    # The fields that are not the example are kept beside it.
    assert [e.metadata()["fields"] for e in examples] == [{"lang": r["lang"]} for r in ROWS]
    assert corpus.fraction_read == 1.0


def test_a_parquet_file_keeps_its_columns_and_leaves_out_bytes(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"text": "ab", "n": 3, "score": float("nan"), "image": b"\x00\xff", "tags": ["x"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (example,) = read(tmp_path / "a.parquet", tokenizer)
    # NaN is no JSON, which the store's metadata are.
    assert example.metadata()["fields"] == {"n": 3, "score": "NaN", "tags": ["x"]}


def test_text_in_a_gzip_file(tmp_path: Path, tokenizer: Any) -> None:
    plain = write(tmp_path / "a.txt", "abcdef")
    packed = write(tmp_path / "a.txt.gz", "abcdef")
    settings = TokenSettings(max_tokens=4)
    assert list(Corpus(plain, tokenizer, settings)) == list(Corpus(packed, tokenizer, settings))


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.jsonl.gz", WRITERS["jsonl"](ROWS[:1]))
    write(tmp_path / "a.csv", WRITERS["csv"](ROWS[1:]))
    write(tmp_path / "sub" / "c.txt", "some text")
    write(tmp_path / "README.md", "no example")
    write(tmp_path / ".hidden.jsonl", "{")
    corpus = Corpus(tmp_path, tokenizer, TokenSettings())
    examples = list(corpus)
    assert [e.id for e in examples] == ["a.csv:0", "a.csv:1", "b.jsonl.gz:0", "sub/c.txt:0"]
    files = [e.metadata()["file"] for e in examples]
    assert files == ["a.csv", "a.csv", "b.jsonl.gz", "sub/c.txt"]
    assert corpus.data.num_ignored == 1
    assert corpus.fraction_read == 1.0
    # The fingerprint is of names and contents.
    before = corpus.fingerprint()
    assert before["file"] == tmp_path.name
    (tmp_path / "sub" / "c.txt").rename(tmp_path / "sub" / "d.txt")
    assert Corpus(tmp_path, tokenizer, TokenSettings()).fingerprint() != before


def test_what_is_read_grows_over_a_folder(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("a.jsonl", "b.csv", "c.json"):
        write(tmp_path / name, WRITERS[name[2:]](ROWS))
    corpus = Corpus(tmp_path, tokenizer, TokenSettings())
    read_so_far = [corpus.fraction_read for _ in corpus]
    assert read_so_far == sorted(read_so_far, key=lambda part: part or 0)
    assert 0 < (read_so_far[0] or 0) < 0.5
    assert corpus.fraction_read == 1.0


def test_documents_between_blank_lines(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.txt", "\n\none\n two\n  \t\n\nthree\r\n\r\nfour")
    examples = read(path, tokenizer, documents="blank-lines")
    texts = ["one\n two", "three", "four"]
    assert [(e.id, e.text) for e in examples] == list(zip("012", texts, strict=True))
    # By default the whole file is one text.
    assert len(read(path, tokenizer)) == 1
    corpora = [
        Corpus(path, tokenizer, TokenSettings(), documents=d) for d in ("file", "blank-lines")
    ]
    assert corpora[0].fingerprint() != corpora[1].fingerprint()
    long = Corpus(path, tokenizer, TokenSettings(max_tokens=4), documents="blank-lines")
    assert [e.text for e in long] == ["one\n", "thre", "four"]
    assert long.num_truncated == 2


def test_standard_input_is_read_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = WRITERS["jsonl"](ROWS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    corpus = Corpus("-", tokenizer, TokenSettings(), kind="jsonl")
    # The first record was looked at, to know its fields; it is not lost.
    assert [e.text for e in corpus] == [row["text"] for row in ROWS]
    assert corpus.fingerprint()["sha256"] is None


def test_what_standard_input_needs(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"format: standard input needs one of txt, .*, got none"):
        Corpus("-", tokenizer, TokenSettings())
    with pytest.raises(ValueError, match="got parquet, which is not read from front to back"):
        Corpus("-", tokenizer, TokenSettings(), kind="parquet")


def test_a_kind_that_is_told_outdoes_the_ending(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.json", WRITERS["jsonl"](ROWS))
    assert len(read(path, tokenizer, kind="jsonl")) == 3
    assert len(read(write(tmp_path / "data", csv_text(ROWS)), tokenizer, kind="csv")) == 3


def test_a_json_list_is_read_in_pieces(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f'row {i} \\ " {{ }} é \u2028 ' + "x" * (i % 7), "n": i} for i in range(50)]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=1))
    whole = read(path, tokenizer)
    assert [e.text for e in whole] == [row["text"] for row in rows]
    monkeypatch.setattr(sources, "READ_CHARACTERS", 3)
    assert read(path, tokenizer) == whole


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"text": "x y"}', r"line 1: expected a list of objects; .* --format jsonl"),
        ("a.json", '[\n{"text": "x y"},\n3]', r"line 3: expected an object, got '3\]'"),
        ("a.json", '[\n{"text": "x y"}\n{', r"line 3: expected , or \] after an object, got '\{'"),
        ("a.json", '[\n{"text": x}]', r"line 2: not JSON: Expecting value"),
        ("a.json", '[\n{"text": "x y"},', r"line 2: expected an object, got the end"),
        ("a.json", '[\n{"text": "x y', r"line 2: not JSON: Unterminated string"),
        ("a.json", '[{"text": "x y"}] 4', r"line 1: expected nothing after the list, got '4'"),
        ("a.json", "[" + '{"a":' * 100_000, r"line 1: not JSON: "),
        ("a.jsonl", '{"a":' * 100_000, r"line 1: not JSON: "),
        ("a.jsonl", '{"text": "\\ud800 x"}', r"line 1: not valid Unicode: surrogates not allowed"),
        ("a.csv", "text,n\nx y,1\nz\n", r"line 3: expected 2 fields, got 1"),
        ("a.csv", 'text,n\n"x\ny",1\n"z', r"line 4: not CSV: unexpected end of data"),
        ("a.csv", "text,text\nx y,1\n", r"line 1: expected different column names, got text, text"),
        ("a.csv", "body\nx y\n", r"line 2: no column 'text' \(it has: body\)"),
        ("a.csv", "", "holds no text of two tokens or more"),
        ("a.json", "[]", "holds no text of two tokens or more"),
    ],
)
def test_bad_content_is_named_with_its_line(
    tmp_path: Path, tokenizer: Any, name: str, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"data: .*{name}.*{message}"):
        read(write(tmp_path / name, content), tokenizer)


def test_bad_gzip_files(tmp_path: Path, tokenizer: Any) -> None:
    packed = gzip.compress(WRITERS["jsonl"](ROWS).encode())
    for bad in (b"not gzip", packed[:-12], packed[:15] + b"\xff\xff\xff" + packed[18:]):
        (tmp_path / "a.jsonl.gz").write_bytes(bad)
        with pytest.raises(ValueError, match=r"data: .*a\.jsonl\.gz: not a whole gzip file: "):
            read(tmp_path / "a.jsonl.gz", tokenizer)


def test_bad_folders_and_options(tmp_path: Path, tokenizer: Any) -> None:
    def refused(message: str, data: Path, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            Corpus(data, tokenizer, TokenSettings(), **options)

    refused(r"data: .*: expected files ending in \.txt, .*, got none", tmp_path)
    table = write(tmp_path / "a.csv", csv_text(ROWS))
    refused("format: a folder's files are told by their endings, got 'csv'", tmp_path, kind="csv")
    refused("format: expected one of txt, .*, got 'tsv'", table, kind="tsv")
    refused("documents: blank-lines is for .txt files", table, documents="blank-lines")
    refused("documents: expected file or blank-lines, got 'x'", tmp_path, documents="x")
    refused(r"expected a file ending in .*, got 'a\.parquet\.gz'", tmp_path / "a.parquet.gz")
    write(tmp_path / "a.txt", "ab")
    refused("text_field, .*: a .txt file has no fields", tmp_path / "a.txt", text_field="text")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(FileNotFoundError, match=r"no file .*pipe\.txt; a pipe is given as -"):
        Corpus(tmp_path / "pipe.txt", tokenizer, TokenSettings())


def test_a_store_of_the_first_version_keeps_its_fingerprint(tmp_path: Path, tokenizer: Any) -> None:
    """Resuming compares what the store says of its data: nothing may be added to that of a file."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}])
    corpus = Corpus(path, tokenizer, TokenSettings())
    found = corpus.fingerprint()
    assert found["fields"] == {"text": "text", "prompt": None, "title": None, "id": None}
    assert set(found) == {"file", "sha256", "fields"}
    assert set(corpus.settings.as_dict()) == {"max_tokens", "long", "stride"}
    (example,) = corpus
    assert set(example.metadata()) == {"text", "tokens", "loss_start"}
