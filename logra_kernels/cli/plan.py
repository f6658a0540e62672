"""`logra plan`: bytes, memory and time of logging and of queries, before anything is logged."""

import argparse
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from logra_kernels.cli.kept_plan import BYTES, FORMAT, MEMORY, SECONDS, VERSION
from logra_kernels.cli.log import (
    check_labels,
    complete_row_options,
    logging_options,
    open_corpus,
    pilot_options,
    project_layers,
    what_is_asked,
)
from logra_kernels.cli.outputs import check_outputs
from logra_kernels.curvature import curvature_kind
from logra_kernels.defaults import NO_CURVATURE, STORE_DTYPE
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Corpus
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.lm.pilot import pilot_size
from logra_kernels.lm.plan import PILOTED_EXAMPLES, CorpusFacts, LoggingPlan, calibrated_pilot
from logra_kernels.lm.sources import STANDARD_INPUT
from logra_kernels.projection import PILOTED
from logra_kernels.report.console import say, warn
from logra_kernels.report.render import format_bytes, format_seconds, plural
from logra_kernels.report.results import STANDARD_OUTPUT, write_json
from logra_kernels.store import codec_names, row_codec


def loggable(init: str) -> tuple[str, ...]:
    """The codecs that rows can be logged in: those of few bits take rows of an eigenbasis."""
    return tuple(name for name in codec_names() if init == "eigen" or row_codec(name).faithful)


def run(arguments: argparse.Namespace) -> int:
    """Print a column for each row codec."""
    check_outputs(arguments)
    if arguments.data == STANDARD_INPUT:
        raise ValueError("data: a plan reads the data, and standard input can be read once")
    complete_row_options(arguments)
    check_labels(arguments)
    given = arguments.codec or [STORE_DTYPE]
    codecs = loggable(arguments.init) if "all" in given else tuple(dict.fromkeys(given))
    arguments.codec = codecs[0]  # of the line that describes a row
    lm = CausalLM.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    corpus = open_corpus(arguments, lm)
    sizes = {name: getattr(arguments, name) for name in ("batch_tokens", "batch_size")}
    facts = CorpusFacts.of(tqdm(corpus, unit="ex", desc="read", dynamic_ncols=True), **sizes)
    piloting, pilot = 0.0, 0.0  # seconds of the calibration's, and of the whole

    def pilot_few(of: argparse.Namespace, gradients: LMGradients, corpus: Corpus) -> None:
        nonlocal piloting, pilot
        started = time.perf_counter()
        pilot = calibrated_pilot(gradients, corpus, facts, of.init, **pilot_options(of))
        piloting = time.perf_counter() - started

    started = time.perf_counter()
    gradients = project_layers(arguments, lm, corpus, pilot=pilot_few)
    watching = time.perf_counter() - started - piloting
    options = logging_options(arguments, corpus)
    folder = _existing(Path(arguments.out).absolute().parent)
    told = (options, arguments.queries, watching, float(arguments.seconds))
    plan = LoggingPlan(gradients, facts, folder, *told)
    found = {}
    for codec in tqdm(codecs, unit="codec", desc="trial", dynamic_ncols=True):
        found[codec] = plan.of(codec)
        if arguments.init in PILOTED:
            found[codec]["seconds"]["pilot"] = watching + pilot
    made = {
        "format": FORMAT,
        "version": VERSION,
        "model": lm.name,
        "rows": facts.rows,
        "tokens": facts.tokens,
        "dim": gradients.dim,
        "queries": arguments.queries,
        "estimated": _estimated(arguments, facts),  # of the bytes; all others are exact
        "asked": what_is_asked(arguments, gradients, options),
        "codecs": found,
    }
    if arguments.json:
        write_json(made, arguments.json)
    if arguments.json != STANDARD_OUTPUT:
        _print(made)
    return 0


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return folder if folder.is_dir() else _existing(folder.parent)


def _estimated(arguments: argparse.Namespace, facts: CorpusFacts) -> list[str]:
    """The sizes that a trial does not tell to the byte."""
    found = ["manifest"]
    if arguments.init in PILOTED and pilot_size(facts.rows, arguments.pilot) > PILOTED_EXAMPLES:
        found.append("projection")
    kind = arguments.curvature
    if kind != NO_CURVATURE and curvature_kind(kind).tokens is not None:
        found.append("curvature")  # with the last tokens, which wait for more to be summed
    return found


def _print(made: dict[str, Any]) -> None:
    """A line for each quantity, a column for each codec."""
    plans = made["codecs"].values()
    say(
        f"{made['model']}: {plural(made['rows'], 'row')} of {made['dim']:,} numbers, "
        f"{plural(made['tokens'], 'token')}"
    )
    lines = [["", *made["codecs"]], ["bytes a row", *(f"{plan['row_bytes']:,}" for plan in plans)]]
    for name in BYTES:
        label = {"norms": "norms, from a query on"}.get(name, name)
        sizes = [f"{plan['bytes'][name]:,}" for plan in plans]
        lines.append([f"{label}, about" if name in made["estimated"] else label, *sizes])
    total = [format_bytes(sum(plan["bytes"].values())) for plan in plans]
    lines.append(["on disk in all", *total])
    for name in MEMORY:
        lines.append(
            [f"memory, {name}", *(format_bytes(plan["memory_bytes"][name]) for plan in plans)]
        )
    for name in (name for name in SECONDS if all(name in plan["seconds"] for plan in plans)):
        label = f"time, {name.replace('_', ' ')}"
        lines.append([label, *(format_seconds(plan["seconds"][name]) for plan in plans)])
    for part in next(iter(plans))["of_first_query"]:
        values = [format_seconds(plan["of_first_query"][part]) for plan in plans]
        lines.append([f"  {part} of the first", *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        say("  ".join([first.ljust(widths[0]), *cells]))
    if any(plan["reading"] == "streamed" for plan in plans):
        warn("the rows of some take more memory than is free: queries read them from the disk")
