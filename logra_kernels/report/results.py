"""Reading and writing the JSON file that `logra query` leaves and `logra report` takes."""

import json
import os
from pathlib import Path
from typing import Any

FORMAT = "logra_kernels.results"
VERSION = 1


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file: under a temporary name first, so that a half one is never left."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_results(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write results as JSON."""
    write_text(path, json.dumps(results, ensure_ascii=False, indent=1) + "\n")


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, another format, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results: no file {path}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"results: {path}: not JSON: {error}") from error
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise ValueError(f"results: {path}: expected format {FORMAT!r}, got {found!r}")
    if results.get("version") != VERSION:
        got = results.get("version")
        raise ValueError(f"results: {path}: expected version {VERSION}, got {got!r}")
    return dict(results)
