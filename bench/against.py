"""This copy of the package against another copy, in turns: python -m bench.against PATH

PATH is the root of a copy whose extension is built (logra_kernels/_C*.so). Each copy runs in a
process of its own and gets the same problems: the cells of bench.grid, queries of a store, and
logging a model. Each result is checked and the two are compared bit by bit; then the processes take
turns, one sample each in an order that is drawn anew. A cell's ratio is this copy's median time
over the other's: above 1, this copy is slower. A cell outside 0.97 to 1.03 is timed again, up to
twice, and its samples are pooled. To know the noise, run it with PATH "." first.

--targets N runs `python -m bench.targets` of both copies N times in turns instead, and prints the
median that each reached.
"""

# Nothing here imports logra_kernels before a process has chosen its copy.
import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.grid import Build
    from bench.harness.cases import Case

ROOT = Path(__file__).parents[1]
SURE = 0.03  # a cell whose ratio differs from 1 by more is timed again
SETTLE_S = 4e-3  # OpenMP's threads go on spinning for some milliseconds after the last sample


def cells() -> "Iterator[tuple[str, Build]]":
    """(name, a function that makes the case), by the copy that this process has chosen."""
    from functools import partial

    from bench import grid
    from bench.paths import attribution

    yield from grid.cells()
    for num_queries in (1, 16):
        yield "attribution", partial(attribution.small, num_queries)
    for rank in (16, 64):
        yield "logging", partial(logging, rank)


def logging(rank: int) -> "Case":
    """Rows of a small Llama by the public names alone, which every copy has."""
    import torch

    import logra_kernels
    from bench.harness.cases import OURS, Case
    from bench.harness.models import llama, summed_loss

    model = llama(blocks=2)
    ids = torch.randint(0, model.config.vocab_size, (4, 128))
    folder = tempfile.TemporaryDirectory(prefix="logra-bench-")
    run = logra_kernels.init("run", root_dir=folder.name)
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=rank)
    run.eval()

    def rows(_: object = folder) -> torch.Tensor:
        with torch.enable_grad(), run(data_id=range(len(ids))):
            summed_loss(model, ids).backward()
        logged = run.get_log()[1]
        return torch.cat([logged[m.name]["grad"].flatten(1) for m in run.modules], dim=1)

    return Case(
        op="logging",
        title=f"Llama, 2 blocks of 576, N=4, T=128, rank {rank}",
        providers={OURS: rows},
        expected=rows(),
        rtol=0.0,
        num_bytes=0.0,
        flops=0.0,
    )


def work(root: str) -> None:
    """A copy's process: answers each request, a line of JSON, with a line of JSON."""
    sys.path.insert(0, root)
    import torch

    import logra_kernels
    from bench.harness.cases import OURS, check, loops_of, sample

    found = Path(logra_kernels.__file__).parents[1]
    if found != Path(root):
        raise RuntimeError(f"expected logra_kernels of {root}, got that of {found}")
    builds = [build for _, build in cells()]
    case = None
    torch.set_grad_enabled(False)
    for line in sys.stdin:
        request = json.loads(line)
        if "cell" in request:
            torch.manual_seed(0)
            case = None  # its memory is free before the next one takes any
            case = builds[request["cell"]]()
            case.providers = {OURS: case.providers[OURS]}
            _, _, left_out = check(case)
            result = case.providers[OURS]()
            parts = [result] if isinstance(result, torch.Tensor) else result
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
            answer = {
                "name": f"{case.op}: {case.title}",
                "wrong": left_out.get(OURS),
                "digest": digest.hexdigest(),
                "loops": loops_of(case.providers[OURS])[0],
            }
        else:
            assert case is not None
            sample(case.providers[OURS], 1)  # the other process has had the cache
            answer = {"s": sample(case.providers[OURS], request["loops"]) / request["loops"]}
        print(json.dumps(answer), flush=True)


class Copy:
    """The process of one copy."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.against", "--work", str(root)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **request: int) -> dict[str, Any]:
        """Send the copy's process a request, and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.root}: its process ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Compared:
    """One cell timed in both copies: medians in milliseconds."""

    name: str
    ours_ms: float
    theirs_ms: float
    same_bits: bool

    @property
    def ratio(self) -> float:
        """Our time over the other copy's."""
        return self.ours_ms / self.theirs_ms

    def line(self) -> str:
        """The cell as a line of the report."""
        bits = "" if self.same_bits else "  other bits"
        return f"{self.ratio:7.3f}{self.ours_ms:11.4f}{self.theirs_ms:11.4f}  {self.name}{bits}"


def compare(copies: list[Copy], cell: int, rounds: int) -> Compared:
    """Time one cell in both copies, in turns; RuntimeError if one gives a wrong result."""
    answers = [copy.ask(cell=cell) for copy in copies]
    name = answers[0]["name"]
    for answer in answers:
        if answer["wrong"]:
            raise RuntimeError(f"{name}: {answer['wrong']}")
    loops = max(answer["loops"] for answer in answers)
    times: list[list[float]] = [[], []]
    for _ in range(3):
        for _ in range(rounds):
            for which in random.sample((0, 1), 2):
                time.sleep(SETTLE_S)
                times[which].append(copies[which].ask(loops=loops)["s"])
        ours_s, theirs_s = map(statistics.median, times)
        if abs(ours_s / theirs_s - 1) <= SURE:
            break
    same = answers[0]["digest"] == answers[1]["digest"]
    return Compared(name, ours_s * 1e3, theirs_s * 1e3, same)


def report(compared: list[Compared], worst: int) -> list[str]:
    """The slowest cells, then the ratios by op."""
    ordered = sorted(compared, key=lambda one: -one.ratio)
    lines = [f"{'ratio':>7}{'ours ms':>11}{'other ms':>11}  the slowest beside the other copy"]
    lines += [one.line() for one in ordered[:worst]]
    by_op: dict[str, list[float]] = {"all": []}
    for one in ordered:
        by_op["all"].append(one.ratio)
        by_op.setdefault(one.name.split(":")[0], []).append(one.ratio)
    for op, ratios in by_op.items():
        middle = statistics.median(ratios)
        lines.append(
            f"{op}: {len(ratios)} cells, ratio median {middle:.3f},"
            f" from {min(ratios):.3f} to {max(ratios):.3f}"
        )
    other = [one.name for one in ordered if not one.same_bits]
    lines.append(f"{len(other)} cells with other bits: {'; '.join(other)}")
    return lines


def targets(other: Path, rounds: int) -> Iterator[str]:
    """What each copy's own bench.targets prints, by the columns of `bench.targets.line`."""
    reached: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(rounds):
        for which, root in enumerate((ROOT, other)):
            done = subprocess.run(
                [sys.executable, "-m", "bench.targets", "--only", "scan", "duties", "ops",
                 "logging"],
                cwd=root, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            for line in done.stdout.splitlines():
                if line[85:95].strip().replace(".", "").replace(",", "").isdigit():
                    both = reached.setdefault(line[:85].rstrip(), ([], []))
                    both[which].append(float(line[85:95].replace(",", "")))
    yield f"{'':<85}{'ours':>8}{'other':>8}"
    for what, both in reached.items():
        yield f"{what:<85}" + "".join(f"{statistics.median(x):8.3g}" for x in both if x)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the root of the other copy")
    parser.add_argument("--ops", nargs="+", help="cells of these only; attribution and logging too")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th cell only")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each copy")
    parser.add_argument("--worst", type=int, default=10, help="print so many cells")
    parser.add_argument("--targets", type=int, metavar="N", help="bench.targets N times instead")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare with the other copy, and print the report."""
    args = parse(argv)
    root = args.path.resolve()
    if args.work:
        work(str(root))
        return
    if not (root / "logra_kernels").is_dir():
        raise SystemExit(f"PATH: expected a folder with logra_kernels, got {args.path}")
    if args.targets:
        for line in targets(root, args.targets):
            print(line)
        return
    start = time.perf_counter()
    chosen = [i for i, (op, _) in enumerate(cells()) if args.ops is None or op in args.ops]
    copies = [Copy(ROOT), Copy(root)]
    compared = [compare(copies, cell, args.rounds) for cell in chosen[:: args.every]]
    print("\n".join(report(compared, args.worst)))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
