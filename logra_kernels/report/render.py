"""Results -> HTML, through report.html and report.css beside this file."""

import os
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from logra_kernels.report.results import write_text

MODE_NAMES = {
    "l-relatif": "l-RelatIF",
    "dot": "Influence",
    "gradient-dot": "Gradient dot product",
    "l2": "l2",
    "theta-relatif": "θ-RelatIF",
    "whitened-cosine": "Whitened cosine",
}
MODE_MEANINGS = {
    "l-relatif": "preconditioned by the curvature, divided by √ of the passage's self-influence",
    "dot": "preconditioned by the curvature: Eq. 3",
    "gradient-dot": "no curvature, no normalisation: the baseline",
    "l2": "influence less half the passage's self-influence",
    "theta-relatif": "influence divided by the length of the passage's own parameter change",
    "whitened-cosine": "l-RelatIF, divided by √ of the query's self-influence too",
}
# Shades on either side of zero. More cannot be told apart on a phone.
SHADES = 8


def write_report(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Render results and write the page."""
    write_text(path, render(results))


def render(results: dict[str, Any]) -> str:
    """The page as text. Everything that comes from the results is escaped.

    Raises:
        ValueError: the results lack a key that the page needs; the message names it.
    """
    environment = Environment(
        loader=PackageLoader("logra_kernels.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = format_score
    try:
        return environment.get_template("report.html").render(
            title=results["title"],
            created=_date(results["created"]),
            facts=facts(results),
            notes=results["notes"],
            tables=results.get("tables") or (),
            queries=[_query(query) for query in results["queries"]],
            # The package's own file: the only text that is not escaped.
            css=Markup((resources.files(__package__) / "report.css").read_text(encoding="utf-8")),
            shades=range(1, SHADES + 1),
        )
    except KeyError as error:
        raise ValueError(f"results: no key {error}, which a report needs") from error


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What the store, the model and the settings were, as pairs of label and value."""
    store, model, curvature = results["store"], results["model"], results["curvature"]
    rows = [
        ("Passages", f"{store['rows']:,}"),
        ("Row", f"{store['dim']:,} numbers, {store['dtype']}"),
        ("Store", format_bytes(store["bytes"])),
        ("Modules", _modules(store["modules"])),
        ("Projection", projection_line(store["projection"])),
        ("Curvature", curvature["kind"]),
    ]
    if curvature["kind"] != "none":
        dampings = curvature.get("dampings") or [curvature]
        rows.append(("Damping", "; ".join(map(_damping, dampings))))
    for answer in results.get("answers") or []:
        if answer["method"] != "scan":
            rows.append((f"{mode_name(answer)}, found", answer["text"]))
    rows += [
        ("Model", f"{model['path']}, {model['dtype']}"),
        ("Fingerprint", model["fingerprint"]["weights"]),
    ]
    return rows


def _damping(facts: dict[str, Any]) -> str:
    if facts.get("damping") is not None:
        return f"λ = {facts['damping']:g}"
    if facts.get("damping_rule") is not None:
        return f"λ by the rule “{facts['damping_rule']}”, per module"
    return f"λ = {facts['damping_scale']:g} × mean eigenvalue, per module"


def scale_of(mode: dict[str, Any]) -> str | None:
    """The damping scale of a query's mode, or its rule, as text; None where there is only one."""
    scale = mode.get("damping_scale")
    return mode.get("damping_rule") if scale is None else str(scale)


def mode_name(mode: dict[str, Any]) -> str:
    """The heading of a query's mode: its name, and its damping where there are several."""
    name, scale = MODE_NAMES.get(mode["mode"], mode["mode"]), scale_of(mode)
    return name if scale is None else f"{name}, damping scale {scale}"


def _modules(modules: Sequence[str]) -> str:
    shown = modules[0] if len(modules) == 1 else f"{modules[0]} … {modules[-1]}"
    return f"{len(modules)}: {shown}"


def projection_line(projection: Any) -> str:
    """A store's entry "projection" in words, whatever wrote it: kind, rank, coordinates, seed."""
    if not isinstance(projection, dict) or "kind" not in projection:
        return "not described"
    said = [str(projection["kind"])]
    if isinstance(projection.get("rank"), list):
        said.append(f"rank {' × '.join(map(str, projection['rank']))}")
    for name in ("coordinates", "moments", "seed", "pilot_examples"):
        if name in projection:
            said.append(f"{name.replace('_', ' ')} {projection[name]}")
    return ", ".join(said)


def _date(created: str) -> str:
    return datetime.fromisoformat(created).strftime("%Y-%m-%d %H:%M")


def format_bytes(count: float) -> str:
    """A size in bytes, in the largest unit that fits it."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """A time, in milliseconds, seconds, minutes or hours."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_score(score: float) -> str:
    """Four significant digits with the sign; an exponent below 0.001 and from a million on."""
    magnitude = abs(score)
    if magnitude != 0 and not 1e-3 <= magnitude < 1e6:
        return f"{score:+.2e}".replace("-", "−")
    digits = 0 if magnitude >= 1000 else 1 if magnitude >= 100 else 2 if magnitude >= 10 else 3
    return f"{score:+,.{digits}f}".replace("-", "−")


def _query(query: dict[str, Any]) -> dict[str, Any]:
    modes = query["modes"]
    ranks = {
        mode_name(mode): {passage["id"]: passage["rank"] for passage in mode["top"]}
        for mode in modes
    }
    shown = []
    for mode in modes:
        name = mode_name(mode)
        others = {other: places for other, places in ranks.items() if other != name}
        largest = max((abs(p["score"]) for p in (*mode["top"], *mode["bottom"])), default=0.0)
        shown.append(
            {
                "name": name,
                "meaning": MODE_MEANINGS.get(mode["mode"], ""),
                "top": [_passage(passage, largest, others) for passage in mode["top"]],
                "bottom": [_passage(passage, largest, {}) for passage in mode["bottom"]],
            }
        )
    expected = query.get("expected")
    if expected is not None:
        named = [(MODE_NAMES.get(mode, mode), rank) for mode, rank in expected["ranks"].items()]
        expected = {"what": expected["what"], "ranks": named}
    return {
        "id": query["id"],
        "prompt": query.get("prompt", ""),
        "text": query["text"],
        "origin": query.get("origin"),
        "expected": expected,
        "modes": shown,
    }


def _passage(
    passage: dict[str, Any], largest: float, others: dict[str, dict[str, int]]
) -> dict[str, Any]:
    tokens = passage.get("tokens")
    note = [passage["id"]] if passage.get("title") else []
    for mode, ranks in others.items():
        if passage["id"] in ranks:
            note.append(f"{mode}: #{ranks[passage['id']]}")
    share = abs(passage["score"]) / largest if largest > 0 else 0.0
    return {
        "rank": passage["rank"],
        "id": passage["id"],
        "title": passage.get("title"),
        "score": passage["score"],
        "width": round(100 * share, 1),
        "snippet": preview(passage, 110),
        "prompt": passage.get("prompt", ""),
        "body": shade(tokens) if tokens else escape(passage["text"]),
        "query": shade(passage.get("query_tokens") or ()),
        "note": " · ".join(note),
    }


def snippet(text: str, length: int) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def preview(passage: dict[str, Any], length: int) -> str:
    """The beginning of a passage's text, without the title if it begins with that."""
    text = passage["text"].lstrip()
    title = passage.get("title")
    if title and text.startswith(title):
        text = text[len(title) :]
    return snippet(text, length)


def shade(tokens: Sequence[tuple[str, float]]) -> Markup:
    """Tokens as spans of class p1 … p8 (raises the score) or n1 … n8 (lowers it).

    The shade is relative to the passage's largest contribution. A token that shows no text (it
    ends inside a character) is added to the one after it, so that what is shown keeps its sum.
    """
    merged: list[tuple[str, float]] = []
    waiting = 0.0
    for text, value in tokens:
        waiting += value
        if text:
            merged.append((text, waiting))
            waiting = 0.0
    if waiting and merged:
        text, value = merged.pop()
        merged.append((text, value + waiting))
    largest = max((abs(value) for _, value in merged), default=0.0)
    pieces = []
    for text, value in merged:
        level = round(SHADES * abs(value) / largest) if largest > 0 else 0
        if level == 0:
            pieces.append(escape(text))
        else:
            side = "p" if value > 0 else "n"
            pieces.append(
                Markup('<span class="{}{}" title="{}">{}</span>').format(
                    side, level, format_score(value), text
                )
            )
    return Markup("").join(pieces)
