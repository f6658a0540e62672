"""Which tiles, warps and pipeline stages a kernel is launched with: one table, `heuristics.json`.

    {op: {architecture | "default": [{"types": …, "up_to": {size: n}, "config": {…}}, …]}}

A call takes the first rule that has the call's types (or names none) and whose sizes are all at
least the call's. An architecture that has rules for an op uses only these; one that has none uses
those of its family (`FAMILIES`), else the default's. `python -m tools.tune` measures on a GPU and
rewrites the table. Nothing is measured while a program runs.

types: "half" (both operands of one half type, or half rows and queries that were split into their
type), "full" (float32, exact products), "tf32" (float32 on tensor cores), "split" (everything else:
each operand is split into bfloat16 pieces).
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

Rules = list[dict[str, Any]]
Table = dict[str, dict[str, Rules]]

PATH = Path(__file__).with_name("heuristics.json")
TYPES = ("half", "full", "tf32", "split")

# The tiles that each op's configurations hold.
TILES = {
    "project": ("TOKENS", "WIDTH", "RANK"),
    "projected_gradients": ("CHUNK", "BLOCK", "WIDTH", "RANK"),
    "one_sided_gradients": ("CHUNK", "BLOCK", "WIDTH", "RANK"),
    "per_sample_gradients": ("CHUNK", "BLOCK", "RANK"),
    "reduce_gradients": ("REDUCE",),
    "covariance_update_": ("BLOCK", "TILE"),
    "add_covariances": ("ROWS",),
    "scores": ("ROWS", "QUERIES", "DIM"),
    "topk_scores": ("ROWS", "QUERIES", "DIM"),
    "whole_scores": ("ROWS", "QUERIES", "DIM"),
    "topk_whole_scores": ("ROWS", "QUERIES", "DIM"),
    "plane_scores": ("ROWS", "QUERIES", "DIM"),
    "topk_plane_scores": ("ROWS", "QUERIES", "DIM"),
    "merge_topk": ("MERGE",),
    "state_topk": ("OTHERS",),
    "self_influence": ("ROWS", "QUERIES", "DIM"),
    "split_queries": ("BLOCK",),
    "pack_rows": ("BLOCK",),
    "unpack_rows": ("BLOCK",),
}
# The sizes of a call that an op's rules may ask for. A split into calls changes some of them, and
# must not change the order of summation: tiles along a summed axis (SUMMED) may depend on the types
# and on the sizes in UNSPLIT only.
SIZES = {
    "project": ("rank",),
    "projected_gradients": ("rank",),
    "one_sided_gradients": ("rank",),
    "per_sample_gradients": ("rank",),
    "scores": ("queries",),
    "topk_scores": ("queries",),
    "whole_scores": ("queries",),
    "topk_whole_scores": ("queries",),
}
UNSPLIT = ("rank",)
SUMMED = ("CHUNK", "BLOCK", "WIDTH", "DIM")
OPTIONS = ("num_warps", "num_stages")
# The beginning of an architecture's name -> the architecture whose rules it uses: one with the same
# matrix units and no more shared memory.
FAMILIES = {"sm_9": "sm_90", "sm_10": "sm_100", "sm_11": "sm_100", "gfx9": "gfx942"}


def choose(op: str, types: str, architecture: str, **sizes: int) -> dict[str, int]:
    """The configuration of an op for these types and sizes."""
    return dict(_choose(op, types, architecture, tuple(sizes.items())))


@cache
def _choose(
    op: str, types: str, architecture: str, sizes: tuple[tuple[str, int], ...]
) -> dict[str, int]:
    for rule in rules_of(table()[op], architecture):
        if rule.get("types", types) == types and all(
            size <= rule.get("up_to", {}).get(name, size) for name, size in sizes
        ):
            config: dict[str, int] = rule["config"]
            return config
    raise LookupError(f"heuristics.json: {op} has no rule for {types} on {architecture}")


def rules_of(of_op: dict[str, Rules], architecture: str) -> Rules:
    """An op's rules that hold on an architecture."""
    families = [name for start, name in FAMILIES.items() if architecture.startswith(start)]
    return next(of_op[name] for name in (architecture, *families, "default") if name in of_op)


@cache
def table() -> Table:
    """The contents of heuristics.json."""
    found: Table = json.loads(PATH.read_text())
    return found


def dumps(rules: Table) -> str:
    """The text of the table's file, with one rule a line."""
    ops = []
    for op, by_architecture in rules.items():
        parts = [
            f"    {json.dumps(architecture)}: [\n"
            + ",\n".join(f"      {json.dumps(rule)}" for rule in some)
            + "\n    ]"
            for architecture, some in by_architecture.items()
        ]
        ops.append(f"  {json.dumps(op)}: {{\n" + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(ops) + "\n}\n"


def problems(rules: Table) -> list[str]:
    """What is wrong with a table; an empty list if nothing is."""
    found = [f"{op}: no rules" for op in TILES if op not in rules]
    for op, by_architecture in rules.items():
        if op not in TILES:
            found.append(f"{op}: not an op")
            continue
        if "default" not in by_architecture:
            found.append(f"{op}: no rules for the default")
        for architecture, some in by_architecture.items():
            found += [f"{op}, {architecture}: {problem}" for problem in _problems(op, some)]
    return found


def _problems(op: str, rules: Rules) -> Iterator[str]:
    wanted = {*TILES[op], *OPTIONS}
    for rule in rules:
        config, up_to = rule.get("config", {}), rule.get("up_to", {})
        if not set(rule) <= {"types", "up_to", "config"} or rule.get("types", "half") not in TYPES:
            yield f"expected types of {', '.join(TYPES)}, up_to and config, got {rule}"
        if set(config) != wanted:
            yield f"expected {', '.join(sorted(wanted))} in config, got {', '.join(sorted(config))}"
        if not set(up_to) <= set(SIZES.get(op, ())):
            yield f"its rules know the sizes {', '.join(SIZES.get(op, ()))}, got {', '.join(up_to)}"
        for name, value in config.items():
            if name != "num_stages" and (value < 1 or value & (value - 1)):
                yield f"{name}: expected a power of two, got {value}"
    for types in TYPES:
        mine = [rule for rule in rules if rule.get("types", types) == types]
        if mine and mine[-1].get("up_to"):
            yield f"no rule for every size of {types}"
        yield from _order_problems(types, mine)
        if "CHUNK" in wanted and any(r["config"]["CHUNK"] % r["config"]["BLOCK"] for r in mine):
            yield f"CHUNK of {types}: expected a multiple of BLOCK"
    if not any("types" not in rule for rule in rules):
        missing = set(TYPES) - {rule["types"] for rule in rules}
        if missing:
            yield f"no rule for {', '.join(sorted(missing))}"


def _order_problems(types: str, rules: Rules) -> Iterator[str]:
    """The halves of a batch that is split in two must be summed in the order of the whole."""
    for name in SUMMED:
        seen: dict[Any, set[int]] = {}
        for rule in rules:
            if name in rule["config"]:
                fixed = {k: v for k, v in rule.get("up_to", {}).items() if k in UNSPLIT}
                seen.setdefault(tuple(sorted(fixed.items())), set()).add(rule["config"][name])
        if any(len(values) > 1 for values in seen.values()):
            yield f"{name} of {types} would depend on a size that a split into calls changes"
