"""`logra log`: a corpus's gradients into a store."""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from logra_kernels.report.render import format_bytes


def run(arguments: argparse.Namespace) -> int:
    """Log, or go on logging; 130 when interrupted."""
    from logra_kernels.lm.causal_lm import CausalLM
    from logra_kernels.lm.corpus import Corpus, TokenSettings
    from logra_kernels.lm.gradients import LMGradients
    from logra_kernels.lm.log import Progress, data_fingerprint, log_corpus
    from logra_kernels.run.config import Config

    if (Path(arguments.out) / "manifest.json").exists() and not arguments.resume:
        raise ValueError(
            f"out: {arguments.out}: there is a store already; --resume goes on with it"
        )
    settings = TokenSettings(arguments.max_tokens, arguments.long, arguments.stride)
    lm = CausalLM.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    corpus = Corpus(
        arguments.data,
        lm.tokenizer,
        settings,
        text_field=arguments.text_field,
        prompt_field=arguments.prompt_field,
        title_field=arguments.title_field,
        id_field=arguments.id_field,
        limit=arguments.limit,
    )
    names = lm.linear_modules(arguments.modules or ["mlp"], arguments.last_blocks)
    projection = Config(rank=arguments.rank, init=arguments.init, seed=arguments.seed)
    gradients = LMGradients(lm, names, projection)
    bytes_per_row = gradients.dim * (2 if arguments.store_dtype == "float16" else 4)
    print(
        f"{lm.name}: {len(names)} layers, {names[0]} … {names[-1]};"
        f" {gradients.dim:,} numbers, {format_bytes(bytes_per_row)} a row",
        file=sys.stderr,
    )

    started = time.monotonic()
    with (
        tqdm(unit="ex", desc="log", smoothing=0, dynamic_ncols=True) as bar,
        _signals() as received,
    ):

        def show(progress: Progress) -> None:
            bar.total = progress.total
            bar.initial = progress.resumed
            seconds = max(time.monotonic() - started, 1e-9)
            bar.set_postfix_str(f"{progress.tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(progress.examples - bar.n)

        finished = log_corpus(
            gradients,
            corpus,
            arguments.out,
            settings=settings.as_dict(),
            data=data_fingerprint(corpus),
            store_dtype=arguments.store_dtype,
            shard_rows=arguments.shard_rows,
            batch_tokens=arguments.batch_tokens,
            batch_size=arguments.batch_size,
            curvature=arguments.curvature,
            on_nonfinite=arguments.on_nonfinite,
            resume=arguments.resume,
            stop=lambda: bool(received),
            report=show,
        )
    if finished is None:
        again = [word for word in arguments.command_line if word != "--resume"]
        print(
            "logra log: interrupted; what is finished is in the store. Go on with\n\n"
            f"  {shlex.join(['logra', *again, '--resume'])}\n",
            file=sys.stderr,
        )
        return 128 + received[0]
    seconds = time.monotonic() - started
    new = finished.examples - finished.resumed - finished.nonfinite
    print(
        f"{arguments.out}: {new:,} examples logged in {seconds:.0f} s"
        f" ({finished.tokens / max(seconds, 1e-9):,.0f} tokens/s)"
    )
    for count, what in (
        (finished.resumed, "were in the store already"),
        (finished.nonfinite, "left out: their gradients are not finite"),
        (corpus.num_truncated, f"cut to {arguments.max_tokens} tokens"),
        (corpus.num_skipped, "records left out: fewer than two tokens"),
    ):
        if count:
            print(f"  {count:,} {what}")
    return 0


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
