"""The package against what one would write or install instead, part by part.

Without --quick or --full: the ops, logging and queries, at full size. Every part checks its results
before it times them. A part can be run alone: python -m bench scores logging, or, with options of
its own, by its module: python -m bench.grid --help.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.harness.cases import OPTIONS, Case, options, run_cases
from bench.harness.results import ROOT
from bench.ops import TABLES
from bench.paths import attribution

# The interpreter of the peers' environment; `make peers-env` makes the default one.
PEERS_PYTHON = Path(os.environ.get("LOGRA_PEERS_PYTHON") or ROOT / ".venv-peers" / "bin" / "python")


def logging(quick: bool) -> Iterator[Case]:
    from bench.paths.logging import cases  # transformers, which it needs, takes seconds

    return cases(quick)


# Cases of the harness, timed in this process.
CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    **TABLES,
    "logging": logging,
    "attribution": attribution.cases,
}
SHARED = tuple(OPTIONS)
# Modules in processes of their own, with --full: each changes what others would be measured in.
MODULES: dict[str, tuple[str, tuple[str, ...]]] = {  # and the options that they are handed
    "streaming": ("bench.paths.streaming", SHARED),  # queries of a store on disk
    "targets": ("bench.targets", ("threads", "json")),  # what this package holds itself to
    "codecs": ("bench.codecs", SHARED),  # bytes, accuracy and speed of rows by codec
    "plan": ("bench.plan", ("quick", "threads", "json")),  # `logra plan` beside what comes
    "answers": ("bench.answers", ("quick", "threads", "json")),  # two-stage ones beside the exact
    "grid": ("bench.grid", SHARED),  # every op, dtype and shape against torch
    "codec-peers": ("bench.peers.codecs", SHARED),  # FAISS, turbovec, RaBitQLib
    "peers": ("bench.peers", SHARED),  # LogIX, Bergson, dattri, dattri-llm
    "table1": ("bench.table1", SHARED),  # LoGra beside EKFAC
    "plots": ("bench.plots", ()),  # pictures of the stored results
}
OF_PEERS = ("codec-peers", "peers", "table1")  # run by PEERS_PYTHON
NEEDS = {"logging": "transformers", "plots": "matplotlib"}  # beyond the package


class Failed(Exception):
    """A part that ran, and found something wrong."""


def run(name: str, args: argparse.Namespace) -> str | None:
    """Why the part was left out, or None."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        return f"{NEEDS[name]} is not installed (pip install '.[bench,test]')"
    if name in CASES:
        run_cases(CASES[name](args.quick), args)
        return None
    python = PEERS_PYTHON if name in OF_PEERS else Path(sys.executable)
    if not python.exists():
        return "the peers are not installed (make peers-env, or LOGRA_PEERS_PYTHON)"
    module, taken = MODULES[name]
    given = []
    for option in taken:
        value = getattr(args, option)
        if value:
            given += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    if subprocess.run([str(python), "-m", module, *given], cwd=ROOT).returncode:
        raise Failed
    return None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options; the parts are checked."""
    known = options(__doc__)
    known.prog = "python -m bench"
    known.epilog = f"parts: {', '.join(CASES)}; with --full also {', '.join(MODULES)}"
    known.add_argument("parts", nargs="*", metavar="part", help="default: by --quick, --full")
    known.add_argument("--full", action="store_true", help="every part there is")
    args = known.parse_args(argv)
    if unknown := sorted(set(args.parts) - {*CASES, *MODULES}):
        known.error(f"no part {', '.join(unknown)}; --help lists them")
    if args.quick and args.full:
        known.error("--quick and --full: expected at most one of them")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts, and return 1 if one failed."""
    args = parse(argv)
    left_out, failed = [], []
    for name in args.parts or [*CASES, *(MODULES if args.full else {})]:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            if why := run(name, args):
                left_out.append(f"{name} is left out: {why}")
        except Failed:
            failed.append(name)
        print(f"-- {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    print("\n".join(left_out + ([f"failed: {', '.join(failed)}"] if failed else [])))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
