"""`logra demo`: the whole path, on a real model that is taught invented facts."""

import argparse


def run(arguments: argparse.Namespace) -> int:
    """See logra_kernels/demo."""
    from logra_kernels.demo import run_demo

    run_demo(arguments.out, quick=arguments.quick)
    return 0
