"""A plan, kept beside the store that was logged by it: plan.json, which no reader needs."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logra_kernels.report.results import write_json
from logra_kernels.store import Store
from logra_kernels.store.manifest import MANIFEST

PLAN = "plan.json"
FORMAT, VERSION = "logra_kernels.plan", 1
# What a table of plans says, in its order; the sizes that are exact come first.
BYTES = ("rows", "ids", "curvature", "projection", "norms", "manifest")
MEMORY = ("logging", "query")
SECONDS = ("pilot", "logging", "first_query", "later_query")


def read_plan(path: str, store_dtype: str) -> dict[str, Any]:
    """What `logra plan --json` wrote of one row codec.

    Raises:
        FileNotFoundError, ValueError: the message names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"plan: no file {path}")
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
        made = plan["format"], plan["version"]
        codecs = plan["codecs"]
    except (ValueError, KeyError, TypeError):
        made, codecs = None, {}
    if made != (FORMAT, VERSION):
        raise ValueError(f"plan: {path}: expected a file of `logra plan --json`, version {VERSION}")
    if store_dtype not in codecs:
        raise ValueError(f"plan: {path} is of {', '.join(codecs)} rows, not of {store_dtype}")
    return {**plan, "codecs": {store_dtype: codecs[store_dtype]}}


def check_plan(plan: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a plan of another run.

    Args:
        plan: of `read_plan`.
        asked: what this run is asked to log, and how.

    Raises:
        ValueError: says what differs.
    """
    now = json.loads(json.dumps(asked))
    for name, value in plan["asked"].items():
        if now.get(name) != value:
            raise ValueError(
                f"plan: was made for {name} {json.dumps(value)}, this run has "
                f"{json.dumps(now.get(name))}"
            )


def keep_plan(store: Path, plan: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Put a plan beside a store's manifest, with what was measured.

    Args:
        store: the folder.
        plan: of `read_plan`.
        measured: {"seconds": {name: s}, "memory_bytes": {name: b}}, as the plan names them.
    """
    write_json({**plan, "measured": measured}, store / PLAN)


def add_query(store: Store, queries: int, first: bool, seconds: float, memory_bytes: int) -> None:
    """Note how long a query took, if a plan of as many lies beside the store."""
    kept = kept_plan(store)
    if kept is None or kept["queries"] != queries:
        return
    measured = kept["measured"]
    measured["seconds"]["first_query" if first else "later_query"] = seconds
    measured["memory_bytes"]["query"] = memory_bytes
    # Of a store that may only be read nothing is noted.
    with contextlib.suppress(OSError):
        write_json(kept, store.path / PLAN)


def kept_plan(store: Store) -> dict[str, Any] | None:
    """The plan beside a store, if there is one that can be read."""
    # A store may come from anywhere.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((store.path / PLAN).read_text(encoding="utf-8"))
        (planned,) = kept["codecs"].values()
        parts = [planned[part] for part in ("bytes", "seconds", "memory_bytes")]
        parts += [kept["measured"][part] for part in ("seconds", "memory_bytes")]
        numbers = [number for part in parts for number in part.values()]
        if kept["format"] == FORMAT and all(type(number) in (int, float) for number in numbers):
            return dict(kept)
    return None


def compared(store: Store) -> list[tuple[str, float, float, str]]:
    """(what, planned, measured, unit) of all that was planned of a store and is known by now."""
    kept = kept_plan(store)
    if kept is None:
        return []
    (planned,) = kept["codecs"].values()
    measured = {**kept["measured"], "bytes": dict(_sizes(store))}
    return [
        (f"{name.replace('_', ' ')}{more}", planned[part][name], measured[part][name], unit)
        for part, names, more, unit in (
            ("bytes", BYTES, "", "bytes"),
            ("memory_bytes", MEMORY, ", memory", "bytes"),
            ("seconds", SECONDS, "", "s"),
        )
        for name in names
        if name in planned[part] and name in measured[part]
    ]


def _sizes(store: Store) -> Iterator[tuple[str, int]]:
    """The bytes of a store's files, as a plan names them; no norms before the first query."""
    shards = store.manifest["shards"]
    entries = [(key, e) for shard in shards for key, e in shard.items() if isinstance(e, dict)]
    yield "rows", sum(entry["bytes"] for key, entry in entries if key != "ids")
    yield "ids", sum(entry["bytes"] for key, entry in entries if key == "ids")
    yield "curvature", sum(entry["bytes"] for entry in store.curvatures.values())
    tensors = store.manifest["projection_tensors"]
    yield "projection", 0 if tensors is None else tensors["bytes"]
    yield "manifest", (store.path / MANIFEST).stat().st_size
    folders = sorted((store.path / "self_influence").glob("*/"))
    if folders:
        yield "norms", sum(file.stat().st_size for file in folders[0].glob("*.npy"))
