"""bench/results/<name>.jsonl: one JSON object a line, each with its date and its machine.

A record of the ops' benchmarks (bench.harness.cases) is one case:

    {"date", "machine", "load", "bench", "case", "params", "limits",
     "providers": [{"provider", "median_ms", …}, …], "left_out": {provider: why}}

Other benchmarks choose their own fields beside "date", "machine" and "load". A file grows with
every run; `latest` gives the newest record of each case.
"""

import json
import math
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.harness.machine import machine

RESULTS = Path(__file__).parents[1] / "results"


def append(name: str, record: dict[str, Any], folder: Path = RESULTS) -> None:
    """Add a line to <name>.jsonl; a NaN or an infinity is a ValueError, for JSON has neither."""
    full = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "load": round(os.getloadavg()[0], 2),
        **record,
    }
    line = json.dumps(_short(full), allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every record of <name>.jsonl, oldest first; [] where there is no such file."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict) or not {"date", "machine"} <= set(record):
            raise ValueError(f"{path.name}:{number}: expected an object with date and machine")
        records.append(record)
    return records


def latest(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The newest record of each case, in the order in which the cases first came."""
    newest: dict[str, dict[str, Any]] = {}
    for record in read(name, folder):
        newest[str(record.get("case"))] = record
    return list(newest.values())


def median_ms(record: dict[str, Any], provider: str) -> float | None:
    """A provider's median in a record of the harness; None if it is not there."""
    for row in record["providers"]:
        if row["provider"] == provider:
            return float(row["median_ms"])
    return None


def rates(record: dict[str, Any]) -> dict[str, float]:
    """Pairs or tokens a second of each provider in a record of the peers' benchmark."""
    counts = record["params"]["count"]
    return {
        row["provider"]: counts[row["provider"]] / row["median_ms"] * 1e3
        for row in record["providers"]
    }


def _short(value: Any) -> Any:
    """Floats to five digits: the sixth is noise."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return value
