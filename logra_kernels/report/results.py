"""Reading and writing the JSON file that `logra query` leaves and `logra report` takes."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from logra_kernels.report.console import UNSAFE, say

FORMAT = "logra_kernels.results"
VERSION = 1
STANDARD_OUTPUT = "-"


# What a report reads: {key: its value}, "?" after a key that may be missing or null; [the value of
# each entry]; a tuple is a list of that length; float is any finite number.
_PASSAGE = {
    "rank": int,
    "id": str,
    "score": float,
    "text": str,
    "title?": str,
    "prompt?": str,
    "tokens?": [(str, float)],
    "query_tokens?": [(str, float)],
}
_RESULTS = {
    "title": str,
    "created": str,
    "model": {"path": str, "dtype": str, "fingerprint": {"weights": str}},
    "store": {
        "rows": int,
        "dim": int,
        "bytes": int,
        "dtype": str,
        "modules": [str],
        "projection?": dict,
    },
    "curvature": {
        "kind": str,
        "damping?": float,
        "damping_scale?": float,
        "damping_rule?": str,
        "dampings?": [{"damping_scale?": float, "damping_rule?": str}],
    },
    # How each mode's passages were found.
    "answers?": [
        {
            "mode": str,
            "damping_scale?": float,
            "damping_rule?": str,
            "method": str,
            "text": str,
        }
    ],
    "notes": [str],
    "tables?": [{"heading": str, "text": str, "columns": [str], "rows": [[str]]}],
    "queries": [
        {
            "id": str,
            "prompt?": str,
            "text": str,
            "origin?": str,
            "expected?": {"what": str, "ranks": dict},
            "modes": [
                {
                    "mode": str,
                    "damping_scale?": float,
                    "damping_rule?": str,
                    "top": [_PASSAGE],
                    "bottom": [_PASSAGE],
                }
            ],
        }
    ],
}
_NAMES = {str: "text", int: "an integer", float: "a number", dict: "an object", list: "a list"}


@contextmanager
def whole_file(path: str | os.PathLike[str], **options: Any) -> Iterator[IO[Any]]:
    """A file to write: under a temporary name first, so that a half one is never left.

    Args:
        path: the file.
        options: of `open`, such as encoding.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # "x": a file or a link of that name is somebody else's.
    with open(unfinished, **{"mode": "x", **options}) as file:
        try:
            yield file
            file.close()
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink()
            raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file of UTF-8 text."""
    with whole_file(path, encoding="utf-8") as file:
        file.write(text)


def write_json(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a value as JSON, to stdout if the path is "-".

    Characters that could steer a terminal are escaped, as JSON allows in texts.
    """
    text = json.dumps(value, ensure_ascii=os.fspath(path) == STANDARD_OUTPUT, indent=1)
    lines = [UNSAFE.sub(_escaped, line) for line in text.split("\n")]
    if os.fspath(path) == STANDARD_OUTPUT:
        for line in lines:
            say(line)
    else:
        write_text(path, "\n".join(lines) + "\n")


def write_results(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write results as JSON, to stdout if the path is "-"."""
    write_json(results, path)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, another format or version, or lacks what a report needs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results: no file {path}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"results: {path}: not JSON: {error}") from error
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise ValueError(f"results: {path}: expected format {FORMAT!r}, got {found!r}")
    if results.get("version") != VERSION:
        got = results.get("version")
        raise ValueError(f"results: {path}: expected version {VERSION}, got {got!r}")
    if found := _difference(results, _RESULTS, ""):
        raise ValueError(f"results: {path}: {found}")
    if not results["store"]["modules"]:
        raise ValueError(f"results: {path}: store.modules: expected at least one, got none")
    return dict(results)


def _difference(value: Any, shape: Any, where: str) -> str | None:
    """Where a value is not of the shape first, in words; None if it is."""
    if isinstance(shape, type):
        good = isinstance(value, shape) and not isinstance(value, bool)
        if shape is float:
            good = type(value) in (int, float) and abs(value) <= sys.float_info.max
        return None if good else f"{where}: expected {_NAMES[shape]}, got {value!r:.60}"
    inner: list[tuple[Any, Any, str]] = []
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where}: expected {_NAMES[dict]}, got {value!r:.60}"
        for key, wanted in shape.items():
            name, at = key.removesuffix("?"), f"{where}.{key}".strip(".?")
            if name == key and name not in value:
                return f"no key {at!r}, which a report needs"
            if name == key or value.get(name) is not None:
                inner.append((value[name], wanted, at))
    elif not isinstance(value, list):
        return f"{where}: expected {_NAMES[list]}, got {value!r:.60}"
    else:
        wanted = shape if isinstance(shape, tuple) else shape * len(value)
        if len(value) != len(wanted):
            return f"{where}: expected {len(wanted)} entries, got {len(value)}"
        inner = [(value[i], wanted[i], f"{where}[{i}]") for i in range(len(wanted))]
    return next(filter(None, (_difference(*each) for each in inner)), None)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found.group()):04x}"
