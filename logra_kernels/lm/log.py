"""Logging a corpus: every example's row of a language model's gradients, into a store."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from logra_kernels.curvature import Labels, curvature_kind
from logra_kernels.defaults import CURVATURE, NO_CURVATURE, STORE_DTYPE
from logra_kernels.lm.corpus import WINDOW_EXAMPLES, Corpus, Example, batches
from logra_kernels.lm.gradients import LMGradients, lm_fingerprint
from logra_kernels.run import FinitePolicy, LoggedRows, Recorder, Setup
from logra_kernels.store import StoreError


@dataclass
class LoggingProgress:
    """How far the logging is.

    examples: read from the corpus so far; `resumed` of them were in the store already, and
    `nonfinite` were left out. tokens: of the examples that were logged now. total: an estimate of
    the corpus's examples until it has been read; None where there is none. In the passes over
    sampled labels, `sampled_pass` is their number, from 1, and `examples` are the pass's.
    """

    examples: int = 0
    tokens: int = 0
    resumed: int = 0
    nonfinite: int = 0
    total: int | None = None
    sampled_pass: int = 0


def log_corpus(
    gradients: LMGradients,
    corpus: Corpus | Iterable[Example],
    path: str | os.PathLike[str],
    *,
    settings: dict[str, Any],
    data: dict[str, Any],
    store_dtype: str = STORE_DTYPE,
    shard_rows: int | None = None,
    batch_tokens: int = 1024,
    batch_size: int | None = None,
    window: int = WINDOW_EXAMPLES,
    curvature: str = CURVATURE,
    labels: Labels = "data",
    on_nonfinite: str = "raise",
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[LoggingProgress], None] = lambda progress: None,
) -> LoggingProgress | None:
    """Log every example that the store does not hold yet, and finalize the store.

    Args:
        gradients: the model and its watched modules.
        corpus: what is to be logged.
        path: the store's folder.
        settings, data: how the text became tokens, and which text; kept in the store.
        store_dtype: the row codec, such as "float16".
        shard_rows: rows of a full shard; None leaves it to the store.
        batch_tokens, batch_size: the largest batch, in tokens with padding and in examples.
        window: examples among which batches of similar length are formed.
        curvature: the kind that is kept while logging and saved at the end, or "none".
        labels: "sampled" makes the curvature of next tokens that the model draws, in one more pass
            over the corpus, or two for a kind that corrects its eigenvalues; "data" of the text's.
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
    kind = None if curvature == NO_CURVATURE else curvature_kind(curvature).kind
    setup = Setup(save=True, curvature=kind, labels=labels)
    finite = FinitePolicy(on_nonfinite)
    progress = LoggingProgress()

    cut = partial(batches, batch_tokens=batch_tokens, batch_size=batch_size, window=window)
    planned = _first_read(cut(_counted(corpus, progress)))
    recorder = Recorder(
        Path(path),
        gradients.watched,
        _fingerprints(gradients, settings, data),
        setup,
        dtype=store_dtype,
        shard_rows=shard_rows,
        resume=resume,
    )
    with _suspended_by_an_error(recorder):
        for batch in planned:
            _log_batch(batch, gradients, finite, recorder, setup, progress)
            report(progress)
            if stop():
                recorder.suspend()
                return None
        if kind is not None and recorder.lacks_sampled:
            finite = FinitePolicy(on_nonfinite)
            shown = LoggingProgress(total=progress.examples)
            for number in recorder.curvature_passes(kind, "sampled"):
                shown.sampled_pass, shown.examples = number + 1, 0
                for batch in cut(corpus):
                    keep = recorder.keeps_tokens
                    recorder.add_to_curvature(_passed(batch, gradients, finite, keep, sampled=True))
                    shown.examples += len(batch)
                    report(shown)
                    if stop():
                        recorder.suspend()
                        return None
    recorder.finish()
    return progress


def _counted(corpus: Corpus | Iterable[Example], progress: LoggingProgress) -> Iterator[Example]:
    """The corpus's examples; keeps the estimate of their number up to date."""
    for number, example in enumerate(corpus, 1):
        if isinstance(corpus, Corpus):
            read = corpus.fraction_read
            progress.total = max(number, round(number / read)) if read else None
        elif isinstance(corpus, Sized):
            progress.total = len(corpus)
        yield example


def _first_read(planned: Iterator[list[Example]]) -> Iterator[list[Example]]:
    """The same batches, the first of them read now: bad text fails before there is a store."""
    first = next(planned, None)
    if first is None:
        raise ValueError("corpus: expected at least one example, got none")
    return itertools.chain([first], planned)


def _fingerprints(
    gradients: LMGradients, settings: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """What the store keeps of the model, the tokens and the text."""
    return {
        "kind": "causal-lm",
        "weights": gradients.lm.fingerprint["weights"],
        "model": lm_fingerprint(gradients.lm),
        "tokens": settings,
        "data": data,
    }


@contextlib.contextmanager
def _suspended_by_an_error(recorder: Recorder) -> Iterator[None]:
    """An error keeps the rows logged so far; if the disk failed, its error is the one to show."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StoreError):
            recorder.suspend()
        raise


def _log_batch(
    batch: Sequence[Example],
    gradients: LMGradients,
    finite: FinitePolicy,
    recorder: Recorder,
    setup: Setup,
    progress: LoggingProgress,
) -> None:
    """Log the examples of one batch that the store does not hold yet."""
    new = [example for example in batch if example.id not in recorder.ids]
    progress.examples += len(batch)
    progress.resumed += len(batch) - len(new)
    if not new:
        return
    kept = _passed(new, gradients, finite, bool(setup.of_tokens))
    recorder.add(kept, setup)
    progress.nonfinite = len(finite.skipped)
    lengths = {example.id: len(example.tokens) for example in new}
    progress.tokens += sum(lengths[name] for name in kept.ids)


def _passed(
    batch: Sequence[Example],
    gradients: LMGradients,
    finite: FinitePolicy,
    keep_tokens: bool,
    sampled: bool = False,
) -> LoggedRows:
    """Run one batch, and give the rows that are finite; of `sampled` next tokens or the text's."""
    capture = gradients.passed(batch, sampled=sampled, keep_tokens=keep_tokens)
    logged = LoggedRows(
        [example.id for example in batch],
        capture.rows().float().cpu(),
        [example.metadata() for example in batch],
        capture.tokens,
        range(len(batch)),
    )
    return finite.check(logged, gradients.watched.layout)
