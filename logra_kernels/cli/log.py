"""`logra log`: a corpus's gradients into a store."""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from logra_kernels.attribution.memory import peak_bytes
from logra_kernels.cli.kept_plan import check_plan, keep_plan, read_plan
from logra_kernels.defaults import CURVATURE, NO_CURVATURE, RANK, SEED
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.chat import has_template
from logra_kernels.lm.corpus import Corpus, TokenSettings
from logra_kernels.lm.gradients import LMGradients, lm_fingerprint
from logra_kernels.lm.log import LoggingProgress, log_corpus
from logra_kernels.lm.pilot import pilot_corpus
from logra_kernels.lm.sources import STANDARD_INPUT
from logra_kernels.projection import PILOTED, ProjectionSpec
from logra_kernels.report.console import say, warn
from logra_kernels.report.render import format_bytes
from logra_kernels.run import MOMENTS, check_curvature
from logra_kernels.store import Store, StoreMismatchError, row_codec
from logra_kernels.store.manifest import first_difference


def run(arguments: argparse.Namespace) -> int:
    """Log, or go on logging; 130 when interrupted."""
    _refuse_existing_store(arguments)
    complete_row_options(arguments)
    check_labels(arguments)
    plan = read_plan(arguments.plan, arguments.codec) if arguments.plan else None
    store = _store_to_resume(arguments)
    lm = CausalLM.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    corpus = open_corpus(arguments, lm)
    seconds: dict[str, float] = {}
    with _timed(seconds, "pilot"):
        gradients = project_layers(arguments, lm, corpus, store)
    with _timed(seconds, "logging"), _signals() as received:
        options = logging_options(arguments, corpus)
        if plan is not None:
            check_plan(plan, what_is_asked(arguments, gradients, options))
        finished = _log(arguments, gradients, corpus, options, lambda: bool(received))
    if finished is None:
        _say_how_to_go_on(arguments)
        return 128 + received[0]
    _say_what_was_logged(arguments, finished, corpus, seconds["logging"])
    if plan is not None:
        # Of a run that was interrupted only the last part's time is known.
        known = {} if finished.resumed or store is not None else seconds
        measured = {"seconds": known, "memory_bytes": {"logging": peak_bytes()}}
        keep_plan(Path(arguments.out), plan, measured)
    return 0


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds that the block takes under the name."""
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def _refuse_existing_store(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.data == STANDARD_INPUT:
        raise ValueError("resume: standard input cannot be read again; log from a file")
    if Path(arguments.data).resolve() in Path(arguments.out).resolve().parents:
        raise ValueError(
            f"out: {arguments.out}: expected a folder outside --data {arguments.data}, whose files"
            " would be taken for data"
        )
    if (Path(arguments.out) / "manifest.json").exists() and not arguments.resume:
        raise ValueError(
            f"out: {arguments.out}: there is a store already; --resume goes on with it"
        )


def complete_row_options(arguments: argparse.Namespace) -> None:
    """Give --rank, --seed and --curvature their defaults; refuse what does not go with --init.

    Raises:
        ValueError: names the option.
    """
    init, piloted, eigen = arguments.init, arguments.init in PILOTED, arguments.init == "eigen"
    goes = {"rank": not eigen, "coordinates": eigen, "seed": not piloted}
    goes |= {"pilot": piloted, "moments": piloted}
    for option, fits in goes.items():
        if getattr(arguments, option) is not None and not fits:
            raise ValueError(f"{option}: does not go with --init {init}")
    if eigen and arguments.coordinates is None:
        raise ValueError("coordinates: expected a number with --init eigen, got none")
    if piloted and arguments.data == STANDARD_INPUT:
        raise ValueError(
            f"init: '{init}' is made from the data before they are logged, and standard input can"
            " be read once; take a file, or another --init"
        )
    if arguments.curvature is None:
        arguments.curvature = "diagonal" if eigen else CURVATURE
    if arguments.curvature != NO_CURVATURE:
        check_curvature(arguments.curvature, chosen=eigen)
    if not eigen and arguments.rank is None:
        arguments.rank = RANK
    if not piloted and arguments.seed is None:
        arguments.seed = SEED
    if piloted and arguments.moments is None:
        arguments.moments = MOMENTS[0]


def check_labels(arguments: argparse.Namespace) -> None:
    """Refuse sampled labels without a curvature, and of data that cannot be read again."""
    if arguments.labels == "data":
        return
    if arguments.curvature == NO_CURVATURE:
        raise ValueError("labels: 'sampled' is of a curvature; --curvature none has none")
    if arguments.data == STANDARD_INPUT:
        raise ValueError(
            "labels: 'sampled' reads the data again, and standard input can be read once; take a"
            " file"
        )


def _store_to_resume(arguments: argparse.Namespace) -> Store | None:
    """The store whose projection is taken, since its pilot has run; None if there is none."""
    if arguments.init not in PILOTED or not (Path(arguments.out) / "manifest.json").exists():
        return None
    store = Store.open(arguments.out)
    told: dict[str, Any] = {"kind": arguments.init}
    if arguments.coordinates is not None:
        told["coordinates"] = arguments.coordinates
    else:
        told["rank"] = [arguments.rank, arguments.rank]
    told["moments"] = arguments.moments
    held: dict[str, Any] = {"moments": MOMENTS[0]}
    held |= store.projection if isinstance(store.projection, dict) else {}
    found = first_difference({key: held.get(key) for key in told}, told, "projection")
    if found is not None:
        raise StoreMismatchError(f"{store.path}: cannot resume: {found}")
    return store


def open_corpus(arguments: argparse.Namespace, lm: CausalLM) -> Corpus:
    """The examples of --data, as the model's tokenizer and the options cut them."""
    corpus = Corpus(
        arguments.data,
        lm.tokenizer,
        TokenSettings(arguments.max_tokens, arguments.long, arguments.stride),
        kind=arguments.format,
        text_field=arguments.text_field,
        prompt_field=arguments.prompt_field,
        title_field=arguments.title_field,
        id_field=arguments.id_field,
        messages_field=arguments.messages_field,
        chat_loss=arguments.chat_loss,
        documents=arguments.documents,
        limit=arguments.limit,
    )
    if corpus.messages_field is not None:
        how = "by the model's chat template" if has_template(lm.tokenizer) else 'as "User: …"'
        who = "the assistant's" if arguments.chat_loss == "assistant" else "all"
        warn(f"conversations of {corpus.messages_field!r}, {how}; the loss is on {who} tokens")
    return corpus


def run_pilot(arguments: argparse.Namespace, gradients: LMGradients, corpus: Corpus) -> None:
    """Make the projection from a part of the corpus, under a bar."""
    pilot_corpus(gradients, corpus, arguments.init, **pilot_options(arguments), progress=True)


def project_layers(
    arguments: argparse.Namespace,
    lm: CausalLM,
    corpus: Corpus,
    store: Store | None = None,
    pilot: Callable[[argparse.Namespace, LMGradients, Corpus], None] = run_pilot,
) -> LMGradients:
    """The layers of --modules, projected; says on stderr which they are.

    Args:
        arguments: of `logra log` or `logra doctor`.
        lm: the model.
        corpus: what a pilot is made of.
        store: of a pilot that has run, its projection is taken.
        pilot: gives the layers a projection from the corpus.
    """
    names = lm.linear_modules(
        arguments.modules, arguments.last_blocks, note=lambda sentence: warn(f"note: {sentence}")
    )
    if arguments.init in PILOTED:
        gradients = LMGradients(lm, names, store)
        if store is None:
            pilot(arguments, gradients, corpus)
    else:
        projection = ProjectionSpec(arguments.init, arguments.rank, arguments.seed)
        gradients = LMGradients(lm, names, projection)
    row_bytes = row_codec(arguments.codec).row_bytes(gradients.watched.layout)
    warn(
        f"{lm.name}: {len(names)} layers, {names[0]} … {names[-1]};"
        f" {gradients.dim:,} numbers, {format_bytes(row_bytes)} a row"
    )
    for line in str(gradients.watched.coverage).splitlines():
        say(line, sys.stderr)
    return gradients


def pilot_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `pilot_corpus` is told besides the kind."""
    running = ("batch_tokens", "batch_size", "on_nonfinite")  # `logra doctor` has none of them
    told = ("rank", "coordinates", "moments", *(name for name in running if name in arguments))
    return {"size": arguments.pilot, **{name: getattr(arguments, name) for name in told}}


def logging_options(arguments: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """What `log_corpus` is told of the corpus, of what is kept and of how it runs."""
    data = corpus.fingerprint()
    if arguments.pilot is not None:
        data["pilot"] = arguments.pilot  # refuses to resume with another
    told = ("shard_rows", "batch_tokens", "batch_size", "curvature", "labels", "on_nonfinite")
    options = {name: getattr(arguments, name) for name in told}
    return {"settings": corpus.settings.as_dict(), "data": data, **options}


def what_is_asked(
    arguments: argparse.Namespace, gradients: LMGradients, options: dict[str, Any]
) -> dict[str, Any]:
    """What tells a run from those that another plan is of, as JSON values.

    Args:
        arguments: of `logra log` or `logra plan`, completed.
        gradients: the model and its watched modules.
        options: of `logging_options`.
    """
    told = ("init", "rank", "coordinates", "seed", "moments", "device", "limit")
    found = {name: getattr(arguments, name) for name in told}
    found |= {"model": lm_fingerprint(gradients.lm), "layers": gradients.watched.layout.names}
    return {**found, **options}


def _log(
    arguments: argparse.Namespace,
    gradients: LMGradients,
    corpus: Corpus,
    options: dict[str, Any],
    stop: Callable[[], bool],
) -> LoggingProgress | None:
    """Log the corpus under a bar; None if `stop` ended it."""
    with tqdm(unit="ex", desc="log", smoothing=0, dynamic_ncols=True) as bar:
        return log_corpus(
            gradients,
            corpus,
            arguments.out,
            store_dtype=arguments.codec,
            resume=arguments.resume,
            stop=stop,
            report=_shown_by(bar),
            **options,
        )


def _shown_by(bar: "tqdm[Any]") -> Callable[[LoggingProgress], None]:
    started = time.monotonic()

    def show(progress: LoggingProgress) -> None:
        if progress.sampled_pass:
            bar.set_description(f"sample {progress.sampled_pass}", refresh=False)
        bar.total = progress.total
        bar.initial = progress.resumed
        seconds = max(time.monotonic() - started, 1e-9)
        bar.set_postfix_str(f"{progress.tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.update(progress.examples - bar.n)

    return show


def _say_how_to_go_on(arguments: argparse.Namespace) -> None:
    if arguments.data == STANDARD_INPUT:
        warn(
            "logra log: interrupted; what is finished is in the store. Standard input cannot be"
            " read again: to be able to go on, log from a file"
        )
        return
    again = [word for word in arguments.command_line if word != "--resume"]
    warn(
        "logra log: interrupted; what is finished is in the store. Go on with\n\n"
        f"{shlex.join(['logra', *again, '--resume'])}"
    )


def _say_what_was_logged(
    arguments: argparse.Namespace, finished: LoggingProgress, corpus: Corpus, seconds: float
) -> None:
    new = finished.examples - finished.resumed - finished.nonfinite
    say(
        f"{arguments.out}: {new:,} examples logged in {seconds:.0f} s"
        f" ({finished.tokens / max(seconds, 1e-9):,.0f} tokens/s)"
    )
    for count, what in (
        (finished.resumed, "were in the store already"),
        (finished.nonfinite, "left out: their gradients are not finite"),
        (corpus.num_truncated, f"cut to {arguments.max_tokens} tokens"),
        (corpus.num_skipped, "records left out: no token to predict"),
        (corpus.data.num_ignored, "files of other kinds in the folder"),
    ):
        if count:
            say(f"  {count:,} {what}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the batch at work is finished first.

    A second signal of the kind acts as it usually does.
    """
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])
        tqdm.write("finishing this batch, then stopping; again to stop now", file=sys.stderr)

    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, take)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
