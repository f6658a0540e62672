"""Logging a model's layers: python -m bench.bench_logging [--quick]

The floor is what no logging can do without: the forward pass, and the backward pass through the
activations alone, down to the lowest watched layers. "torch hooks" is what a user would write:
hooks that keep x, and einsum of the projected x and dy. "full backward" computes the weight
gradients of the whole batch, as training does, and no per-sample gradient at all.

"60 linear layers of 64" is the case that hooks themselves decide: a layer's forward and backward
pass take some 50 us there, and projections of rank 16 are a quarter of its multiplications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bench._harness import Case, arguments, run_cases
from logra_kernels.capture import Capture
from logra_kernels.capture.layers import Layer, layer_kind
from logra_kernels.projection import build_projections


class Perceptron(nn.Sequential):
    """Many small linear layers, each followed by a ReLU."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())))


class Setting:
    """A small model with random weights, a batch, and the watched layers with their projections.

    precision: "fp32", "autocast" (to bf16), or "bf16" for a model in bf16.
    """

    def __init__(
        self, model: nn.Module, batch: Tensor, rank: int, precision: str, only: str
    ) -> None:
        self.model = model.bfloat16() if precision == "bf16" else model
        self.batch = batch
        self.autocast = precision == "autocast"
        self.layers: list[Layer] = []
        for name, module in self.model.named_modules():
            kind = layer_kind(module)
            if only in name and kind is not None:
                self.layers.append(kind(name, module))
        widths = {layer.name: (layer.in_features, layer.out_features) for layer in self.layers}
        projections = build_projections(widths, rank)
        for layer in self.layers:
            layer.projection = projections[layer.name]
        self.lowest: list[Layer] = []  # whose outputs autograd does not reach by itself
        self.hooked(self._find_lowest, self.layers)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            if isinstance(self.model, Perceptron):
                return self.model(self.batch).square().sum()
            logits = self.model(self.batch).logits[:, :-1]
            return functional.cross_entropy(
                logits.flatten(0, 1).float(), self.batch[:, 1:].flatten(), reduction="sum"
            )

    def freeze(self, frozen: bool) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(not frozen)

    def hooked(self, hook: Callable[..., Tensor | None], layers: list[Layer]) -> None:
        """One pass with a forward hook on these layers, all parameters frozen."""
        self.freeze(True)
        handles = [la.module.register_forward_hook(partial(hook, la)) for la in layers]
        with torch.enable_grad():
            self.loss().backward()
        for handle in handles:
            handle.remove()

    def _find_lowest(
        self, layer: Layer, _: nn.Module, __: tuple[Tensor], output: Tensor
    ) -> Tensor | None:
        if output.requires_grad:
            return None
        self.lowest.append(layer)
        return output.clone().requires_grad_()

    def rows_of_capture(self) -> Tensor:
        self.freeze(False)
        with torch.enable_grad(), Capture(self.model, self.layers, len(self.batch)) as capture:
            self.loss().backward()
        return capture.rows()

    def rows_of_hooks(self) -> Tensor:
        gradients: dict[str, Tensor] = {}

        def keep(layer: Layer, x: Tensor, dy: Tensor) -> None:
            proj_in, proj_out = layer.projection.proj_in, layer.projection.proj_out
            assert proj_in is not None
            assert proj_out is not None
            x, dy = x @ proj_in.to(x.dtype).T, dy @ proj_out.to(dy.dtype).T
            gradients[layer.name] = torch.einsum("nto,nti->noi", dy.float(), x.float())

        def hook(layer: Layer, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.clone().requires_grad_()
            output.register_hook(partial(keep, layer, args[0].detach()))
            return output

        self.hooked(hook, self.layers)
        return torch.cat([gradients[layer.name].flatten(1) for layer in self.layers], dim=1)

    def floor(self) -> None:
        def hook(_: Layer, __: nn.Module, ___: tuple[Tensor], output: Tensor) -> Tensor:
            return output.clone().requires_grad_()

        self.hooked(hook, self.lowest)

    def full_backward(self) -> None:
        self.freeze(False)
        self.model.zero_grad()
        with torch.enable_grad():
            self.loss().backward()
        self.model.zero_grad()

    def forward_flops(self) -> float:
        linear = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear))
        tokens = self.batch[..., 0] if isinstance(self.model, Perceptron) else self.batch
        return 2.0 * linear * tokens.numel()


def llama(blocks: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).eval()


def language_model(
    blocks: int, num_examples: int, num_tokens: int, rank: int, precision: str = "fp32"
) -> Case:
    ids = torch.randint(0, 8192, (num_examples, num_tokens))
    return case(
        Setting(llama(blocks), ids, rank, precision, only="mlp"),
        f"Llama, {blocks} blocks of 576, N={num_examples}, T={num_tokens}, rank {rank}, "
        f"{precision}",
        {
            "model": "llama",
            "blocks": blocks,
            "N": num_examples,
            "T": num_tokens,
            "rank": rank,
            "dtype": precision,
        },
    )


def small_layers(depth: int, width: int, num_examples: int, num_tokens: int, rank: int) -> Case:
    x = torch.randn(num_examples, num_tokens, width)
    return case(
        Setting(Perceptron(depth, width), x, rank, "fp32", only=""),
        f"{depth} linear layers of {width}, N={num_examples}, T={num_tokens}, rank {rank}, fp32",
        {
            "model": "perceptron",
            "blocks": depth,
            "N": num_examples,
            "T": num_tokens,
            "rank": rank,
            "dtype": "fp32",
        },
    )


def case(setting: Setting, title: str, params: dict[str, object]) -> Case:
    expected = setting.rows_of_hooks()

    def pass_alone(run: Callable[[], None]) -> Tensor:
        run()
        return expected  # there is nothing to check: it gives no rows

    exact = params["dtype"] == "fp32"
    return Case(
        "logging",
        title,
        {
            "logra": setting.rows_of_capture,
            "torch hooks, einsum": setting.rows_of_hooks,
            "floor": partial(pass_alone, setting.floor),
            "full backward": partial(pass_alone, setting.full_backward),
        },
        expected,
        # float32 sums over T in another order; the hooks' bf16 products have 8 bits, twice
        rtol=1e-4 if exact else 3e-2,
        num_bytes=0.0,
        flops=2 * setting.forward_flops(),
        apart=frozenset({"floor", "full backward"}),
        params=params,
    )


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield language_model(4, 4, 128, 64)
        return
    yield language_model(8, 4, 128, 64)
    yield language_model(8, 8, 256, 64)
    yield language_model(4, 1, 64, 64)
    for rank in (16, 128):
        yield language_model(4, 4, 128, rank)
    for precision in ("autocast", "bf16"):
        yield language_model(4, 8, 256, 64, precision)
    yield small_layers(60, 64, 8, 64, 16)
    yield small_layers(40, 256, 8, 64, 16)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick), args)


if __name__ == "__main__":
    main()
