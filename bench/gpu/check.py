"""Everything that only a GPU can show to be right: python -m bench.gpu.check [--quick] [--json]

- every op's Triton kernel against float64 on the CPU, over types, ragged sizes and strides;
- equal bits however rows, queries and examples are split into calls, and from run to run;
- the torch ops give what the kernels give, and addresses past 2^31 elements work;
- a model's rows logged on the GPU, and a store scored on it, against the CPU;
- the kernels' whole test suite; NVIDIA's compute-sanitizer on a small part, where it is installed.

Prints a line a check, and ends with status 1 if one failed. With TRITON_INTERPRET=1 and
`--device cpu` the first two run under Triton's interpreter: that checks this program.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import results as stored
from logra_kernels import ops, reference
from logra_kernels import triton as kernels

ROOT = Path(__file__).parents[2]
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
# A float32 addition on tensor cores may truncate, an error of 2**-23. Operands split into pieces
# leave out 2**-19.
STEP, PIECES = 2.0**-23, 2.0**-19


@dataclass
class Outcome:
    """A check that ran: how many comparisons, the worst error over its bound, what failed."""

    check: str
    comparisons: int
    worst: float | None
    seconds: float
    failed: str | None


@dataclass
class Comparison:
    """An error over its bound: at most 1."""

    name: str
    ratio: float


class Data:
    """Random tensors, made on the CPU from one seed, so that every device sees the same."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = FULL) -> Tensor:
        """Normal values on the device."""
        return torch.randn(*shape, generator=self.generator).to(dtype).to(self.device)

    def mask(self, *shape: int) -> Tensor:
        """True for four of five elements, on the device."""
        return (torch.rand(*shape, generator=self.generator) < 0.8).to(self.device)


def compare(name: str, got: Tensor, wanted: Tensor, size: Tensor, terms: int) -> Comparison:
    """|got - wanted| over the errors of terms additions and of pieces, both in parts of `size`."""
    bound = (terms * STEP + PIECES) * size + terms * 2.0**-126
    error = (got.detach().cpu().double() - wanted).abs()
    ratio = float((error / bound).nan_to_num(torch.inf).max()) if error.numel() else 0.0
    return Comparison(name, ratio)


def same(name: str, one: Any, other: Any) -> Comparison:
    """A ratio of 0 if the bits are equal, else of infinity."""
    one = (one,) if isinstance(one, Tensor) else one
    other = (other,) if isinstance(other, Tensor) else other
    equal = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return Comparison(name, 0.0 if equal else torch.inf)


def wide(*tensors: Tensor | None) -> list[Any]:
    """The tensors in float64 on the CPU."""
    return [None if t is None else t.detach().cpu().double() for t in tensors]


def sizes(*tensors: Tensor | None) -> list[Any]:
    """The absolute values in float64 on the CPU."""
    return [None if t is None else t.abs() for t in wide(*tensors)]


def projections(data: Data, quick: bool) -> Iterator[Comparison]:
    """`project` over types and ragged widths."""
    for dtype, proj_dtype in ((HALF, HALF), (BRAIN, BRAIN), (FULL, FULL), (BRAIN, FULL)):
        for tokens, width, rank in ((1, 16, 16), (130, 77, 5), (300, 2048, 64))[: 2 + (not quick)]:
            x, proj = (
                data.randn(tokens, width, dtype=dtype),
                data.randn(rank, width, dtype=proj_dtype),
            )
            wanted, size = reference.project(*wide(x, proj)), reference.project(*sizes(x, proj))
            name = f"project {tokens}x{width}->{rank} {dtype}"
            yield compare(name, kernels.project(x, proj), wanted, size, width)


def gradients(data: Data, quick: bool) -> Iterator[Comparison]:
    """Gradients per example over types, projections, masks and segments."""
    shapes = ((2, 3, 16, 16), (3, 140, 40, 9), (4, 300, 1024, 64), (2, 130, 512, 128))
    for n, t, width, rank in shapes[: 2 + 2 * (not quick)]:
        for x_dtype, dy_dtype in ((HALF, HALF), (BRAIN, BRAIN), (FULL, FULL), (FULL, BRAIN)):
            x, dy = data.randn(n, t, width, dtype=x_dtype), data.randn(n, t, width, dtype=dy_dtype)
            proj_in = data.randn(rank, width, dtype=x_dtype)
            proj_out = data.randn(rank, width, dtype=dy_dtype)
            mask = data.mask(n, t)
            x[~mask] = torch.nan
            projs: tuple[tuple[Tensor | None, Tensor | None], ...]
            projs = (proj_in, proj_out), (None, proj_out), (None, None)
            for p_in, p_out in projs:
                if p_out is None and width > 128:
                    continue  # nobody stores the full outer product of raw activations
                got = kernels.projected_gradients(x, dy, p_in, p_out, mask)
                arguments = x.nan_to_num(0), dy, p_in, p_out
                wanted = reference.projected_gradients(*wide(*arguments, mask))
                size = reference.projected_gradients(*sizes(*arguments, mask))
                name = f"projected_gradients {n}x{t}, {width}->{rank}, {x_dtype} {dy_dtype}"
                yield compare(name, got, wanted, size, t + 2 * width)
            packed = x.flatten(0, 1), dy.flatten(0, 1), proj_in, proj_out, mask.flatten()
            bounds = torch.arange(0, n * t + 1, t, device=x.device)
            got = kernels.projected_gradients(x, dy, proj_in, proj_out, mask)
            yield same("packed segments", got, kernels.projected_gradients(*packed, bounds))


def scans(data: Data, quick: bool) -> Iterator[Comparison]:
    """`scores`, `topk_scores` and `self_influence` over types, scales and biases."""
    shapes = ((1, 5, 16), (17, 200, 37), (64, 1000, 4096), (256, 300, 1000))
    for count, num_rows, dim in shapes[: 2 + 2 * (not quick)]:
        for dtype in (HALF, BRAIN, FULL):
            queries, rows = data.randn(count, dim), data.randn(num_rows, dim, dtype=dtype)
            scale, bias = data.randn(num_rows).abs(), data.randn(num_rows)
            for a, b in ((None, None), (scale, None), (scale, bias)):
                arguments = queries, rows, a, b
                wanted = reference.scores(*wide(*arguments))
                size = reference.scores(*sizes(*arguments))
                name = f"scores Q={count} {num_rows}x{dim} {dtype}"
                got = kernels.scores(*arguments)
                yield compare(name, got, wanted, size, dim)
            for k in (1, 20, 128, 150)[: 2 + 2 * (not quick)]:
                top = kernels.topk_scores(queries, rows, k, scale)
                listed = kernels.scores(queries, rows, scale).cpu()
                # With unit vectors as rows, the scores are the queries.
                wanted_top = reference.topk_scores(listed, torch.eye(num_rows), k)
                yield same(f"topk_scores k={k} {dtype}", [t.cpu() for t in top], wanted_top)
            factor = data.randn(count, dim).tril()
            got = kernels.self_influence(rows, factor)
            wanted = reference.self_influence(*wide(rows, factor))
            magnitude = sizes(rows, factor)
            size = (magnitude[0] @ magnitude[1].T).square().sum(1)
            yield compare(
                f"self_influence {num_rows}x{dim} {dtype}", got, wanted, size, 2 * dim + count
            )


def covariances(data: Data, quick: bool) -> Iterator[Comparison]:
    """`covariance_update_` over types and widths."""
    for num_rows, width in ((1, 16), (300, 45), (5000, 256), (3000, 1024))[: 2 + 2 * (not quick)]:
        for dtype in (HALF, BRAIN, FULL):
            rows, cov = data.randn(num_rows, width, dtype=dtype), data.randn(width, width)
            before, values, magnitude = wide(cov)[0], wide(rows)[0], sizes(rows)[0]
            kernels.covariance_update_(cov, rows)
            wanted = before + (values.T @ values).tril()
            size = before.abs() + magnitude.T @ magnitude
            yield compare(f"covariance {num_rows}x{width} {dtype}", cov, wanted, size, num_rows)


def packing(data: Data, quick: bool) -> Iterator[Comparison]:
    """`pack_rows` and `unpack_rows`, which must give the reference's bits."""
    for num_rows, dim in ((1, 7), (40, 1500), (500, 16384))[: 2 + (not quick)]:
        rows = data.randn(num_rows, dim) * 10.0 ** data.randn(num_rows, 1).mul(8).clamp(-25, 25)
        layout = [dim // 3, dim - dim // 3], [3, -5]
        packed, scale = kernels.pack_rows(rows, *layout)
        wanted = reference.pack_rows(rows.cpu(), *layout)
        yield same("pack_rows", (packed.cpu(), scale.cpu()), wanted)
        got = kernels.unpack_rows(packed, scale, *layout)
        yield same("unpack_rows", got.cpu(), reference.unpack_rows(*wanted, *layout))


def splits(data: Data, quick: bool) -> Iterator[Comparison]:
    """Two halves of a call give the bits of the whole, and so does the call repeated."""
    # The interpreter multiplies by a library whose sums depend on a row's place in its tile.
    interpreted = data.device == "cpu"
    big = not quick
    count, num_rows, dim = (70, 3000, 4096) if big else (20, 300, 48)
    for dtype in (HALF, BRAIN, FULL):
        queries, rows = data.randn(count, dim), data.randn(num_rows, dim, dtype=dtype)
        whole = kernels.scores(queries, rows)
        for _ in range(3):
            yield same("scores, repeated", kernels.scores(queries, rows), whole)
        cut = 128 if interpreted else num_rows // 3 + 1
        parts = [kernels.scores(queries, r) for r in (rows[:cut], rows[cut:])]
        yield same("scores, rows split", torch.cat(parts, 1), whole)
        if not interpreted:
            parts = [kernels.scores(q, rows) for q in (queries[:1], queries[1:])]
            yield same("scores, queries split", torch.cat(parts), whole)
        top = kernels.topk_scores(queries, rows, 20)
        state = kernels.topk_scores(queries, rows[:cut], 20)
        state = kernels.topk_scores(queries, rows[cut:], 20, None, None, state, cut)
        yield same("topk_scores, rows split", state, top)
        factor = data.randn(dim, dim).tril()
        sigma = kernels.self_influence(rows, factor)
        parts = [kernels.self_influence(r, factor) for r in (rows[:cut], rows[cut:])]
        yield same("self_influence, rows split", torch.cat(parts), sigma)

        n, t, width, rank = (8, 400, 1024, 64) if big else (3, 140, 32, 9)
        x, dy = data.randn(n, t, width, dtype=dtype), data.randn(n, t, width, dtype=dtype)
        proj = data.randn(rank, width, dtype=dtype)
        whole = kernels.projected_gradients(x, dy, proj, proj)
        for _ in range(3):
            again = kernels.projected_gradients(x, dy, proj, proj)
            yield same("projected_gradients, repeated", again, whole)
        halves = [
            kernels.projected_gradients(a, b, proj, proj)
            for a, b in ((x[:1], dy[:1]), (x[1:], dy[1:]))
        ]
        yield same("projected_gradients, examples split", torch.cat(halves), whole)


def dispatch(data: Data, quick: bool) -> Iterator[Comparison]:
    """The torch ops launch these kernels."""
    queries, rows = data.randn(9, 64), data.randn(100, 64, dtype=HALF)
    yield same("ops.scores", ops.scores(queries, rows), kernels.scores(queries, rows))
    got, best = ops.topk_scores(queries, rows, 7), kernels.topk_scores(queries, rows, 7)
    yield same("ops.topk_scores", tuple(got), best)
    x, proj = data.randn(3, 50, 64, dtype=BRAIN), data.randn(16, 64, dtype=BRAIN)
    wanted = kernels.projected_gradients(x, x, proj, proj)
    yield same("ops.projected_gradients", ops.projected_gradients(x, x, proj, proj), wanted)


def large_addresses(data: Data, quick: bool) -> Iterator[Comparison]:
    """The last rows start more than 2^31 elements after the first."""
    dim = 16384
    num_rows = (1 << 31) // dim + 500
    rows = torch.zeros(num_rows, dim, device=data.device, dtype=HALF)
    rows[-300:] = data.randn(300, dim, dtype=HALF)
    queries = data.randn(5, dim)
    got = kernels.scores(queries, rows)
    yield same("scores", got[:, -300:], kernels.scores(queries, rows[-300:]))
    yield same("scores of zeros", got[:, :-300], torch.zeros_like(got[:, :-300]))
    top = kernels.topk_scores(queries, rows, 10)[1]
    yield same("topk_scores", (top >= num_rows - 300).all(), torch.tensor(True, device=data.device))


class TinyModel(nn.Module):
    """Three linear layers with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(96, 96), nn.Tanh()) for _ in range(3))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layers one after another: [..., 96] to [..., 96]."""
        out: Tensor = self.layers(x)
        return out


def end_to_end(data: Data, quick: bool) -> Iterator[Comparison]:
    """Rows of a model, and influence from a store, on the device and on the CPU."""
    import logra_kernels as logra
    from logra_kernels.attribution import Attributor
    from logra_kernels.run.statistic import Covariance

    torch.manual_seed(0)
    model = TinyModel()
    x, mask = data.randn(32, 40, 96), data.mask(32, 40)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "reference", Path(folder) / "device"]
        for device, path in zip(("cpu", data.device), paths, strict=True):
            run = logra.init(project=path.name, root_dir=folder)
            run.watch(model.to(device))
            run.add_lora(rank=16)
            run.setup({"log": "grad", "save": "grad", "statistic": {"grad": Covariance}})
            for first in range(0, 32, 8):
                some = x[first : first + 8].to(device)
                keep = mask[first : first + 8].to(device)
                with run(data_id=[str(i) for i in range(first, first + 8)], mask=keep):
                    (model(some).square() * keep[..., None]).sum().backward()
            run.finalize()
        here, there = (Attributor(path) for path in paths)
        rows = torch.from_numpy(here.store.take(range(32))).double()
        others = torch.from_numpy(there.store.take(range(32)))
        # About 2**-11 of the row's largest: fp16 rounds by 2**-12, float32 sums by less.
        size = rows.abs().amax(1, keepdim=True).expand_as(rows) * 2.0**8
        yield compare("rows", others, rows, size, 1)
        queries = torch.from_numpy(here.store.take(range(5)))
        on_gpu = Attributor(paths[0], device=data.device)
        for mode in ("dot", "l-relatif"):
            wanted = torch.as_tensor(here.scores(queries, mode).scores).double()
            got = torch.as_tensor(on_gpu.scores(queries, mode).scores)
            size = wanted.abs().amax(1, keepdim=True).expand_as(wanted) * 2.0**6
            yield compare(f"scores, {mode}", got, wanted, size, 1)
            best = here.top_k(queries, 5, mode).top_rows
            yield same(
                f"top_k, {mode}",
                torch.as_tensor(on_gpu.top_k(queries, 5, mode).top_rows),
                torch.as_tensor(best),
            )


def suite(data: Data, quick: bool) -> Iterator[Comparison]:
    """tests/triton/kernels on the device."""
    folder = ROOT / "tests" / "triton" / "kernels"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or " passed" not in done.stdout:
        raise AssertionError(done.stdout[-1500:] + done.stderr[-500:])
    yield Comparison(done.stdout.strip().splitlines()[-1], 0.0)


def sanitizer(data: Data, quick: bool) -> Iterator[Comparison]:
    """compute-sanitizer sees reads out of bounds and races that results do not show."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("  compute-sanitizer: not installed, left out")
        return
    for kind in ("memcheck", "racecheck"):
        program = [sys.executable, "-m", "bench.gpu.check", "--quick", "--only", "kernels"]
        command = [tool, "--tool", kind, "--error-exitcode", "9", *program]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise AssertionError(f"{kind}: {done.stdout[-1500:]}")
        yield Comparison(kind, 0.0)


Check = Callable[[Data, bool], Iterator[Comparison]]
KERNELS: dict[str, Check] = {
    "project": projections,
    "gradients": gradients,
    "scans": scans,
    "covariance": covariances,
    "packing": packing,
    "splits": splits,
}
ON_GPU: dict[str, Check] = {
    "dispatch": dispatch,
    "large addresses": large_addresses,
    "end to end": end_to_end,
    "test suite": suite,
    "compute-sanitizer": sanitizer,
}


def run_check(name: str, check: Check, data: Data, quick: bool) -> Outcome:
    """Run one check to its end; an error counts as a failure."""
    start = time.perf_counter()
    count, worst, failed = 0, None, None
    try:
        for one in check(data, quick):
            count += 1
            worst = max(worst or 0.0, one.ratio)
            if one.ratio > 1:
                failed = failed or f"{one.name}: {one.ratio:.2f} times its bound"
        if count == 0 and name != "compute-sanitizer":
            failed = "nothing was compared"
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    return Outcome(name, count, worst, time.perf_counter() - start, failed)


def describe(device: str) -> dict[str, Any]:
    """The device's name, processors and memory, with the versions in use."""
    if not device.startswith("cuda"):
        return {"device": "Triton's interpreter"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the checks that the command line asks for; exit with 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", help="one check by name, or 'kernels' for those of the ops")
    parser.add_argument("--json", action="store_true", help="append to bench/results")
    args = parser.parse_args(argv)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if args.device == "cpu" and not interpreted:
        parser.error("--device cpu: needs TRITON_INTERPRET=1")
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no GPU here; nothing was checked")
    checks = KERNELS | ({} if interpreted else ON_GPU)
    if args.only == "kernels":
        checks = KERNELS
    elif args.only is not None:
        if args.only not in checks:
            parser.error(f"--only: expected one of kernels, {', '.join(checks)}, got {args.only!r}")
        checks = {args.only: checks[args.only]}
    about = describe(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'check':<20}{'compared':>9}{'worst / bound':>15}{'seconds':>9}")
    data = Data(args.device)
    outcomes = []
    with torch.no_grad() if args.only == "kernels" else torch.enable_grad():
        for name, check in checks.items():
            outcome = run_check(name, check, data, args.quick)
            outcomes.append(outcome)
            worst = "" if outcome.worst is None else f"{outcome.worst:.3f}"
            said = "good" if outcome.failed is None else f"FAILED {outcome.failed}"
            print(f"{name:<20}{outcome.comparisons:>9}{worst:>15}{outcome.seconds:>9.1f}  {said}")
    if args.json:
        results = [asdict(one) for one in outcomes]
        for one in results:
            if one["worst"] == torch.inf:
                one["worst"] = None
        stored.append("gpu_check", {"case": "gpu_check", **about, "checks": results})
    sys.exit(1 if any(one.failed for one in outcomes) else 0)


if __name__ == "__main__":
    main()
