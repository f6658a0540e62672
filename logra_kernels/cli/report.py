"""`logra report`: results as a page, or as a table."""

import argparse

from logra_kernels.cli.outputs import check_outputs
from logra_kernels.report import read_results, write_report
from logra_kernels.report.console import say
from logra_kernels.report.scores import write_ranked_scores


def run(arguments: argparse.Namespace) -> int:
    """Render the JSON that `logra query` wrote."""
    if not arguments.html and not arguments.scores:
        raise ValueError("expected --html or --scores, got neither")
    check_outputs(arguments)
    results = read_results(arguments.results)
    if arguments.html:
        write_report(results, arguments.html)
        say(f"report: {arguments.html}")
    if arguments.scores:
        write_ranked_scores(results, arguments.scores)
        say(f"scores: {arguments.scores}")
    return 0
