"""The Python language reference that ships with CPython, as passages of about a hundred tokens."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from logra_kernels.lm.corpus import Record

_UNDERLINE = re.compile(r"([*=~^\-\"'+#])\1{2,}\s*\Z")
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+")


# A shorter passage goes on into the next section, or joins the passage before it.
FEWEST_TOKENS = 32


@dataclass(frozen=True)
class _Block:
    """A paragraph or a piece of code; a heading stands at the beginning of the block after it."""

    text: str
    section: str


def reference_passages(count_tokens: Callable[[str], int], most_tokens: int = 112) -> list[Record]:
    """Every topic of the reference, cut at paragraphs, each text once.

    The long pages repeat the short ones: a paragraph belongs to the shortest page that has it, so
    that the description of `yield` is found under `yield`. Ids are `topic/number`, titles the
    page's and the section's heading. The first passages of all pages come first, then the second
    ones: the beginning of the list is a sample of the whole.

    Args:
        count_tokens: the length of a text.
        most_tokens: of a passage, give or take what is too short to be one of its own; longer
            paragraphs are cut at sentences or lines.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    pages: list[list[Record]] = []
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        title, blocks = _read_page(topics[topic])
        fresh = []
        for block in blocks:
            key = " ".join(block.text.split())
            if key not in seen:
                seen.add(key)
                fresh.append(block)
        texts = _pack(fresh, count_tokens, most_tokens)
        pages.append(
            [
                Record(
                    id=f"{topic}/{number}",
                    text=text,
                    title=title if section in ("", title) else f"{title} › {section}",
                )
                for number, (text, section) in enumerate(texts)
            ]
        )
    longest = max(map(len, pages))
    return [page[number] for number in range(longest) for page in pages if number < len(page)]


def _read_page(page: str) -> tuple[str, list[_Block]]:
    """Heading and blocks; underlines go, lines of a paragraph are joined, code keeps its lines."""
    title, section, heading = "", "", ""
    blocks: list[_Block] = []
    for part in re.split(r"\n[ \t]*\n", page.strip("\n")):
        lines = [line.rstrip() for line in part.split("\n") if line.strip()]
        if len(lines) == 2 and _UNDERLINE.match(lines[1]):
            section = lines[0].strip()
            title = title or section
            heading += section + "\n\n"
        elif lines and not all(map(_UNDERLINE.match, lines)):  # a rule across the page
            code = any(line.startswith("   ") for line in lines)
            text = "\n".join(lines) if code else " ".join(line.strip() for line in lines)
            blocks.append(_Block(heading + text, section))
            heading = ""
    return title, blocks


def _pack(
    blocks: list[_Block], count_tokens: Callable[[str], int], most_tokens: int
) -> list[tuple[str, str]]:
    """Pairs (text, section of its first paragraph)."""
    groups: list[list[str]] = []
    sections: list[str] = []
    newest, tokens = "", 0
    for block in blocks:
        for piece in _cut(block.text, count_tokens, most_tokens):
            length = count_tokens(piece) + 1
            full = tokens + length > most_tokens or block.section != newest
            if not groups or (full and tokens >= FEWEST_TOKENS):
                groups.append([])
                sections.append(block.section)
                tokens = 0
            groups[-1].append(piece)
            newest = block.section
            tokens += length
    if len(groups) > 1 and tokens < FEWEST_TOKENS:
        last = groups.pop()
        groups[-1] += last
        sections.pop()
    return [("\n\n".join(group), section) for group, section in zip(groups, sections, strict=True)]


def _cut(text: str, count_tokens: Callable[[str], int], most_tokens: int) -> list[str]:
    """A text in pieces of at most `most_tokens`, at line ends (code) or sentence ends (prose)."""
    if count_tokens(text) + 1 <= most_tokens:
        return [text]
    joint = "\n" if "\n" in text else " "
    units = text.split("\n") if joint == "\n" else _SENTENCE_END.split(text)
    pieces: list[str] = []
    for unit in units:
        longer = f"{pieces[-1]}{joint}{unit}" if pieces else unit
        if pieces and count_tokens(longer) + 1 <= most_tokens:
            pieces[-1] = longer
        else:
            pieces.append(unit)
    return pieces
