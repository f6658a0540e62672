"""The one place that prints for the command, safe from what stands in names, ids and texts."""

import re
import sys
from typing import TextIO

# Names, ids and texts are others'. What could steer a terminal, forge a line, or show text in
# another order: C0 and C1 controls, line and paragraph separators, bidirectional controls,
# halves of surrogate pairs.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text on one line, with unsafe characters as Python writes them in a string."""
    return UNSAFE.sub(lambda found: repr(found.group())[1:-1], text)


def say(text: str = "", file: TextIO | None = None) -> None:
    """Print a line to stdout, or to another stream, whatever stands in it."""
    file = file or sys.stdout
    line = printable(text)
    # A terminal that lacks a character, such as λ, shows its number.
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=file)


def warn(text: str) -> None:
    """Say something of one line or more on stderr; lines after the first are indented."""
    first, *more = text.strip().split("\n")
    for line in (first, *(f"  {line}" for line in more)):
        say(line, sys.stderr)
