"""Parse, call the subcommand, turn the package's errors into a sentence and an exit code."""

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

from logra_kernels import _naming_torch
from logra_kernels.cli.parser import build_parser
from logra_kernels.report.console import warn

# What a wrong argument, file, model or store leads to; anything else is a defect and keeps its
# traceback.
EXPECTED_ERRORS = (ValueError, OSError, ImportError, RuntimeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0: done; 1: `verify` or `doctor` found something; 2: an error, said in one sentence;
        130: interrupted.
    """
    _let_waiting_threads_sleep()
    given = list(sys.argv[1:] if argv is None else argv)
    with _naming_torch():
        arguments = build_parser().parse_args(given)
    arguments.command_line = given
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            command = importlib.import_module(f"logra_kernels.cli.{arguments.command}")
            with _naming_torch():
                return int(command.run(arguments))
        except KeyboardInterrupt:
            warn(f"logra {arguments.command}: interrupted")
            return 130
        except BrokenPipeError:
            # `logra info STORE | head`: nobody reads on; keep Python from flushing at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except EXPECTED_ERRORS as error:
            if arguments.traceback or os.environ.get("LOGRA_DEBUG") == "1":
                warn(traceback.format_exc())
            warn(f"logra {arguments.command}: {error}")
            return 2


def _let_waiting_threads_sleep() -> None:
    """Ask OpenMP, before torch loads it, for threads that sleep while they wait for each other.

    By default they spin, and beside another busy process take the processor from the very thread
    that they wait for: training and logging then take 4 to 5 times as long (bench/NOTES.md).
    """
    if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as a sentence, without the source line that raised it."""
    warn(f"logra: warning: {message}")
