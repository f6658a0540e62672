"""Logging a language model's MLP layers: python -m bench.bench_logging [--quick]

The floor is what no logging can do without: the forward pass, and the backward pass through the
activations alone, down to the lowest watched layer. "torch hooks" is what a user would write: hooks
that keep x, and einsum of the projected x and dy. "full backward" computes the weight gradients of
the whole batch, as training does, and no per-sample gradient at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bench._harness import Case, arguments, run_cases
from logra_kernels.capture import Capture
from logra_kernels.layers import Layer, layer_kind
from logra_kernels.projection import build_projections

RANK = 64


class Setting:
    """A small Llama with random weights, a batch, and the watched layers with their projections."""

    def __init__(self, blocks: int, num_examples: int, num_tokens: int) -> None:
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=blocks,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
        self.model = LlamaForCausalLM(config).eval()
        self.ids = torch.randint(0, 8192, (num_examples, num_tokens))
        self.layers: list[Layer] = []
        for name, module in self.model.named_modules():
            kind = layer_kind(module)
            if "mlp" in name and kind is not None:
                self.layers.append(kind(name, module))
        widths = {layer.name: (layer.in_features, layer.out_features) for layer in self.layers}
        projections = build_projections(widths, RANK)
        for layer in self.layers:
            layer.projection = projections[layer.name]

    def loss(self) -> Tensor:
        logits = self.model(self.ids).logits[:, :-1]
        return functional.cross_entropy(
            logits.flatten(0, 1), self.ids[:, 1:].flatten(), reduction="sum"
        )

    def freeze(self, frozen: bool) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(not frozen)

    def hooked(self, hook: Callable[..., Tensor | None]) -> None:
        """One pass with a forward hook on every watched layer, all parameters frozen."""
        self.freeze(True)
        handles = [la.module.register_forward_hook(partial(hook, la)) for la in self.layers]
        with torch.enable_grad():
            self.loss().backward()
        for handle in handles:
            handle.remove()

    def rows_of_capture(self) -> Tensor:
        self.freeze(False)
        with torch.enable_grad(), Capture(self.model, self.layers, len(self.ids)) as capture:
            self.loss().backward()
        return capture.rows()

    def rows_of_hooks(self) -> Tensor:
        gradients: dict[str, Tensor] = {}

        def keep(layer: Layer, x: Tensor, dy: Tensor) -> None:
            proj_in, proj_out = layer.projection.proj_in, layer.projection.proj_out
            assert proj_in is not None
            assert proj_out is not None
            gradients[layer.name] = torch.einsum("nto,nti->noi", dy @ proj_out.T, x @ proj_in.T)

        def hook(layer: Layer, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.clone().requires_grad_()
            output.register_hook(partial(keep, layer, args[0].detach()))
            return output

        self.hooked(hook)
        return torch.cat([gradients[layer.name].flatten(1) for layer in self.layers], dim=1)

    def floor(self) -> None:
        def hook(_: Layer, __: nn.Module, ___: tuple[Tensor], output: Tensor) -> Tensor | None:
            return None if output.requires_grad else output.clone().requires_grad_()

        self.hooked(hook)

    def full_backward(self) -> None:
        self.freeze(False)
        self.model.zero_grad()
        with torch.enable_grad():
            self.loss().backward()
        self.model.zero_grad()

    def forward_flops(self) -> float:
        linear = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear))
        return 2.0 * linear * self.ids.numel()


def cases(quick: bool) -> Iterator[Case]:
    for blocks, num_examples, num_tokens in ((4, 4, 128),) if quick else ((8, 4, 128), (8, 8, 256)):
        setting = Setting(blocks, num_examples, num_tokens)
        expected = setting.rows_of_hooks()

        def pass_alone(run: Callable[[], None], expected: Tensor = expected) -> Tensor:
            run()
            return expected  # there is nothing to check: it gives no rows

        flops = 2 * setting.forward_flops()
        yield Case(
            "logging",
            f"Llama, {blocks} blocks of 576, N={num_examples}, T={num_tokens}, rank {RANK}, fp32",
            {
                "logra": setting.rows_of_capture,
                "torch hooks, einsum": setting.rows_of_hooks,
                "floor": partial(pass_alone, setting.floor),
                "full backward": partial(pass_alone, setting.full_backward),
            },
            expected,
            rtol=1e-4,  # float32 sums over T in another order
            num_bytes=0.0,
            flops=flops,
            apart=frozenset({"floor", "full backward"}),
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    run_cases(cases(args.quick), args)


if __name__ == "__main__":
    main()
