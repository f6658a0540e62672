"""`logra report`: results as a page."""

import argparse

from logra_kernels.report import read_results, write_report


def run(arguments: argparse.Namespace) -> int:
    """Render the JSON that `logra query` wrote."""
    write_report(read_results(arguments.results), arguments.out)
    print(f"report: {arguments.out}")
    return 0
