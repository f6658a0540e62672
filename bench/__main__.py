"""The package against what one would write or install instead, part by part.

Without --quick or --full: the ops, logging and queries, at full size. Every part checks its results
before it times them, and can be run alone: python -m bench scores logging, or by its own module
with options of its own: python -m bench.grid --help.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The interpreter of the peers' environment; `make peers-env` makes the default one.
PEERS_PYTHON = Path(os.environ.get("LOGRA_PEERS_PYTHON") or ROOT / ".venv-peers" / "bin" / "python")


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    module: str
    when: tuple[str, ...]  # of "quick", "normal", "full"
    run: Callable[["Part", list[str]], str | None]  # why it was left out, or None


class Failed(Exception):
    """A part that ran, and found something wrong."""


def here(part: Part, options: list[str]) -> str | None:
    """In this process."""
    if importlib.util.find_spec(part.module) is None:
        return f"there is no {part.module}"
    if importlib.import_module(part.module).main(options):
        raise Failed(part.name)
    return None


def alone(part: Part, options: list[str]) -> str | None:
    """In a process of its own: it changes what the others would be measured in."""
    if importlib.util.find_spec(part.module) is None:
        return f"there is no {part.module}"
    return _process([sys.executable, "-m", part.module, *options], part)


def with_peers(part: Part, options: list[str]) -> str | None:
    """By the interpreter of the peers' environment."""
    if importlib.util.find_spec(part.module) is None:
        return f"there is no {part.module}"
    if not PEERS_PYTHON.exists():
        return "the peers are not installed (make peers-env, or LOGRA_PEERS_PYTHON)"
    return _process([str(PEERS_PYTHON), "-m", part.module, *options], part)


def held(part: Part, options: list[str]) -> str | None:
    isa = part.name.removeprefix("grid-")
    json = ["--json"] if "--json" in options else []
    return _process(
        [sys.executable, "-m", part.module, "--worst", "20", "--hold", isa, *json], part
    )


def grid(part: Part, options: list[str]) -> str | None:
    json = ["--json"] if "--json" in options else []
    return _process([sys.executable, "-m", part.module, *json], part)


def by_pytest(part: Part, options: list[str]) -> str | None:
    if importlib.util.find_spec("pytest_benchmark") is None:
        return "pytest-benchmark is not installed (pip install '.[dev]')"
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    json = [f"--benchmark-json={folder / 'test_ops.json'}"] if "--json" in options else []
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_ops.py"]
    return _process([*command, "--benchmark-max-time=0.3", *json], part)


def pictures(part: Part, options: list[str]) -> str | None:
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install '.[bench]')"
    return _process([sys.executable, "-m", part.module], part)


def _process(command: list[str], part: Part) -> None:
    if subprocess.run(command, cwd=ROOT).returncode:
        raise Failed(part.name)


ALL = ("quick", "normal", "full")
OP, FULL = ("normal", "full"), ("full",)
PARTS = (
    Part("project", "tokens times P", "bench.bench_project", ALL, here),
    Part(
        "per_sample_gradients",
        "sums of outer products",
        "bench.bench_per_sample_gradients",
        ALL,
        here,
    ),
    Part(
        "projected_gradients",
        "both projections and the sum",
        "bench.bench_projected_gradients",
        ALL,
        here,
    ),
    Part("covariance_update", "second moments", "bench.bench_covariance_update", ALL, here),
    Part("scores", "the scan; numpy and FAISS too", "bench.bench_scores", ALL, here),
    Part("topk_scores", "the scan that keeps the ends", "bench.bench_topk_scores", ALL, here),
    Part("self_influence", "norms of rows", "bench.bench_self_influence", ALL, here),
    Part("pack_rows", "rows to fp16 and back", "bench.bench_pack_rows", ALL, here),
    Part("logging", "rows of a language model", "bench.bench_logging", ALL, here),
    Part("attribution", "queries of a store in memory", "bench.bench_attribution", ALL, here),
    Part("streaming", "queries of a store on disk", "bench.bench_streaming", FULL, alone),
    Part("targets", "what this package holds itself to", "bench.targets", FULL, here),
    Part("grid", "every op, dtype and shape against torch", "bench.grid", FULL, grid),
    Part("grid-avx512", "the same, both sides held to AVX-512", "bench.grid", FULL, held),
    Part("grid-avx2", "the same, both sides held to AVX2", "bench.grid", FULL, held),
    Part("pytest", "pytest-benchmark of the ops", "bench.test_ops", FULL, by_pytest),
    Part("peers", "LogIX, Bergson, dattri, dattri-llm", "bench.bench_peers", FULL, with_peers),
    Part("table1", "LoGra beside EKFAC", "bench.table1", FULL, alone),
    Part("plots", "pictures of the stored results", "bench.plots", FULL, pictures),
)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    names = "\n".join(f"  {part.name:<22}{part.what}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"parts:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help="only these (default: by --quick, --full)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small problems, few rounds")
    size.add_argument("--full", action="store_true", help="every part there is")
    parser.add_argument("--json", action="store_true", help="append to bench/results/*.jsonl")
    parser.add_argument(
        "--isas", action="store_true", help="every instruction set in the ops' parts"
    )
    parser.add_argument("--threads", type=int, help="threads in the ops' parts (default: torch's)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - {part.name for part in PARTS})
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; --help lists them")
    return args, [f"--{name}" for name in ("quick", "json") if getattr(args, name)]


def main(argv: list[str] | None = None) -> int:
    args, options = parse(argv)
    size = "quick" if args.quick else "full" if args.full else "normal"
    chosen = [part for part in PARTS if part.name in args.parts]
    chosen = chosen or [part for part in PARTS if size in part.when]
    left_out, failed = [], []
    for part in chosen:
        print(f"== {part.name}: {part.what}", flush=True)
        start = time.perf_counter()
        own = list(options)
        if "quick" in part.when:  # an op's part, or one like it
            own += ["--isas"] if args.isas else []
            own += ["--threads", str(args.threads)] if args.threads else []
        try:
            why = part.run(part, own)
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
