"""Results as text for a terminal."""

import itertools
import textwrap
from typing import Any

from logra_kernels.report.console import printable, say
from logra_kernels.report.render import format_score, mode_name, preview, snippet

WIDTH = 96


def print_query(query: dict[str, Any], *, least: bool) -> None:
    """A query and its ranked passages, as text of at most 96 columns."""
    say()
    say("─" * WIDTH)
    _paragraph(query["prompt"] or query["id"], "  asked   ")
    _paragraph(query["text"], "  answer  ")
    for mode in query["modes"]:
        name = mode_name(mode)
        _print_passages(f"{name}: most influential", mode["top"])
        if least:
            _print_passages(f"{name}: least influential", mode["bottom"])


def print_answers(results: dict[str, Any]) -> None:
    """How the passages of each mode were found."""
    say()
    for answer in results["answers"]:
        _paragraph(f"{mode_name(answer)}: {answer['text']}", "  ")


def print_table(table: dict[str, Any]) -> None:
    """A results file's table, in lines of at most 96 characters: wide columns are wrapped."""
    say()
    say("─" * WIDTH)
    say(table["heading"])
    _paragraph(table["text"], "  ")
    say()
    rows = [[printable(cell) for cell in row] for row in (table["columns"], *table["rows"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * len(widths) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    for row in rows:
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for lines in itertools.zip_longest(*cells, fillvalue=""):
            padded = (f"{line:<{width}}" for line, width in zip(lines, widths, strict=True))
            say(("  " + "  ".join(padded)).rstrip())


def _print_passages(heading: str, passages: list[dict[str, Any]]) -> None:
    say()
    say(f"  {heading}")
    width = max((len(format_score(p["score"])) for p in passages), default=0)
    for passage in passages:
        score = format_score(passage["score"])
        label = passage["id"]
        if passage.get("title"):
            label = f"{passage['title']}  [{label}]"
        start = f"  {passage['rank']:>3}  {score:>{width}}  "
        say(start + snippet(label, WIDTH - len(start)))
        say(" " * len(start) + preview(passage, WIDTH - len(start)))


def _paragraph(text: str, label: str) -> None:
    lines = textwrap.wrap(" ".join(text.split()), WIDTH - len(label)) or [""]
    for number, line in enumerate(lines):
        say((label if number == 0 else " " * len(label)) + line)
