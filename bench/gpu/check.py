"""Everything that only a GPU can show to be right: python -m bench.gpu.check [--json]

- the kernels' test suite: every op's Triton kernel against the reference in float64, over types,
  ragged sizes, strides and addresses past 2^31 elements;
- equal bits however rows, queries and examples are split into calls, and from run to run;
- the torch ops give what the kernels give;
- a model's rows logged on the GPU, and a store scored on it, against the CPU;
- NVIDIA's compute-sanitizer on two files of the suite, where it is installed.

Prints a line a check, and ends with status 1 if one failed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import results
from bench.harness.cases import options
from logra_kernels import ops
from logra_kernels import triton as kernels

SUITE = results.ROOT / "tests" / "triton" / "kernels"
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def same(what: str, one: Any, other: Any) -> None:
    """Fail unless the bits are equal."""
    one = (one,) if isinstance(one, Tensor) else one
    other = (other,) if isinstance(other, Tensor) else other
    if not all(torch.equal(a, b) for a, b in zip(one, other, strict=True)):
        raise AssertionError(f"{what}: other bits")


def near(what: str, got: Tensor, wanted: Tensor, rtol: float) -> None:
    """Fail where a difference is more than so much of the row's largest value."""
    bound = rtol * wanted.abs().amax(1, keepdim=True)
    ratio = float(((got.cpu() - wanted).abs() / bound).nan_to_num(torch.inf).max())
    if ratio > 1:
        raise AssertionError(f"{what}: {ratio:.2f} times its bound")


def suite(device: str) -> None:
    run_tests([sys.executable], str(SUITE))


def sanitizer(device: str) -> None:
    """compute-sanitizer sees reads out of bounds and races that results do not show."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("  compute-sanitizer: not installed, left out")
        return
    files = [str(SUITE / f"test_triton_{name}.py") for name in ("scores", "covariance")]
    for kind in ("memcheck", "racecheck"):
        run_tests([tool, "--tool", kind, "--error-exitcode", "9", sys.executable], *files)


def run_tests(program: list[str], *paths: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [*program, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(
        command, env=environment, cwd=results.ROOT, capture_output=True, text=True
    )
    if done.returncode != 0 or " passed" not in done.stdout:
        raise AssertionError(done.stdout[-1500:] + done.stderr[-500:])


def splits(
    device: str,
    types: tuple[torch.dtype, ...] = TYPES,
    num_rows: int = 3000,
    dim: int = 4096,
    tokens: int = 400,
    width: int = 1024,
) -> None:
    """Two parts of a call give the bits of the whole, and so does the call repeated."""
    for dtype in types:
        queries = torch.randn(70, dim, device=device)
        rows = torch.randn(num_rows, dim, device=device).to(dtype)
        cut = num_rows // 3 + 1
        parts = rows[:cut], rows[cut:]
        whole = kernels.scores(queries, rows)
        for _ in range(3):
            same("scores, repeated", kernels.scores(queries, rows), whole)
        found = torch.cat([kernels.scores(queries, part) for part in parts], 1)
        same("scores, rows split", found, whole)
        found = torch.cat([kernels.scores(part, rows) for part in (queries[:1], queries[1:])])
        same("scores, queries split", found, whole)
        state = kernels.topk_scores(queries, parts[0], 20)
        state = kernels.topk_scores(queries, parts[1], 20, None, None, state, cut)
        same("topk_scores, rows split", state, kernels.topk_scores(queries, rows, 20))
        factor = torch.randn(dim, dim, device=device).tril()
        found = torch.cat([kernels.self_influence(part, factor) for part in parts])
        same("self_influence, rows split", found, kernels.self_influence(rows, factor))

        x, dy = (torch.randn(8, tokens, width, device=device).to(dtype) for _ in range(2))
        proj = torch.randn(64, width, device=device).to(dtype)
        whole = kernels.projected_gradients(x, dy, proj, proj)
        for _ in range(3):
            again = kernels.projected_gradients(x, dy, proj, proj)
            same("projected_gradients, repeated", again, whole)
        halves = (x[:1], dy[:1]), (x[1:], dy[1:])
        found = torch.cat([kernels.projected_gradients(*half, proj, proj) for half in halves])
        same("projected_gradients, examples split", found, whole)


def dispatch(device: str) -> None:
    """The torch ops launch these kernels."""
    queries, rows = torch.randn(9, 64, device=device), torch.randn(100, 64, device=device).half()
    same("scores", ops.scores(queries, rows), kernels.scores(queries, rows))
    best = kernels.topk_scores(queries, rows, 7)
    same("topk_scores", tuple(ops.topk_scores(queries, rows, 7)), best)
    x, proj = (torch.randn(*shape, device=device).bfloat16() for shape in ((3, 50, 64), (16, 64)))
    wanted = kernels.projected_gradients(x, x, proj, proj)
    same("projected_gradients", ops.projected_gradients(x, x, proj, proj), wanted)


def end_to_end(device: str) -> None:
    """Rows of a model, and influence from a store, on the device and on the CPU."""
    import logra_kernels as logra
    from logra_kernels.attribution import Attributor
    from logra_kernels.run.statistic import Covariance

    model = nn.Sequential(*(nn.Sequential(nn.Linear(96, 96), nn.Tanh()) for _ in range(3)))
    x, mask = torch.randn(32, 40, 96), torch.rand(32, 40) < 0.8
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "reference", Path(folder) / "device"]
        for where, path in zip(("cpu", device), paths, strict=True):
            run = logra.init(project=path.name, root_dir=folder)
            run.watch(model.to(where))
            run.add_lora(rank=16)
            run.setup({"log": "grad", "save": "grad", "statistic": {"grad": Covariance}})
            for ids in torch.arange(32).split(8):
                keep = mask[ids].to(where)
                with run(data_id=ids, mask=keep):
                    (model(x[ids].to(where)).square() * keep[..., None]).sum().backward()
            run.finalize()
        here, there = (Attributor(path) for path in paths)
        rows, others = (torch.from_numpy(one.store.take(range(32))) for one in (here, there))
        # About 2**-11 of the row's largest: fp16 rounds by 2**-12, float32 sums by less.
        near("rows", others, rows, 2.0**-11 + 2.0**-15)
        on_device = Attributor(paths[0], device=device)
        for mode in ("dot", "l-relatif"):
            got, wanted = (
                torch.as_tensor(one.scores(rows[:5], mode).scores) for one in (on_device, here)
            )
            near(f"scores, {mode}", got, wanted, 2.0**-13 + 2.0**-17)
            got, wanted = (
                torch.as_tensor(one.top_k(rows[:5], 5, mode).top_rows) for one in (on_device, here)
            )
            same(f"top_k, {mode}", got.cpu(), wanted)


CHECKS: dict[str, Callable[[str], None]] = {
    "test suite": suite,
    "splits": splits,
    "dispatch": dispatch,
    "end to end": end_to_end,
    "compute-sanitizer": sanitizer,
}


def run_check(name: str, check: Callable[[str], None], device: str) -> str | None:
    """Run one check to its end and print a line; why it failed, or None."""
    start = time.perf_counter()
    torch.manual_seed(0)
    failed = None
    try:
        check(device)
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    said = "good" if failed is None else f"FAILED {failed}"
    print(f"{name:<20}{time.perf_counter() - start:>8.1f} s  {said}", flush=True)
    return failed


def describe() -> dict[str, Any]:
    """The GPU's name, processors and memory, with the version in use; without one, the end."""
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here: nothing was done")
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "device": properties.name,
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def main(argv: list[str] | None = None) -> None:
    """Run every check on the GPU; exit with 1 if one fails."""
    args = options(__doc__, "json").parse_args(argv)
    about = describe()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    failed = {name: run_check(name, check, "cuda") for name, check in CHECKS.items()}
    if args.json:
        results.append("gpu_check", {"case": about["device"], **about, "failed": failed})
    sys.exit(1 if any(failed.values()) else 0)


if __name__ == "__main__":
    main()
