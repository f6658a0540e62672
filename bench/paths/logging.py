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
from bench.table1.setting import BYTES, reference_text
from logra_kernels.capture import Capture
from logra_kernels.capture.layers import Layer, layer_kind
from logra_kernels.projection import build_projections
from logra_kernels.run import Run


class Perceptron(nn.Sequential):
    """Many small linear layers, each followed by a ReLU."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())))


class Setting:
    """A small model with random weights, a batch, and the watched layers with their projections.

    precision: "fp32", "autocast" (to bf16), or "bf16" for a model in bf16.
    coordinates: of eigenbasis rows, by a pilot over the batch; None: random projections of `rank`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Tensor,
        rank: int,
        precision: str = "fp32",
        only: str = "",
        coordinates: int | None = None,
    ) -> None:
        self.model = (model.bfloat16() if precision == "bf16" else model).to(batch.device)
        self.batch, self.rank, self.precision = batch, rank, precision
        kinds = {n: (layer_kind(m), m) for n, m in self.model.named_modules() if only in n}
        self.layers = [kind(name, module) for name, (kind, module) in kinds.items() if kind]
        widths = {layer.name: (layer.in_features, layer.out_features) for layer in self.layers}
        projections = build_projections(widths, rank)
        for layer in self.layers:
            layer.projection = projections[layer.name]
        self.rows = f"rank {rank}"
        if coordinates is not None:
            self.rows = f"D={coordinates:,} of an eigenbasis"
            self.layers = self._piloted(only, coordinates)
        self.lowest: list[Layer] = []  # autograd does not reach their outputs by itself
        self.hooked(self._find_lowest, self.layers)

    def _piloted(self, only: str, coordinates: int) -> list[Layer]:
        """The watched layers with the projection of a pilot over the batch."""
        run, ids = Run("pilot"), range(len(self.batch))  # which stores nothing
        run.watch(self.model, name_filter=[only])
        with torch.enable_grad(), run.pilot("eigen", coordinates=coordinates), run(ids):
            self.loss().backward()
        return run(ids).capture.layers

    def loss(self) -> Tensor:
        """The summed loss of the batch."""
        autocast = torch.autocast(self.batch.device.type, torch.bfloat16)
        with autocast if self.precision == "autocast" else nullcontext():
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
            x, dy = x @ proj_in.to(x).T, dy @ proj_out.to(dy).T
            made = torch.einsum("nto,nti->noi", dy.float(), x.float())
            chosen, scale = layer.projection.coordinates, layer.projection.scale
            if chosen is not None and scale is not None:
                made = made.flatten(1)[:, chosen] * scale
            gradients[layer.name] = made

        def hook(layer: Layer, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.clone().requires_grad_()
            output.register_hook(partial(keep, layer, args[0].detach()))
            return output

        self.hooked(hook, self.layers)
        return torch.cat([gradients[layer.name].flatten(1) for layer in self.layers], dim=1)

    def floor(self) -> None:
        """A forward pass, and a backward pass of the activations alone."""
        self.hooked(lambda _, __, ___, output: output.clone().requires_grad_(), self.lowest)

    def full_backward(self) -> None:
        """A forward and a backward pass with weight gradients, as in training."""
        self.model.requires_grad_(True)
        self.model.zero_grad()
        with torch.enable_grad():
            self.loss().backward()
        self.model.zero_grad()

    def case(self, what: str, model: str) -> Case:
        """The setting as a case of the harness; `what` it is, in words."""
        apart = {"floor": self.floor, "full backward": self.full_backward}
        n, t = self.batch.shape[:2]
        return Case(
            "logging",
            f"{what}, N={n}, T={t}, {self.rows}, {self.precision}",
            {OURS: self.rows_of_capture, "torch hooks, einsum": self.rows_of_hooks, **apart},
            self.rows_of_hooks(),
            # float32 sums over T in another order; the hooks' bf16 products have 8 bits, twice
            rtol=1e-4 if self.precision == "fp32" else 3e-2,
            flops=4.0 * linear_weights(self.model) * n * t,
            errors=dict.fromkeys(apart, lambda _: 0.0),  # these passes give no rows
            apart=frozenset(apart),
            params={"model": model},
        )


def language_model(
    blocks: int,
    n: int,
    t: int,
    rank: int,
    precision: str = "fp32",
    width: int = 576,
    device: str = "cpu",
) -> Case:
    """N texts of T tokens through a small Llama."""
    model = llama(blocks=blocks, width=width, key_value_heads=max(1, width // 192))
    ids = torch.randint(0, 8192, (n, t), device=device)
    setting = Setting(model, ids, rank, precision, only="mlp")
    return setting.case(f"Llama, {blocks} blocks of {width}", "llama")


def eigenbasis(blocks: int, n: int, t: int, coordinates: int, width: int = 384) -> Case:
    """N texts of T bytes through a small Llama: Table 1's of 7 million weights has 4 blocks."""
    model = llama(blocks=blocks, width=width, inner=width * 8 // 3, vocabulary=BYTES)
    text = torch.tensor(list(reference_text().encode()[: n * t])).view(n, t)
    setting = Setting(model, text, 64, only="mlp", coordinates=coordinates)
    return setting.case(f"Llama, {blocks} blocks of {width}", "llama")


def small_layers(depth: int, width: int, n: int, t: int, rank: int) -> Case:
    """N examples of T tokens through `depth` linear layers."""
    setting = Setting(Perceptron(depth, width), torch.randn(n, t, width), rank)
    return setting.case(f"{depth} linear layers of {width}", "perceptron")


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
    yield eigenbasis(4, 8, 256, 32768)
    yield small_layers(60, 64, 8, 64, 16)
    yield small_layers(40, 256, 8, 64, 16)
