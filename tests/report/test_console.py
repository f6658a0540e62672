"""What stands in names, ids and texts does not reach a terminal as a command."""

import io
import re
from pathlib import Path

import pytest

from logra_kernels.report.console import UNSAFE, printable, say, warn
from logra_kernels.report.terminal import print_table

HOSTILE = "a\x1b[2Jb\x9b31mc\rd\ne\u202ef\u2066g\x7f\u2028h\ud800"


def test_control_characters_are_shown_as_python_writes_them() -> None:
    wanted = r"a\x1b[2Jb\x9b31mc\rd\ne\u202ef\u2066g\x7f\u2028h\ud800"
    assert printable(HOSTILE) == wanted
    assert printable("λ × 永 é 👩‍👧 \\x1b") == "λ × 永 é 👩‍👧 \\x1b"
    every = "".join(map(chr, (*range(32), *range(127, 160))))
    assert all(len(printable(c)) > 1 for c in every)


def test_say_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert not UNSAFE.search(out[:-1])


def test_a_warning_keeps_its_lines_and_forges_none(capsys: pytest.CaptureFixture[str]) -> None:
    warn("first\nlogra log: all is well\x1b[0m")
    assert capsys.readouterr().err == "first\n  logra log: all is well\\x1b[0m\n"


def test_a_terminal_without_the_character_shows_its_number() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("λ = 3", stream)
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u03bb = 3\n"


def test_a_tables_lines_stay_narrow_when_characters_are_written_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = [" ".join(["\x02\x02\x02"] * 6)] * 5
    print_table({"heading": "h", "text": "t", "columns": list("abcde"), "rows": [row]})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 96


def test_the_command_prints_at_one_place() -> None:
    package = Path(__file__).parents[2] / "logra_kernels"
    files = [f for room in ("cli", "report", "demo", "lm") for f in (package / room).rglob("*.py")]
    printing = [
        file.name
        for file in files
        if re.search(r"\bprint\(|print_exc|std(out|err)\.write", file.read_text(encoding="utf-8"))
    ]
    assert len(files) > 20
    assert printing == ["console.py"]
