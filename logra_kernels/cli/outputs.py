"""The files that a subcommand writes, by one spelling: --json, --html, --scores."""

import argparse
from pathlib import Path

from logra_kernels.report.results import STANDARD_OUTPUT
from logra_kernels.report.scores import check_table


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse files that cannot be written, before any work is done for them.

    Raises:
        FileNotFoundError, ValueError, ImportError: the message names the option.
    """
    for option in ("json", "html", "scores"):
        path = getattr(arguments, option, None)
        if not path or (option == "json" and path == STANDARD_OUTPUT):
            continue
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"{option}: no folder {Path(path).absolute().parent}")
        if Path(path).is_dir():
            raise IsADirectoryError(f"{option}: expected a file, got the folder {path}")
        if option == "scores":
            check_table(path)
