"""The command `logra`: log, query, info, verify, report, demo.

Each subcommand is a module with `run(arguments) -> exit code`, imported when it is called, so that
`logra --help` and `logra info` do not wait for torch.
"""

from logra_kernels.cli.main import main

__all__ = ["main"]
