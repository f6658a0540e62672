# mypy: allow-untyped-calls
"""What the GPU kernels reach, on a GPU: python -m bench.gpu.speed [--quick] [--json]

Each op against plain torch on the same GPU, and logging a Llama in bfloat16 against its forward and
activation-gradient pass: the cases of `bench`, made on the GPU, larger. Beside them stand the copy
bandwidth and the rate of bfloat16 products, measured in the same run. Each result is checked before
it is timed. Times are medians of CUDA events, with the caches flushed before each.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu.check import describe
from bench.harness.cases import Case, check, options, prepare, publish
from bench.harness.tables import table
from bench.ops import gradients, rows, scans
from tools.timing import Timer


@dataclass
class Limits:
    """What the GPU reaches in plain copies and bfloat16 products."""

    copy_gb_per_s: float
    product_gflop_per_s: float

    @classmethod
    def measure(cls, timer: Timer, device: str, size: int = 1 << 30, edge: int = 8192) -> "Limits":
        a = torch.empty(size, dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
        m = torch.randn(edge, edge, device=device).bfloat16()
        copy_s = timer.median_s(lambda: b.copy_(a))
        product_s = timer.median_s(lambda: m @ m)
        return cls(2e-9 * size / copy_s, 2e-9 * edge**3 / product_s)


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """A case takes memory only when its turn comes."""
    from bench.paths.logging import language_model  # imports transformers

    n, dim = (400, 512) if quick else (65536, 16384)
    for num_queries in (1, 16, 256):
        yield partial(scan, num_queries, n, dim)
    yield partial(ends, 16, n, dim)
    tokens = (4, 64, 256) if quick else (64, 1024, 4096)
    for dtype in ("bf16", "fp32"):
        yield partial(gradients.projected_gradients, *tokens, 64, dtype)
    yield partial(scans.self_influence, n, dim // 4)
    yield partial(rows.covariance_update, n // 16, dim // 4, "fp32", "fp16")
    yield partial(rows.pack_rows, n // 16, dim)
    model = (2, 2, 16, 16, "bf16", 192) if quick else (8, 8, 1024, 64, "bf16", 2048)
    yield partial(language_model, *model, device=device)


def scan(num_queries: int, num_rows: int, dim: int) -> Case:
    stored = torch.randn(num_rows, dim).half()
    return scans.scores(torch.randn(num_queries, dim), stored, torch.rand(num_rows) + 0.5)


def ends(num_queries: int, num_rows: int, dim: int) -> Case:
    return scans.topk_scores(torch.randn(num_queries, dim), torch.randn(num_rows, dim).half(), 20)


def measure(case: Case, timer: Timer, limits: Limits) -> dict[str, Any]:
    """The record of one case."""
    errors, left_out = check(case)
    seconds = {name: timer.median_s(case.providers[name]) for name in errors}
    best = case.best(seconds)
    gb, gflop = case.num_bytes / 1e9, case.flops / 1e9
    providers = [
        {
            "provider": name,
            "median_ms": median_s * 1e3,
            "x_best": None if best is None else seconds[best] / median_s,
            "gb_per_s": gb / median_s,
            "of_copy": gb / median_s / limits.copy_gb_per_s,
            "gflop_per_s": gflop / median_s,
            "of_product": gflop / median_s / limits.product_gflop_per_s,
            "error": errors[name],
        }
        for name, median_s in seconds.items()
    ]
    record = {"bench": "gpu_speed", "case": f"{case.op}: {case.title}", "limits": asdict(limits)}
    return {**record, "providers": providers, "left_out": left_out}


def run(device: str, timer: Timer, limits: Limits, quick: bool) -> Iterator[dict[str, Any]]:
    for build in cases(device, quick):
        with torch.device(device):
            case = build()
        with torch.no_grad(), torch.device(device):
            yield measure(case, timer, limits)


def main(argv: list[str] | None = None) -> None:
    """Measure every case on the GPU."""
    args = options(__doc__, "quick", "json").parse_args(argv)
    about = describe()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    prepare()
    timer = Timer()
    limits = Limits.measure(timer, "cuda")
    print(table([asdict(limits)]))
    for record in run("cuda", timer, limits, args.quick):
        publish({**record, **about}, args.json)


if __name__ == "__main__":
    main()
