"""`logra doctor`: what would silently ruin attribution, before anything is logged."""

import argparse

from tqdm import tqdm

from logra_kernels.cli.log import complete_row_options, open_corpus, project_layers
from logra_kernels.cli.outputs import check_outputs
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.doctor import diagnose
from logra_kernels.report.console import say, warn
from logra_kernels.report.render import plural
from logra_kernels.report.results import STANDARD_OUTPUT, write_json


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if that is anything."""
    check_outputs(arguments)
    complete_row_options(arguments)
    lm = CausalLM.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    corpus = open_corpus(arguments, lm)
    gradients = project_layers(arguments, lm, corpus)
    found = diagnose(
        gradients,
        tqdm(corpus, unit="ex", desc="read", dynamic_ncols=True),
        examples=arguments.examples,
        store_dtype=arguments.codec,
        curvature=arguments.curvature,
    )
    if arguments.json:
        write_json(found.as_dict(), arguments.json)
    if arguments.json != STANDARD_OUTPUT:
        for line in str(found).splitlines():
            say(line)
    for count, what in (
        (corpus.num_truncated, f"cut to {arguments.max_tokens} tokens"),
        (corpus.num_skipped, "records left out: no token to predict"),
    ):
        if count:
            warn(f"{count:,} {what}")
    if found.findings:
        warn(f"logra doctor: {plural(len(found.findings), 'finding')}")
    return 0 if found.healthy else 1
