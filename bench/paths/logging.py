"""Logging a model's layers.

The floor is what no logging can do without: the forward pass, and the backward pass through the
activations alone, down to the lowest watched layers. "torch hooks" is what a user would write:
hooks that keep x, and einsum of the projected x and dy. "full backward" computes the weight
gradients of the whole batch, as training does, and no per-sample gradient at all.

The cost of hooks decides the case "60 linear layers of 64": a layer's forward and backward pass
take some 50 us there, and projections of rank 16 are a quarter of its multiplications.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness.cases import OURS, Case
from bench.harness.models import linear_weights, llama, summed_loss
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
        self, model: nn.Module, batch: Tensor, rank: int, precision: str = "fp32", only: str = ""
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
        self.lowest: list[Layer] = []  # autograd does not reach their outputs by itself
        self.hooked(self._find_lowest, self.layers)

    def loss(self) -> Tensor:
        """The summed loss of the batch."""
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            if isinstance(self.model, Perceptron):
                output: Tensor = self.model(self.batch)
                return output.square().sum()
            return summed_loss(self.model, self.batch)

    def hooked(self, hook: Callable[..., Tensor | None], layers: list[Layer]) -> None:
        """One pass with a forward hook on these layers, all parameters frozen."""
        self.model.requires_grad_(False)
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
        """Rows [N, D] by this package's capture."""
        self.model.requires_grad_(True)
        with torch.enable_grad(), Capture(self.model, self.layers, len(self.batch)) as capture:
            self.loss().backward()
        return capture.rows()

    def rows_of_hooks(self) -> Tensor:
        """Rows [N, D] by hooks and einsum, as one would write them in torch."""
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
        """A forward pass, and a backward pass of the activations alone."""

        def hook(_: Layer, __: nn.Module, ___: tuple[Tensor], output: Tensor) -> Tensor:
            return output.clone().requires_grad_()

        self.hooked(hook, self.lowest)

    def full_backward(self) -> None:
        """A forward and a backward pass with weight gradients, as in training."""
        self.model.requires_grad_(True)
        self.model.zero_grad()
        with torch.enable_grad():
            self.loss().backward()
        self.model.zero_grad()

    def case(self, title: str, **params: object) -> Case:
        """The setting as a case of the harness."""
        expected = self.rows_of_hooks()

        def pass_alone(run: Callable[[], None]) -> Tensor:
            run()
            return expected  # there is nothing to check: the pass gives no rows

        num_tokens = self.batch.shape[0] * self.batch.shape[1]
        return Case(
            "logging",
            title,
            {
                OURS: self.rows_of_capture,
                "torch hooks, einsum": self.rows_of_hooks,
                "floor": partial(pass_alone, self.floor),
                "full backward": partial(pass_alone, self.full_backward),
            },
            expected,
            # float32 sums over T in another order; the hooks' bf16 products have 8 bits, twice
            rtol=1e-4 if params["dtype"] == "fp32" else 3e-2,
            num_bytes=0.0,
            flops=4.0 * linear_weights(self.model) * num_tokens,
            apart=frozenset({"floor", "full backward"}),
            params=params,
        )


def language_model(blocks: int, n: int, t: int, rank: int, precision: str = "fp32") -> Case:
    """N texts of T tokens through a small Llama."""
    model = llama(blocks=blocks, key_value_heads=3)
    setting = Setting(model, torch.randint(0, 8192, (n, t)), rank, precision, only="mlp")
    title = f"Llama, {blocks} blocks of 576, N={n}, T={t}, rank {rank}, {precision}"
    return setting.case(title, model="llama", blocks=blocks, N=n, T=t, rank=rank, dtype=precision)


def small_layers(depth: int, width: int, n: int, t: int, rank: int) -> Case:
    """N examples of T tokens through `depth` linear layers."""
    setting = Setting(Perceptron(depth, width), torch.randn(n, t, width), rank)
    title = f"{depth} linear layers of {width}, N={n}, T={t}, rank {rank}, fp32"
    return setting.case(title, model="perceptron", blocks=depth, N=n, T=t, rank=rank, dtype="fp32")


def cases(quick: bool) -> Iterator[Case]:
    """The table of logging."""
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
