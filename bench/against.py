"""This copy of the package against another copy, in turns: python -m bench.against PATH

PATH is the root of a copy whose extension is built (logra_kernels/_C*.so). Each copy runs in a
process of its own and gets the same problems: the cells of bench.grid, queries of a store, and
logging a model. Each result is checked and the two are compared bit by bit; then the processes take
turns, one sample each in an order that is drawn anew. A cell's ratio is this copy's median time
over the other's: above 1, this copy is slower. A cell outside 0.97 to 1.03 is timed again, up to
twice, and its samples are pooled. To know the noise, run it with PATH "." first.
"""

# Nothing here imports logra_kernels before a process has chosen its copy.
import argparse
import hashlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
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
    from bench import grid

    yield from grid.cells()
    for num_queries in (1, 16):
        yield "attribution", partial(queries, num_queries)
    for rank in (16, 64):
        yield "logging", partial(logging, rank)


def queries(num_queries: int) -> "Case":
    """Top k of a store that is made for the case and goes with it."""
    from bench.paths import attribution

    folder = tempfile.TemporaryDirectory(prefix="logra-bench-")
    attributor = attribution.opened(Path(folder.name) / "store", 6000, 16)
    case = attribution.in_memory(attributor, num_queries)
    case.params["folder"] = folder  # kept as long as the case
    return case


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

    title = f"Llama, 2 blocks of 576, N=4, T=128, rank {rank}"
    return Case("logging", title, {OURS: rows}, rows(), rtol=0.0)


def work(root: Path, pipe: Connection) -> None:
    """A copy's process: ("make", a cell's number), then ("time", how many calls), over and over."""
    sys.path.insert(0, str(root))
    import torch

    import logra_kernels
    from bench.harness.cases import OURS, check, loops_of, sample

    found = Path(logra_kernels.__file__).parents[1]
    if found != root:
        raise RuntimeError(f"expected logra_kernels of {root}, got that of {found}")
    builds = [build for _, build in cells()]
    case = None
    torch.set_grad_enabled(False)
    while (asked := pipe.recv()) is not None:
        what, number = asked
        if what == "make":
            torch.manual_seed(0)
            case = None  # its memory is free before the next one takes any
            case = builds[number]()
            call = case.providers[OURS]
            case.providers = {OURS: call}
            result = call()
            digest = hashlib.sha256()
            for part in [result] if isinstance(result, torch.Tensor) else result:
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
            wrong = check(case)[1].get(OURS)
            name = f"{case.op}: {case.title}"
            pipe.send((name, wrong, digest.hexdigest(), loops_of(call)[0]))
        else:
            sample(call, 1)  # the other process has had the cache
            pipe.send(sample(call, number) / number)


class Copy:
    """The process of one copy."""

    def __init__(self, root: Path) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(root, other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what: str, number: int) -> Any:
        """Send the copy's process a request, and wait for its answer; EOFError if it has ended."""
        self.pipe.send((what, number))
        return self.pipe.recv()


def compare(copies: list[Copy], cell: int, rounds: int) -> dict[str, Any]:
    """A line of the table; RuntimeError if one copy gives a wrong result."""
    (name, *_), _ = answers = [copy.ask("make", cell) for copy in copies]
    for _, wrong, _, _ in answers:
        if wrong:
            raise RuntimeError(f"{name}: {wrong}")
    (_, _, ours, loops), (_, _, theirs, other_loops) = answers
    times: list[list[float]] = [[], []]
    for _ in range(3):
        for _ in range(rounds):
            for which in random.sample((0, 1), 2):
                time.sleep(SETTLE_S)
                times[which].append(copies[which].ask("time", max(loops, other_loops)))
        ours_s, theirs_s = map(statistics.median, times)
        ratio = ours_s / theirs_s
        if abs(ratio - 1) <= SURE:
            break
    bits = "same" if ours == theirs else "other"
    ms = {"ours_ms": ours_s * 1e3, "other_ms": theirs_s * 1e3}
    return {"cell": name, "ratio": ratio, **ms, "bits": bits}


def report(compared: list[dict[str, Any]], worst: int) -> str:
    """The slowest cells, then the ratios by op."""
    from bench.harness.tables import table

    ordered = sorted(compared, key=lambda one: -one["ratio"])
    by_op: dict[str, list[float]] = {"all": [one["ratio"] for one in ordered]}
    for one in ordered:
        by_op.setdefault(one["cell"].split(":")[0], []).append(one["ratio"])
    lines = [table(ordered[:worst])]
    lines += [
        f"{op}: {len(ratios)} cells, ratio median {statistics.median(ratios):.3f},"
        f" from {min(ratios):.3f} to {max(ratios):.3f}"
        for op, ratios in by_op.items()
    ]
    other = [one["cell"] for one in ordered if one["bits"] == "other"]
    return "\n".join([*lines, f"{len(other)} cells with other bits: {'; '.join(other)}"])


def main(argv: list[str] | None = None) -> None:
    """Compare with the other copy, and print the report."""
    known = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known.add_argument("path", type=Path, help="the root of the other copy")
    known.add_argument("--ops", nargs="+", help="cells of these only; attribution and logging too")
    known.add_argument("--every", type=int, default=1, metavar="N", help="each N-th cell only")
    known.add_argument("--rounds", type=int, default=9, help="samples of each copy")
    known.add_argument("--worst", type=int, default=10, help="print so many cells")
    args = known.parse_args(argv)
    root = args.path.resolve()
    if not (root / "logra_kernels").is_dir():
        raise SystemExit(f"PATH: expected a folder with logra_kernels, got {args.path}")
    chosen = [i for i, (op, _) in enumerate(cells()) if args.ops is None or op in args.ops]
    copies = [Copy(ROOT), Copy(root)]
    print(report([compare(copies, i, args.rounds) for i in chosen[:: args.every]], args.worst))
    for copy in copies:
        copy.pipe.send(None)
        copy.process.join()


if __name__ == "__main__":
    main()
