"""Rows of results as text: every benchmark prints its tables here."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for each key that has a value, headed by it; numbers to three digits."""
    names = list(dict.fromkeys(n for row in rows for n, value in row.items() if value is not None))
    lines = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    layout = list(zip(widths, words, strict=True))
    return "\n".join(
        "  ".join(
            text.ljust(width) if left else text.rjust(width)
            for text, (width, left) in zip(line, layout, strict=True)
        ).rstrip()
        for line in lines
    )


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
