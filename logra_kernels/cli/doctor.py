"""`logra doctor`: what would silently ruin attribution, before anything is logged."""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from logra_kernels.cli.log import open_corpus, project_layers
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.doctor import diagnose
from logra_kernels.report.render import plural
from logra_kernels.report.results import write_text


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if that is anything."""
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"json: no folder {Path(arguments.json).absolute().parent}")
    lm = CausalLM.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    corpus = open_corpus(arguments, lm)
    gradients = project_layers(arguments, lm)
    found = diagnose(
        gradients,
        tqdm(corpus, unit="ex", desc="read", dynamic_ncols=True),
        examples=arguments.examples,
        store_dtype=arguments.store_dtype,
        curvature=arguments.curvature,
    )
    print(found)
    for count, what in (
        (corpus.num_truncated, f"cut to {arguments.max_tokens} tokens"),
        (corpus.num_skipped, "records left out: fewer than two tokens"),
    ):
        if count:
            print(f"{count:,} {what}")
    if arguments.json:
        write_text(arguments.json, json.dumps(found.as_dict(), indent=1) + "\n")
        print(f"results: {arguments.json}")
    if found.findings:
        print(f"logra doctor: {plural(len(found.findings), 'finding')}", file=sys.stderr)
    return 0 if found.healthy else 1
