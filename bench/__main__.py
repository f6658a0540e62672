"""The package against what one would write or install instead, part by part.

Without --quick or --full: the ops, logging and queries, at full size. Every part checks its results
before it times them. A part can be run alone: python -m bench scores logging, or, with options of
its own, by its module: python -m bench.grid --help.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.harness.cases import parser, run_cases

ROOT = Path(__file__).parents[1]
# The interpreter of the peers' environment; `make peers-env` makes the default one.
PEERS_PYTHON = Path(os.environ.get("LOGRA_PEERS_PYTHON") or ROOT / ".venv-peers" / "bin" / "python")

# Which runs have a part: --quick, --full, or neither.
ALL, FULL = ("quick", "normal", "full"), ("full",)


@dataclass(frozen=True)
class Part:
    """One benchmark of the run: its name, what it measures, its module and in which runs it is."""

    name: str
    what: str
    module: str
    when: tuple[str, ...] = ALL

    def run(self, args: argparse.Namespace) -> str | None:
        """Why the part was left out, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"there is no {self.module}"
        if self.when is ALL:
            run_cases(importlib.import_module(self.module).cases(args.quick), args)
            return None
        return self.run_alone([f"--{name}" for name in ("quick", "json") if getattr(args, name)])

    def run_alone(self, options: list[str]) -> str | None:
        """In a process of its own: the part changes what others would be measured in."""
        python = Path(sys.executable)
        if self.name == "peers":
            python = PEERS_PYTHON
            if not python.exists():
                return "the peers are not installed (make peers-env, or LOGRA_PEERS_PYTHON)"
        if self.name in ("grid", "targets", "plots") and "--quick" in options:
            options.remove("--quick")
        if self.name == "plots":
            options = []
            if importlib.util.find_spec("matplotlib") is None:
                return "matplotlib is not installed (pip install '.[bench]')"
        command = [str(python), "-m", self.module, *options]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise Failed(self.name)
        return None


class Failed(Exception):
    """A part that ran, and found something wrong."""


PARTS = (
    Part("project", "tokens times P", "bench.ops.project"),
    Part("per_sample_gradients", "sums of outer products", "bench.ops.per_sample_gradients"),
    Part("projected_gradients", "both projections and the sum", "bench.ops.projected_gradients"),
    Part("covariance_update", "second moments", "bench.ops.covariance_update"),
    Part("scores", "the scan; numpy and FAISS too", "bench.ops.scores"),
    Part("topk_scores", "the scan that keeps the ends", "bench.ops.topk_scores"),
    Part("self_influence", "norms of rows", "bench.ops.self_influence"),
    Part("pack_rows", "rows to fp16 and back", "bench.ops.pack_rows"),
    Part("logging", "rows of a language model", "bench.paths.logging"),
    Part("attribution", "queries of a store in memory", "bench.paths.attribution"),
    Part("streaming", "queries of a store on disk", "bench.paths.streaming", FULL),
    Part("targets", "what this package holds itself to", "bench.targets", FULL),
    Part("grid", "every op, dtype and shape against torch", "bench.grid", FULL),
    Part("peers", "LogIX, Bergson, dattri, dattri-llm", "bench.peers", FULL),
    Part("table1", "LoGra beside EKFAC", "bench.table1", FULL),
    Part("plots", "pictures of the stored results", "bench.plots", FULL),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options; the parts are checked."""
    known = parser(__doc__)
    known.prog = "python -m bench"
    known.epilog = "parts:\n" + "\n".join(f"  {part.name:<22}{part.what}" for part in PARTS)
    known.add_argument("parts", nargs="*", metavar="part", help="default: by --quick, --full")
    known.add_argument("--full", action="store_true", help="every part there is")
    args = known.parse_args(argv)
    unknown = sorted(set(args.parts) - {part.name for part in PARTS})
    if unknown:
        known.error(f"no part {', '.join(unknown)}; --help lists them")
    if args.quick and args.full:
        known.error("--quick and --full: expected at most one of them")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts, and return 1 if one failed."""
    args = parse(argv)
    size = "quick" if args.quick else "full" if args.full else "normal"
    chosen = [part for part in PARTS if part.name in args.parts]
    chosen = chosen or [part for part in PARTS if size in part.when]
    left_out, failed = [], []
    for part in chosen:
        print(f"== {part.name}: {part.what}", flush=True)
        start = time.perf_counter()
        try:
            why = part.run(args)
        except Failed:
            failed.append(part.name)
            why = None
        if why is not None:
            left_out.append(f"{part.name} is left out: {why}")
            print(left_out[-1])
        print(f"-- {part.name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    for line in left_out:
        print(line)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
