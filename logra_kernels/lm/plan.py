"""What logging a corpus will take, in bytes and seconds, by a short calibration.

The corpus is read whole, so that what follows from its examples is exact. A few of its batches are
logged into a temporary store by the very function that logs, and that store is asked; the times are
extrapolated from there.
"""

import contextlib
import os
import statistics
import tempfile
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from logra_kernels.attribution import Attributor
from logra_kernels.attribution.memory import (
    SHARE_FOR_ROWS,
    available_bytes,
    forget_peak,
    peak_bytes,
)
from logra_kernels.attribution.plan import PreparedQueries
from logra_kernels.curvature import Preconditioner
from logra_kernels.defaults import MATRIX_MODE, NO_CURVATURE, RANKING_MODE, STORE_DTYPE
from logra_kernels.lm.corpus import Corpus, Example, batches
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.lm.log import LoggingProgress, log_corpus
from logra_kernels.lm.pilot import pilot_corpus, pilot_size
from logra_kernels.store import Store, StoreWriter, planned_bytes
from logra_kernels.store.ids import metadata_texts
from logra_kernels.store.manifest import seal

SAMPLED_BATCHES = 64  # at least so many are kept of a corpus, if it has them, and twice at most
FEW_BATCHES = 3  # of the smaller of two stores, by whose difference a batch is timed
PILOTED_EXAMPLES = 64  # of a calibration's pilot
SCAN_BYTES = 256 << 20  # of the rows whose scan is timed: more than caches hold
SCANS = 3  # of which the median counts
TOP_K = 5
_PLAIN: dict[str, Any] = {"curvature": NO_CURVATURE, "labels": "data"}


@dataclass
class CorpusFacts:
    """What a corpus's examples are, found by reading all of them in the order of their rows.

    seconds: of reading and tokenising. id_bytes, metadata_bytes: of each row, as
    `planned_bytes` takes them. padded_tokens: of all batches, padding included. sample: evenly
    spaced batches.
    """

    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    id_bytes: "array[int]" = field(default_factory=lambda: array("q"))
    metadata_bytes: "array[int]" = field(default_factory=lambda: array("q"))
    sample: list[list[Example]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """The number of examples."""
        return len(self.id_bytes)

    @classmethod
    def of(
        cls, corpus: Iterable[Example], *, batch_tokens: int, batch_size: int | None
    ) -> "CorpusFacts":
        """Read a corpus; batches as in `log_corpus`.

        Raises:
            ValueError: there is no example.
        """
        facts, step, number = cls(), 1, 0
        cut = batches(corpus, batch_tokens=batch_tokens, batch_size=batch_size)
        started = time.perf_counter()
        while (batch := next(cut, None)) is not None:
            facts.seconds += time.perf_counter() - started
            facts._add(batch)
            if number % step == 0:
                facts.sample.append(batch)
            if len(facts.sample) > 2 * SAMPLED_BATCHES:
                facts.sample, step = facts.sample[::2], 2 * step
            number += 1
            started = time.perf_counter()
        if not facts.rows:
            raise ValueError("corpus: expected at least one example, got none")
        return facts

    def _add(self, batch: list[Example]) -> None:
        self.tokens += sum(len(example.tokens) for example in batch)
        self.padded_tokens += _padded([batch])
        texts = metadata_texts([example.metadata() for example in batch])
        self.id_bytes.extend(len(example.id.encode()) for example in batch)
        self.metadata_bytes.extend(-1 if text is None else len(text.encode()) for text in texts)


def calibrated_pilot(
    gradients: LMGradients, corpus: Corpus, facts: CorpusFacts, init: str, **options: Any
) -> float:
    """Give the watched modules a projection, of few examples; the seconds of the whole pilot.

    Of a pilot of at most 64 examples it is the very same projection.

    Args:
        gradients, corpus, init, options: as in `pilot_corpus`.
        facts: of the corpus.

    Raises:
        ValueError: as in `pilot_corpus`.
    """
    whole = pilot_size(facts.rows, options.pop("size"))
    few = min(whole, PILOTED_EXAMPLES)
    marks: list[tuple[int, float]] = []  # examples passed, and when

    def passed(done: int, total: int) -> None:
        marks.append((done, time.perf_counter()))

    started = time.perf_counter()
    pilot_corpus(gradients, corpus, init, size=few, progress=passed, **options)
    seconds = time.perf_counter() - started
    (first, since), (last, until) = marks[0], marks[-1]
    # Of a single batch nothing tells its passes from what precedes them.
    each = (until - since) / (last - first) if last > first else (until - started) / last
    return seconds + each * (whole - few)


@dataclass
class LoggingPlan:
    """Calibrates logging and queries of a corpus, one row codec after another.

    Args:
        gradients: the model and its watched modules, projected.
        facts: of the corpus.
        folder: on whose disk the temporary stores lie.
        options: of `log_corpus`, without path, store_dtype and resume.
        queries: how many are asked at once.
        watching: the seconds that it took to find the modules, as every process does once.
        seconds: that a calibration's passes may take, about.
    """

    gradients: LMGradients
    facts: CorpusFacts
    folder: Path
    options: dict[str, Any]
    queries: int
    watching: float
    seconds: float

    def of(self, store_dtype: str) -> dict[str, Any]:
        """What the store of a codec takes, as JSON values: `bytes`, `seconds`, `memory_bytes`.

        Raises:
            ValueError, StoreError: as `log_corpus`.
        """
        warmed = self._first_seconds  # before the peak begins anew
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".logra-plan-") as name:
            forget_peak()
            store, seconds = self._logged(Path(name), store_dtype)
            memory = {"logging": peak_bytes()}
            own = any("exponents" in shard for shard in store.manifest["shards"])
            sizes = planned_bytes(
                store.codec,
                store.layout,
                self.facts.id_bytes,
                self.facts.metadata_bytes,
                shard_rows=self.options["shard_rows"],
                row_exponents=own,
            )
            forget_peak()
            asked = _Asked(self, store, Path(name) / "scan", sizes["rows"])
            of_query = {"start": self.watching + warmed, **asked.seconds}
            memory["query"] = peak_bytes() - asked.mapped_bytes + asked.planned_mapped_bytes
            shards = sizes.pop("shards")
            return {
                "row_bytes": store.row_bytes,
                "shards": shards,
                "row_exponents": own,
                "reading": asked.way,
                "bytes": {**sizes, **_other_bytes(store, self.facts.rows, shards)},
                "memory_bytes": memory,
                "seconds": {
                    "logging": self.facts.seconds + warmed + seconds,
                    "first_query": sum(of_query.values()),
                    "later_query": sum(of_query.values()) - of_query["norms"],
                },
                "of_first_query": of_query,
            }

    @cached_property
    def _first_seconds(self) -> float:
        """What the first batch of a process takes more than the same batch again."""
        taken = []
        for _ in range(2):
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".logra-plan-") as name:
                started = time.perf_counter()
                plain = replace(self, options={**self.options, **_PLAIN})
                plain._log(self.facts.sample[:1], Path(name) / "first", STORE_DTYPE)
                taken.append(time.perf_counter() - started)
        return max(0.0, taken[0] - taken[1])

    def _logged(self, folder: Path, store_dtype: str) -> tuple[Store, float]:
        """The larger of two stores of a part of the corpus, and the seconds of the whole.

        Their difference tells the time of a token from what happens once, such as the curvature's
        way to the disk; of a whole that is small the larger store is all.
        """
        sample, few = self.facts.sample, _spread(self.facts.sample, FEW_BATCHES)
        started = time.perf_counter()
        marks = self._log(few, folder / "few", store_dtype)
        small = time.perf_counter() - started
        if len(sample) <= FEW_BATCHES:
            return Store.open(folder / "few"), small
        each = (marks[-1] - marks[0]) / max(1, len(marks) - 1)
        # As long as what happens once, or the noise of that would be multiplied.
        budget = max(self.seconds, small - each * len(few))
        count = max(2 * FEW_BATCHES, int(budget / max(each, 1e-9)))
        many = _spread(sample, min(len(sample), count))
        started = time.perf_counter()
        self._log(many, folder / "many", store_dtype)
        large = time.perf_counter() - started
        tokens = [self._padded_again(part) for part in (few, many)]
        slope = max(0.0, (large - small) / (tokens[1] - tokens[0]))  # seconds of a token
        seconds = large + slope * (self.facts.padded_tokens - tokens[1])
        return Store.open(folder / "many"), max(seconds, 0.0)

    def _log(self, part: list[list[Example]], path: Path, store_dtype: str) -> list[float]:
        """Log a part of the corpus; when each batch was done."""
        marks: list[float] = []

        def report(progress: LoggingProgress) -> None:
            marks.append(time.perf_counter())

        examples = [example for batch in part for example in batch]
        log_corpus(
            self.gradients, examples, path, store_dtype=store_dtype, report=report, **self.options
        )
        return marks

    def _padded_again(self, part: list[list[Example]]) -> int:
        """The tokens of the batches that `_log` makes of a part."""
        examples = [example for batch in part for example in batch]
        sizes = {name: self.options[name] for name in ("batch_tokens", "batch_size")}
        return _padded(batches(examples, **sizes))


class _Asked:
    """A query of a calibration's store, timed part by part.

    Args:
        plan: of the whole.
        store: of a part of the corpus.
        path: where rows are put whose scan is timed.
        rows_bytes: of the rows of the whole.
    """

    def __init__(self, plan: LoggingPlan, store: Store, path: Path, rows_bytes: int) -> None:
        self._curved = plan.options["curvature"] != NO_CURVATURE
        kind = None if self._curved else NO_CURVATURE
        fits = rows_bytes <= SHARE_FOR_ROWS * available_bytes()
        self.way = "mapped" if fits else "streamed"
        whole = plan.facts.rows
        examples = [batch[0] for batch in _spread(plan.facts.sample, SCANS)]
        started = time.perf_counter()
        rows = torch.cat([plan.gradients.rows([example]) for example in examples])
        gradients = (time.perf_counter() - started) / len(examples) * plan.queries
        numbers = torch.arange(plan.queries) % len(rows)
        started = time.perf_counter()
        attributor = Attributor(store, kind)
        queries = attributor.prepare(rows[numbers])  # [Q, D]
        curvature = time.perf_counter() - started
        held = _repeated(store, path, min(whole, max(1, SCAN_BYTES // store.row_bytes)))
        factors = norms = 0.0
        known = False
        if self._curved:
            started = time.perf_counter()
            attributor.preconditioner.whitenings("sigma")
            factors = time.perf_counter() - started
            taken, done = _scan(
                held, attributor.preconditioner, queries, RANKING_MODE, plan.seconds
            )
            known = done == held.num_rows
            norms = max(0.0, taken - factors) / done * whole
        if not fits:
            _evict(held)
        mode, way = RANKING_MODE if known else MATRIX_MODE, self.way
        scans = []
        for _ in range(SCANS):
            scans.append(_scan(held, attributor.preconditioner, queries, mode, None, way)[0])
        scan = statistics.median(scans) / held.num_rows * whole
        self.mapped_bytes = held.num_rows * held.row_bytes if fits else 0
        self.planned_mapped_bytes = rows_bytes if fits else 0
        self.seconds = {
            "gradients": gradients,
            "curvature": curvature,
            "norms": factors + max(0.0, norms - scan),
            "scan": scan,
        }


class _EnoughTime(Exception):
    """A scan that was timed long enough."""


def _scan(
    store: Store,
    preconditioner: Preconditioner,
    queries: PreparedQueries,
    mode: str,
    most_seconds: float | None,
    way: str = "mapped",
) -> tuple[float, int]:
    """The seconds of a scan of a store that is opened for it, and the rows that it came to."""
    started = time.perf_counter()
    reached = 0

    def progress(done: int, total: int) -> None:
        nonlocal reached
        reached = done
        late = most_seconds is not None and time.perf_counter() - started > most_seconds
        if late and done < total:
            raise _EnoughTime

    opened = Store.open(store.path)
    attributor = Attributor(opened, preconditioner, reading=way)
    with contextlib.suppress(_EnoughTime):
        attributor.top_k(queries, min(TOP_K, opened.num_rows), mode, progress=progress)
    return time.perf_counter() - started, reached


def _repeated(store: Store, path: Path, num_rows: int) -> Store:
    """A store's rows over and over, as many as asked for."""
    few = range(min(store.num_rows, num_rows, 256))
    exponents = store.module_exponents
    stored, scale, own = store.basis.encode(store.codec, store.take(few))
    with StoreWriter.create(path, modules=store.modules, dtype=store.dtype) as writer:
        if store.codec.scaled:
            writer.set_module_exponents(exponents)
        for start in range(0, num_rows, len(few)):
            ids, n = range(start, min(start + len(few), num_rows)), min(len(few), num_rows - start)
            parts = [None if part is None else part[:n] for part in (scale, own)]
            writer.append(ids, stored[:n], parts[0], None, parts[1])
    return Store.open(path)


def _evict(store: Store) -> None:
    """Drop a store's files from the page cache, where the system does so."""
    for file in store.path.glob("*.npy") if hasattr(os, "posix_fadvise") else ():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _other_bytes(store: Store, rows: int, shards: int) -> dict[str, int]:
    """What is in a store besides its rows; the manifest may differ by the digits in it."""
    manifest = store.manifest
    tensors = manifest["projection_tensors"]
    listed = {**manifest, "rows": rows, "shards": manifest["shards"][-1:] * shards}
    return {
        "curvature": sum(entry["bytes"] for entry in manifest["curvature"].values()),
        "projection": 0 if tensors is None else tensors["bytes"],
        "manifest": len(seal(listed)),
    }


def _padded(cut: Iterable[list[Example]]) -> int:
    return sum(len(batch) * max(len(example.tokens) for example in batch) for batch in cut)


def _spread(values: list[list[Example]], count: int) -> list[list[Example]]:
    """At most `count` of the values, evenly spaced, from the first on."""
    few = min(count, len(values))
    return [values[n * len(values) // few] for n in range(few)]
