"""`logra info`: the facts of a store."""

import argparse
import contextlib
from typing import Any

from logra_kernels.cli.kept_plan import compared
from logra_kernels.cli.outputs import check_outputs
from logra_kernels.defaults import DAMPING_SCALE
from logra_kernels.report.console import say
from logra_kernels.report.render import format_bytes, format_seconds, plural, projection_line
from logra_kernels.report.results import STANDARD_OUTPUT, write_json
from logra_kernels.run.coverage import lines_of
from logra_kernels.store import Store

# N rows determine H + λI to an error of the order of √(d_λ/N): here a third.
ROWS_PER_DIMENSION = 10
PLAN_KEYS = ("what", "planned", "measured", "unit")


def run(arguments: argparse.Namespace) -> int:
    """Print label and value, a line each, or write JSON."""
    check_outputs(arguments)
    store = Store.open(arguments.store)
    found = _effective_dimensions(store) if arguments.curvature else None
    if arguments.json:
        more = {} if found is None else {"effective_dimensions": found}
        write_json({**described(store), **more}, arguments.json)
    if arguments.json == STANDARD_OUTPUT:
        return 0
    for label, value in facts(store) + ([] if found is None else _dimension_lines(store, found)):
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
        ("curvature", _kept(store, statistics=False)),
    ]
    if any(_is_statistic(entry) for entry in store.curvatures.values()):
        lines.append(("statistics", _kept(store, statistics=True)))
    lines += _fingerprints(store.fingerprints)
    lines += _coverage(store.coverage)
    lines += _plan(store)
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
        "plan": [dict(zip(PLAN_KEYS, line, strict=True)) for line in compared(store)],
        "modules": [{"name": m.name, "ko": m.ko, "ki": m.ki} for m in store.modules],
    }


def _effective_dimensions(store: Store) -> dict[str, Any]:
    """d_λ of each module at the default damping, and the advice on it, as JSON values."""
    # Without --curvature the command does not wait for torch.
    from logra_kernels.curvature import curvature_kind, preconditioner_of

    preconditioner = preconditioner_of(store)
    modules = preconditioner.effective_dimensions()
    largest = max(modules, key=lambda name: modules[name])
    advice = None
    by_rows = curvature_kind(preconditioner.kind).rank_by_rows
    if by_rows and store.num_rows < ROWS_PER_DIMENSION * modules[largest]:
        advice = (
            f"{store.num_rows:,} rows are fewer than {ROWS_PER_DIMENSION} for each of the "
            f"{modules[largest]:.1f} effective dimensions of {largest}: its curvature is a rough "
            "estimate; more rows, a lower rank or a larger damping make it firmer"
        )
    scale = {"kind": preconditioner.kind, "damping_scale": DAMPING_SCALE}
    return {**scale, "modules": modules, "advice": advice}


def _dimension_lines(store: Store, found: dict[str, Any]) -> list[tuple[str, str]]:
    sizes = dict(zip(store.layout.names, store.layout.sizes, strict=True))
    kind = f"of {found['kind']}, λ = {found['damping_scale']} × mean eigenvalue"
    lines = [("dimensions", f"effective, d_λ {kind}")]
    for name, value in found["modules"].items():
        lines.append(("", f"{name}  {value:.1f} of {sizes[name]:,}"))
    return lines + ([("", found["advice"])] if found["advice"] else [])


def _size_bytes(store: Store) -> int:
    return sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())


def _is_statistic(entry: dict[str, Any]) -> bool:
    return isinstance(entry["meta"], dict) and "statistic" in entry["meta"]


def _kept(store: Store, statistics: bool) -> str:
    """The curvatures of a store, or its statistics."""
    found = []
    for name, entry in store.curvatures.items():
        if _is_statistic(entry) != statistics:
            continue
        stale = "" if entry["rows"] == store.num_rows else " (rows were added since)"
        meta = entry["meta"]
        drawn = isinstance(meta, dict) and meta.get("labels") == "sampled"
        labels = " and sampled labels" if drawn else ""
        found.append(f"{name}, of {entry['rows']:,} rows{labels}{stale}")
    return "; ".join(found) or "none"


def _coverage(found: Any) -> list[tuple[str, str]]:
    lines: list[str] = []
    if isinstance(found, dict):
        # A store may come from anywhere.
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            lines = lines_of(found)
    return [("coverage" if number == 0 else "", line) for number, line in enumerate(lines)]


def _plan(store: Store) -> list[tuple[str, str]]:
    """What a plan said of the store, beside what came."""
    lines = []
    for what, planned, measured, unit in compared(store):
        same = "as planned"
        if planned != measured:
            ratio = f": {measured / planned:.2f} times" if planned else ""
            same = f"planned {_quantity(planned, unit)}{ratio}"
        lines.append(f"{what} {_quantity(measured, unit)}, {same}")
    return [("plan" if number == 0 else "", line) for number, line in enumerate(lines)]


def _quantity(value: float, unit: str) -> str:
    return f"{value:,.0f} bytes" if unit == "bytes" else format_seconds(value)


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
