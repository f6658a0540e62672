"""`logra info`: the facts of a store."""

import argparse
import contextlib
from typing import Any

from logra_kernels.cli.outputs import check_outputs
from logra_kernels.report.console import say
from logra_kernels.report.render import format_bytes, plural, projection_line
from logra_kernels.report.results import STANDARD_OUTPUT, write_json
from logra_kernels.run.coverage import lines_of
from logra_kernels.store import Store


def run(arguments: argparse.Namespace) -> int:
    """Print label and value, a line each, or write JSON."""
    check_outputs(arguments)
    store = Store.open(arguments.store)
    if arguments.json:
        write_json(described(store), arguments.json)
    if arguments.json == STANDARD_OUTPUT:
        return 0
    for label, value in facts(store):
        say(f"{label:<13}{value}")
    return 0


def facts(store: Store) -> list[tuple[str, str]]:
    """Pairs of label and value that describe a store, whatever wrote it."""
    size_bytes = _size_bytes(store)
    state = "finalized" if store.finalized else "not finalized: being written, or interrupted"
    lines = [
        ("store", str(store.path)),
        ("state", state),
        ("rows", f"{store.num_rows:,} in {plural(len(store.shards), 'shard')}"),
        ("row", f"{store.dim:,} numbers, {store.dtype}"),
        ("size", f"{format_bytes(size_bytes)} ({size_bytes:,} bytes)"),
        ("projection", projection_line(store.projection)),
        ("curvature", _curvatures(store)),
    ]
    lines += _fingerprints(store.fingerprints)
    lines += _coverage(store.coverage)
    lines.append(("modules", f"{len(store.modules)}"))
    lines += [("", f"{m.name}  [{m.ko}, {m.ki}]") for m in store.modules]
    return lines


def described(store: Store) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "store": str(store.path),
        "finalized": store.finalized,
        "rows": store.num_rows,
        "shards": len(store.shards),
        "dim": store.dim,
        "dtype": store.dtype,
        "bytes": _size_bytes(store),
        "projection": store.projection,
        "curvatures": {name: {"rows": entry["rows"]} for name, entry in store.curvatures.items()},
        "fingerprints": store.fingerprints,
        "coverage": store.coverage,
        "modules": [{"name": m.name, "ko": m.ko, "ki": m.ki} for m in store.modules],
    }


def _size_bytes(store: Store) -> int:
    return sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())


def _curvatures(store: Store) -> str:
    found = []
    for name, entry in store.curvatures.items():
        stale = "" if entry["rows"] == store.num_rows else " (rows were added since)"
        found.append(f"{name}, of {entry['rows']:,} rows{stale}")
    return "; ".join(found) or "none"


def _coverage(found: Any) -> list[tuple[str, str]]:
    lines: list[str] = []
    if isinstance(found, dict):
        # A store may come from anywhere.
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            lines = lines_of(found)
    return [("coverage" if number == 0 else "", line) for number, line in enumerate(lines)]


def _fingerprints(found: Any) -> list[tuple[str, str]]:
    if isinstance(found, dict) and found.get("kind") == "causal-lm":
        # A store may come from anywhere: what is not as `logra log` writes it is shown as it is.
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            model, tokens, data = found["model"], found["tokens"], found["data"]
            return [
                ("model", f"{model['name']}, {model['dtype']}, weights {model['weights']}"),
                ("tokenizer", str(model["tokenizer"])),
                ("data", f"{data['file']}, {_sha256(data)}"),
                ("tokens", ", ".join(f"{key} {value}" for key, value in tokens.items() if value)),
            ]
    return [("fingerprints", str(found or "none"))]


def _sha256(data: Any) -> str:
    return "read once, no sha256" if data["sha256"] is None else f"sha256 {data['sha256'][:16]}"
