# mypy: allow-untyped-calls
"""What the GPU kernels reach, on a GPU: python -m bench.gpu.speed [--json] [--only PART]

Parts:
  ops      each op at the sizes of `bench.gpu.report`, against plain torch on the same GPU, beside
           the copy bandwidth and the matrix rate measured in the same run, and the prediction
  logging  a Llama of random weights in bfloat16: logging against forward + activation gradients
  table1   the paper's Table 1 against kronfluence, in `bench.table1` (further arguments after --)

Each result is checked before it is timed. Times are medians of CUDA events, with the caches
flushed before each.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.gpu.check import describe
from bench.gpu.report import GPUS, WORK, Gpu, predict, problems
from bench.harness import results as stored
from logra_kernels.triton.catalogue import recorded
from tools.timing import Timer

# Of the largest value: torch's products of half types round their results to 8 or 11 bits.
TOLERANCE = 2.0**-6


@dataclass
class Measured:
    """One provider of one case. of_bandwidth and of_matrix_rate: parts of this run's limits."""

    part: str
    case: str
    provider: str
    median_s: float
    bytes_per_s: float | None = None
    of_bandwidth: float | None = None
    flop_per_s: float | None = None
    of_matrix_rate: float | None = None
    predicted_s: float | None = None
    note: str = ""


@dataclass
class Limits:
    """The bandwidth and the matrix rate that the GPU reaches in plain copies and products."""

    copy_bytes_per_s: float
    matrix_flop_per_s: float


def measure_limits(timer: Timer, device: str, size: int = 1 << 30) -> Limits:
    """Time a copy of `size` bytes and a bfloat16 product."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copy_s = timer.median_s(lambda: b.copy_(a))
    edge = 8192 if size >= 1 << 30 else 256
    m = torch.randn(edge, edge, device=device).bfloat16()
    product_s = timer.median_s(lambda: m @ m)
    return Limits(2 * size / copy_s, 2 * edge**3 / product_s)


def real(value: Any, device: str) -> Any:
    """value, or a random tensor on the device if value is a tensor without memory."""
    if not isinstance(value, Tensor) or value.device.type != "meta":
        return value
    if value.dtype == torch.bool:
        return torch.ones(value.shape, dtype=torch.bool, device=device)
    return torch.randn(value.shape, dtype=value.dtype, device=device)


def plain_torch(name: str, arguments: list[Any]) -> Callable[[], Any] | None:
    """What a user of torch would write, in the fastest way that the types allow."""
    if name == "scores":
        queries, rows, *scale = arguments
        low = queries.to(rows.dtype)
        if scale:
            return lambda: (low @ rows.T).float() * scale[0]
        return lambda: (low @ rows.T).float()
    if name == "topk_scores":
        queries, rows, k, scale = arguments
        low = queries.to(rows.dtype)
        return lambda: ((low @ rows.T).float() * scale).topk(k, dim=1).values
    if name == "self_influence":
        rows, factor = arguments
        low = factor.to(rows.dtype)
        return lambda: (rows @ low.T).float().square().sum(1)
    if name == "projected_gradients":
        x, dy, proj_in, proj_out, mask = arguments
        keep = mask[..., None]

        def gradients() -> Tensor:
            left = (dy if proj_out is None else dy @ proj_out.T) * keep
            right = x if proj_in is None else x @ proj_in.T
            return torch.bmm(left.mT.to(right.dtype), right).float()

        return gradients
    if name == "covariance_update_":
        cov, rows = arguments
        return lambda: cov + (rows.T @ rows).float()
    return None


def checked(got: Any, wanted: Any, name: str) -> float:
    """The largest difference over the largest value."""
    if name == "topk_scores":
        got = got[0]
    if name == "covariance_update_":
        return 0.0  # adds in place: bench.gpu.check compares it
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


def ops(timer: Timer, device: str, limits: Limits, gpu: Gpu | None) -> Iterator[Measured]:
    """Every op's time beside its prediction and the GPU's limits."""
    for case, call in problems():
        if not isinstance(call, partial):
            raise TypeError(f"{case}: expected a partial")
        name = call.func.__name__
        architecture = gpu.architecture if gpu else "sm_90"
        entries = [e for e in recorded(case, architecture, call) if e.kernel_name in WORK]
        works = [WORK[e.kernel_name](e, e.arguments) for e in entries]
        num_bytes, flops = works[0].memory, sum(w.half + w.full for w in works)
        predicted = sum(predict(gpu, case, e).predicted_us for e in entries) / 1e6 if gpu else None
        seen: dict[int, Any] = {}
        arguments = [seen.setdefault(id(a), real(a, device)) for a in call.args]
        ours = partial(call.func, *arguments, **call.keywords)
        providers: dict[str, Callable[[], Any]] = {"logra": ours}
        theirs = plain_torch(name, arguments)
        if theirs is not None:
            error = checked(ours(), theirs(), name)
            if not error <= TOLERANCE:
                raise AssertionError(f"{case}: off by {error:.1e} of the largest value")
            providers["torch"] = theirs
        for provider, run in providers.items():
            median_s = timer.median_s(run)
            yield Measured(
                *("ops", case, provider, median_s),
                bytes_per_s=num_bytes / median_s,
                of_bandwidth=num_bytes / median_s / limits.copy_bytes_per_s,
                flop_per_s=flops / median_s,
                of_matrix_rate=flops / median_s / limits.matrix_flop_per_s,
                predicted_s=predicted if provider == "logra" else None,
            )
        del arguments, ours, theirs, providers, seen


def llama(blocks: int, width: int, vocabulary: int) -> Any:
    """A Llama of random weights, with heads of at most 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(4, width // 128)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return LlamaForCausalLM(config)


def projected_layers(model: nn.Module, rank: int) -> Any:
    """The layers of a model's MLPs, as a capture takes them."""
    from logra_kernels.capture.layers import layer_kind
    from logra_kernels.projection import build_projections

    kinds = {n: (layer_kind(m), m) for n, m in model.named_modules() if "mlp" in n}
    layers = [kind(name, module) for name, (kind, module) in kinds.items() if kind is not None]
    widths = {layer.name: (layer.in_features, layer.out_features) for layer in layers}
    for layer, projection in zip(layers, build_projections(widths, rank).values(), strict=True):
        layer.projection = projection
    return layers


def logging(timer: Timer, device: str, quick: bool) -> Iterator[Measured]:
    """Rows of one batch by a capture, against the passes that none can do without."""
    from logra_kernels.capture import Capture

    blocks, width, examples, tokens = (2, 64, 2, 16) if quick else (8, 2048, 8, 1024)
    model = llama(blocks, width, vocabulary=256 if quick else 32000).to(device).bfloat16().eval()
    layers = projected_layers(model, rank=16 if quick else 64)
    ids = torch.randint(0, model.config.vocab_size, (examples, tokens), device=device)

    def loss() -> Tensor:
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")

    def floor() -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        first: nn.Module = model.model.embed_tokens
        handle = first.register_forward_hook(lambda _, __, out: out.requires_grad_())
        loss().backward()
        handle.remove()
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    def capture() -> Tensor:
        with Capture(model, layers, examples) as one:
            loss().backward()
        return one.rows()

    def full() -> None:
        model.zero_grad()
        loss().backward()

    rows = capture()
    if not bool(rows.isfinite().all()) or not bool((rows != 0).any()):
        raise AssertionError("logging: expected finite rows that are not zero")
    title = f"Llama, {blocks} blocks of {width}, N={examples}, T={tokens}, bfloat16"
    times = {
        "logra": timer.median_s(capture),
        "forward + activation gradients": timer.median_s(floor),
        "full backward": timer.median_s(full),
    }
    base = times["forward + activation gradients"]
    for provider, seconds in times.items():
        note = f"{seconds / base:.3f} of the floor, {ids.numel() / seconds:.0f} tokens/s"
        yield Measured("logging", title, provider, seconds, note=note)


def known(name: str) -> Gpu | None:
    """The data sheet of the GPU that torch names, if bench.gpu.report has one."""
    return next((gpu for gpu in GPUS if gpu.name in name), None)


def show(one: Measured) -> str:
    """A measurement as a line."""
    parts = [f"{one.case:<84}", f"{one.provider:<32}", f"{one.median_s * 1e3:>10.3f} ms"]
    if one.bytes_per_s is not None and one.of_bandwidth is not None:
        parts.append(f"{one.bytes_per_s / 1e9:>8.0f} GB/s {one.of_bandwidth:>6.1%}")
    if one.flop_per_s is not None and one.of_matrix_rate is not None:
        parts.append(f"{one.flop_per_s / 1e12:>7.1f} TFLOP/s {one.of_matrix_rate:>6.1%}")
    if one.predicted_s is not None:
        parts.append(f"predicted {one.predicted_s * 1e3:.3f} ms")
    return " ".join([*parts, one.note]).rstrip()


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("ops", "logging", "table1"))
    parser.add_argument("--json", action="store_true", help="append to bench/results")
    args = parser.parse_args(argv[:cut])
    if not torch.cuda.is_available():
        sys.exit("gpu_bench: torch finds no GPU here; nothing was measured")
    about = describe("cuda")
    gpu = known(about["device"])
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    timer = Timer()
    limits = measure_limits(timer, "cuda")
    print(
        f"copy {limits.copy_bytes_per_s / 1e9:.0f} GB/s, "
        f"bfloat16 product {limits.matrix_flop_per_s / 1e12:.0f} TFLOP/s"
    )
    parts: dict[str, Callable[[], Iterator[Measured]]] = {
        "ops": partial(ops, timer, "cuda", limits, gpu),
        "logging": partial(logging, timer, "cuda", False),
    }
    for name, part in parts.items():
        if args.only not in (None, name):
            continue
        for one in part():
            print(show(one), flush=True)
            if args.json:
                stored.append("gpu_bench", {**about, **asdict(limits), **asdict(one)})
    if args.only in (None, "table1"):
        from bench.table1.command import main as table1

        table1(["--device", "cuda", *(["--json"] if args.json else []), *argv[cut + 1 :]])


if __name__ == "__main__":
    main()
