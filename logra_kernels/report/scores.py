"""Scores as a table, .csv or .parquet, written block by block.

Columns: query, mode, row, id, score; after the mode damping_scale, a text, where several were asked
for; for ranked rows also end (top or bottom) and rank, from 1.
"""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from logra_kernels.report.render import scale_of
from logra_kernels.report.results import whole_file

TABLES = (".parquet", ".csv")
Columns = Mapping[str, Sequence[Any]]  # of equal lengths


def check_table(path: str | os.PathLike[str]) -> None:
    """Refuse a file of another kind, or one that cannot be written here.

    Raises:
        ValueError: its name ends otherwise.
        ImportError: pyarrow is built without Parquet.
    """
    if Path(path).suffix not in TABLES:
        raise ValueError(f"scores: expected a file ending in {' or '.join(TABLES)}, got {path}")
    if Path(path).suffix == ".parquet":
        _parquet()


@contextmanager
def score_table(path: str | os.PathLike[str]) -> Iterator[Callable[[Columns], None]]:
    """A function that appends columns to a new table, which is in place when the context ends.

    Raises:
        ValueError, ImportError: as `check_table`.
    """
    check_table(path)
    write = _csv_table if Path(path).suffix == ".csv" else _parquet_table
    with write(path) as add:
        yield add


def write_ranked_scores(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the passages that results rank as a table.

    Raises:
        ValueError, ImportError: as `check_table`.
    """
    several = any(scale_of(mode) for query in results["queries"] for mode in query["modes"])
    with score_table(path) as add:
        for query in results["queries"]:
            for mode in query["modes"]:
                scale = {"damping_scale": scale_of(mode) or ""} if several else {}
                for end in ("top", "bottom"):
                    passages = mode[end]
                    count = len(passages)
                    add(
                        {
                            "query": [query["id"]] * count,
                            "mode": [mode["mode"]] * count,
                            **{column: [value] * count for column, value in scale.items()},
                            "row": [passage.get("row") for passage in passages],
                            "id": [passage["id"] for passage in passages],
                            "score": [passage["score"] for passage in passages],
                            "end": [end] * count,
                            "rank": [passage["rank"] for passage in passages],
                        }
                    )


@contextmanager
def _csv_table(path: str | os.PathLike[str]) -> Iterator[Callable[[Columns], None]]:
    with whole_file(path, encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        header: list[str] = []

        def add(columns: Columns) -> None:
            if not header:
                header.extend(columns)
                writer.writerow(header)
            # Nine digits tell any two float32 apart.
            shown = {**columns, "score": [f"{score:.9g}" for score in columns["score"]]}
            writer.writerows(zip(*shown.values(), strict=True))

        yield add


@contextmanager
def _parquet_table(path: str | os.PathLike[str]) -> Iterator[Callable[[Columns], None]]:
    pyarrow, parquet = _parquet()
    types = {"row": pyarrow.int64(), "score": pyarrow.float32(), "rank": pyarrow.int32()}
    with whole_file(path, mode="xb") as file:
        writer: list[Any] = []

        def add(columns: Columns) -> None:
            schema = pyarrow.schema([(n, types.get(n, pyarrow.string())) for n in columns])
            if not writer:
                writer.append(parquet.ParquetWriter(file, schema))
            writer[0].write_table(pyarrow.table(dict(columns), schema=schema))

        try:
            yield add
        finally:
            for each in writer:
                each.close()


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            "scores: this pyarrow cannot write Parquet; install the whole of it, or name a .csv"
            " file"
        ) from error
    return pyarrow, parquet
