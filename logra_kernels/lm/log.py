"""Logging a corpus: every example's row of a language model's gradients, into a store."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from logra_kernels.lm.corpus import WINDOW_EXAMPLES, Corpus, Example, batches
from logra_kernels.lm.gradients import LMGradients, lm_fingerprint
from logra_kernels.run.recorder import Recorder
from logra_kernels.run.statistic import Setup
from logra_kernels.store import StoreError

CURVATURES = ("raw", "none")
ON_NONFINITE = ("raise", "skip")


@dataclass
class Progress:
    """How far the logging is; `total` is an estimate until the corpus has been read."""

    examples: int = 0
    tokens: int = 0
    resumed: int = 0
    nonfinite: int = 0
    total: int | None = None


def log_corpus(
    gradients: LMGradients,
    corpus: Corpus | Iterable[Example],
    path: str | os.PathLike[str],
    *,
    settings: dict[str, Any],
    data: dict[str, Any],
    store_dtype: str = "float16",
    shard_rows: int | None = None,
    batch_tokens: int = 1024,
    batch_size: int | None = None,
    window: int = WINDOW_EXAMPLES,
    curvature: str = "raw",
    on_nonfinite: str = "raise",
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress | None:
    """Log every example that the store does not hold yet, and finalize the store.

    Args:
        gradients: the model and its watched modules.
        corpus: what is to be logged.
        path: the store's folder.
        settings, data: how the text became tokens, and which text; kept in the store.
        store_dtype: "float16" or "float32".
        shard_rows: rows of a full shard; None leaves it to the store.
        batch_tokens, batch_size: the largest batch, in tokens with padding and in examples.
        window: examples among which batches of similar length are formed.
        curvature: "raw" (kept while logging, saved at the end) or "none".
        on_nonfinite: "raise", or "skip" examples whose gradient is NaN or infinite.
        resume: go on with the store at `path`, if there is one.
        stop: asked after each batch; True commits what there is and returns.
        report: told after each batch.
    Returns:
        the final progress, or None if `stop` ended it before the corpus did.
    Raises:
        ValueError: a gradient that is not finite, with the module and the ids; an unknown option.
        StoreError: the store exists (and `resume` is false), is another run's, or cannot be
            written.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"curvature: expected one of {', '.join(CURVATURES)}, got {curvature!r}")
    if on_nonfinite not in ON_NONFINITE:
        allowed = ", ".join(ON_NONFINITE)
        raise ValueError(f"on_nonfinite: expected one of {allowed}, got {on_nonfinite!r}")
    progress = Progress()
    planned = batches(
        _tracked(corpus, progress),
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        window=window,
    )
    # Text that cannot be read fails here, before there is a store.
    first = next(planned, None)
    if first is None:
        raise ValueError("corpus: expected at least one example, got none")
    setup = Setup(save=True, covariance=curvature == "raw")
    row_bytes = gradients.dim * np.dtype(store_dtype).itemsize
    recorder = Recorder(
        Path(path),
        gradients.layers,
        gradients.projection,
        {
            "kind": "causal-lm",
            "weights": gradients.lm.fingerprint["weights"],
            "model": lm_fingerprint(gradients.lm),
            "tokens": settings,
            "data": data,
        },
        dtype=store_dtype,
        shard_bytes=None if shard_rows is None else shard_rows * row_bytes,
        resume=resume,
        setup=setup,
    )
    try:
        for batch in itertools.chain([first], planned):
            examples = [example for example in batch if example.id not in recorder.ids]
            progress.examples += len(batch)
            progress.resumed += len(batch) - len(examples)
            if examples:
                rows, examples = _finite_rows(gradients, examples, on_nonfinite, progress)
            if examples:
                ids = [example.id for example in examples]
                recorder.check(ids, setup)
                recorder.add(ids, rows, [example.metadata() for example in examples], setup)
                progress.tokens += sum(len(example.tokens) for example in examples)
            report(progress)
            if stop():
                recorder.suspend()
                return None
    except BaseException:
        # What was logged stays; if the disk is what failed, its error is the one to show.
        with contextlib.suppress(StoreError):
            recorder.suspend()
        raise
    recorder.finish()
    return progress


def _tracked(corpus: Corpus | Iterable[Example], progress: Progress) -> Iterable[Example]:
    """The examples; keeps the estimate of their number up to date."""
    for number, example in enumerate(corpus, 1):
        if isinstance(corpus, Corpus):
            progress.total = max(number, round(number / max(corpus.fraction_read, 1e-9)))
        elif isinstance(corpus, Sized):
            progress.total = len(corpus)
        yield example


def _finite_rows(
    gradients: LMGradients, examples: list[Example], on_nonfinite: str, progress: Progress
) -> tuple[Tensor, list[Example]]:
    rows = gradients.rows(examples)  # [N, D]
    finite = rows.isfinite().all(dim=1)
    if finite.all():
        return rows, examples
    bad = [example.id for example, good in zip(examples, finite.tolist(), strict=True) if not good]
    if on_nonfinite == "raise":
        blocks = rows.split([module.size for module in gradients.modules], dim=1)
        first = next(
            module.name
            for module, block in zip(gradients.modules, blocks, strict=True)
            if not block.isfinite().all()
        )
        raise ValueError(
            f"module {first}: expected finite gradients, got NaN or infinity for the ids"
            f" {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}; 'skip' leaves such examples out"
        )
    progress.nonfinite += len(bad)
    kept = [example for example, good in zip(examples, finite.tolist(), strict=True) if good]
    return rows[finite], kept


def data_fingerprint(corpus: Corpus) -> dict[str, Any]:
    """Which text a store is of: the file's name and SHA-256, and the fields that were read."""
    digest = hashlib.sha256()
    with corpus.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    fields = {} if corpus.path.suffix == ".txt" else corpus.fields
    return {"file": corpus.path.name, "sha256": digest.hexdigest(), "fields": fields}
