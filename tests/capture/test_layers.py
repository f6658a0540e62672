"""Which modules are layers, how wide they are, and which ones are refused with a sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from toy_models import autograd_rows, capture_rows, make_layers, tiny_gpt2

import logra_kernels as logra
from logra_kernels.capture import (
    Batch,
    Call,
    Capture,
    Layer,
    layer_kind,
    layers,
    register_layer_kind,
)
from logra_kernels.capture.kinds import Conv2dLayer, EmbeddingLayer, LinearLayer
from logra_kernels.capture.layers import make_layer
from logra_kernels.projection import ModuleProjection, build_projections


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(3, 4), LinearLayer),
        (nn.Conv2d(3, 4, 2), Conv2dLayer),
        (nn.Embedding(3, 4), EmbeddingLayer),
        (nn.Conv1d(3, 4, 2), None),
        (nn.LayerNorm(3), None),
        (nn.LSTM(3, 4), None),
        (nn.Bilinear(3, 4, 5), None),
    ],
)
def test_kinds(module: nn.Module, kind: type[Layer] | None) -> None:
    assert layer_kind(module) is kind


def test_hf_conv1d_is_a_transposed_linear() -> None:
    module = tiny_gpt2().get_submodule("transformer.h.0.mlp.c_fc")
    assert layer_kind(module) is LinearLayer
    layer = LinearLayer("c_fc", module, bias=True)
    assert (layer.in_features, layer.out_features) == (25, 96)


@pytest.mark.parametrize(
    ("module", "bias", "features"),
    [
        (nn.Linear(3, 4), False, (3, 4)),
        (nn.Linear(3, 4), True, (4, 4)),
        (nn.Linear(3, 4, bias=False), True, (3, 4)),
        (nn.Conv2d(6, 4, (2, 3)), True, (37, 4)),
        (nn.Conv2d(6, 4, (2, 3), groups=2), False, (18, 4)),
        (nn.Embedding(10, 4), True, (10, 4)),
    ],
)
def test_widths(module: nn.Module, bias: bool, features: tuple[int, int]) -> None:
    kind = layer_kind(module)
    assert kind is not None
    layer = kind("m", module, bias)
    assert (layer.in_features, layer.out_features) == features
    assert (layer.ki, layer.ko) == features


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embeddings_that_are_refused(options: dict[str, Any]) -> None:
    message = f"module wte: nn.Embedding with {next(iter(options))} is not supported"
    with pytest.raises(ValueError, match=message):
        EmbeddingLayer("wte", nn.Embedding(5, 2, **options))


def test_lazy_linear_is_refused() -> None:
    refused("module lazy: its shape is not known yet", LinearLayer, "lazy", nn.LazyLinear(3))


def test_projection_of_other_width_is_refused() -> None:
    layer = LinearLayer("m", nn.Linear(3, 4))
    message = re.escape("projection of m: expected widths (I, O) = (3, 4), got (4, 4)")
    with pytest.raises(ValueError, match=message):
        layer.projection = ModuleProjection(4, 4)


def test_a_new_projection_replaces_the_old_one() -> None:
    """What a layer keeps of its projection on a device does not outlive it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    (layer,) = make_layers(model, rank=2)
    x = torch.randn(3, 6)
    rows = []
    for seed in (0, 1, 0):
        layer.projection = build_projections({"0": (6, 5)}, 2, seed=seed)["0"]
        rows.append(capture_rows(model, [layer], 3, lambda: model(x).square().sum()))
    assert torch.equal(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1])


@pytest.mark.parametrize(
    ("lead", "masked", "want"),
    [
        ([4], False, (1, False)),
        ([4], True, (1, False)),  # pooled: the mask is for other layers
        ([20], True, (5, True)),  # flattened before the layer
        ([4, 5], True, (5, True)),
        ([4, 5], False, (5, True)),
        ([4, 2, 3], False, (6, True)),
        ([4, 1], False, (1, True)),
    ],
)
def test_token_counts(lead: list[int], masked: bool, want: tuple[int, bool]) -> None:
    batch = Batch(4, torch.ones(4, 5, dtype=torch.bool) if masked else None)
    assert batch.count_tokens("m", torch.Size(lead), torch.Size([*lead, 7])) == want


@pytest.mark.parametrize("lead", [[], [3], [20], [1, 5], [5, 4]])
def test_shapes_without_an_example_axis(lead: list[int]) -> None:
    with pytest.raises(ValueError, match="leave it out by name_filter or type_filter"):
        Batch(4).count_tokens("m", torch.Size(lead), torch.Size([*lead, 7]))


def test_input_given_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: Tensor = self.linear(input=x)
            return out

    model, x = ByKeyword(), torch.randn(4, 3)
    with Capture(model, make_layers(model), 4) as capture:
        model(x).sum().backward()
    want = x[:, None, :].expand(4, 2, 3)
    assert torch.equal(capture.gradients()["linear"], want)


@pytest.mark.parametrize(
    ("init", "tokens", "given"),
    [
        ("normal", torch.bfloat16, torch.bfloat16),
        ("normal", torch.float32, torch.float32),
        ("normal", torch.float64, torch.float64),
        ("rademacher", torch.float16, torch.float16),  # 1 / sqrt(4) is exact
    ],
)
def test_a_projection_meets_tokens_in_their_own_type(
    init: str, tokens: torch.dtype, given: torch.dtype
) -> None:
    layer = LinearLayer("layer", nn.Linear(40, 30).to(tokens))
    layer.projection = build_projections({"layer": (40, 30)}, 4, init)["layer"]
    proj = layer._proj_out(torch.zeros(2, 30, dtype=tokens))
    assert proj is not None
    assert layer.projection.proj_out is not None
    assert proj.dtype == given
    assert torch.equal(proj.double(), layer.projection.proj_out.double())


def test_a_projection_that_the_tokens_type_cannot_hold_stays_in_float32() -> None:
    layer = LinearLayer("layer", nn.Linear(40, 30))
    layer.projection = build_projections({"layer": (40, 30)}, 2, "rademacher")["layer"]
    for tokens in (torch.zeros(2, 30).bfloat16(), torch.zeros(2, 30).half()):
        proj = layer._proj_out(tokens)
        assert proj is not None
        assert proj.dtype == torch.float32


def test_a_bfloat16_capture_has_the_rows_of_its_tokens_in_float32() -> None:
    """x, dy and P are exact in float32, so only the sums' order may differ."""
    model = nn.Sequential(nn.Linear(40, 36), nn.ReLU(), nn.Linear(36, 30)).bfloat16()
    layers = make_layers(model, rank=4)
    seen = {}

    def keep(layer: Layer, module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda dy: seen.update({layer.name: (args[0].detach(), dy)}))

    for layer in layers:
        layer.module.register_forward_hook(lambda *call, layer=layer: keep(layer, *call))
    x = torch.randn(3, 7, 40).bfloat16().requires_grad_()
    with Capture(model, layers, 3) as capture:
        model(x).square().sum().backward()
    for layer in layers:
        tokens, dy = (t.double() for t in seen[layer.name])
        proj_in, proj_out = layer.projection.proj_in, layer.projection.proj_out
        assert proj_in is not None
        assert proj_out is not None
        wanted = torch.einsum("nto,nti->noi", dy @ proj_out.double().T, tokens @ proj_in.double().T)
        got = capture.gradients()[layer.name]
        torch.testing.assert_close(
            got.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
        )


class ScaledLinear(nn.Module):
    """y = 3 W x: a layer that the package does not know."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_out, width_in))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * functional.linear(x, self.weight)


class ScaledLayer(Layer):
    """Its weight's gradient is Σ_t (3 dy_t) x_tᵀ."""

    def widths(self) -> tuple[int, int]:
        rows, columns = self.module.get_parameter("weight").shape
        return columns, rows

    def output_tokens(self, dy: torch.Tensor, call: Call) -> torch.Tensor:
        return 3 * super().output_tokens(dy, call)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_registered_kind_needs_no_other_change(
    rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_kinds", dict(layers._kinds))
    register_layer_kind(ScaledLinear, ScaledLayer)
    torch.manual_seed(0)
    model = nn.Sequential(ScaledLinear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    run = logra.init("scaled", root_dir=str(tmp_path), dtype="float32")
    run.watch(model, type_filter=[ScaledLinear])
    if rank is not None:
        run.add_lora(rank)
    run.setup({"save": "grad"})
    with run(data_id=range(4)):
        model(x).square().sum().backward()
    run.finalize()
    losses = [lambda n=n: model(x[n]).square().sum() for n in range(4)]
    watched = make_layers(model, ["0"], rank)
    want = autograd_rows(model, watched, losses)
    got = torch.from_numpy(logra.Store.open(tmp_path / "scaled").take(range(4)))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


class Doubled(nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class WeightStandardised(nn.Conv2d):
    def forward(self, x: Any) -> Any:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, x: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(functional.pad(x, (1, 1, 1, 1)), weight, bias)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Any) -> Any:
        return 8 * super().forward(ids)


class Named(nn.Linear):
    """Adds nothing to what nn.Linear computes."""

    def extra_repr(self) -> str:
        return "named"


def replaced_forward() -> Any:
    module: Any = nn.Linear(3, 3)
    module.forward = lambda x: 2 * functional.linear(x, module.weight)
    return module


def of_custom_hook() -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubles(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    return add_hook_to_module(nn.Linear(3, 3), Doubles())


REFUSED: dict[str, tuple[Any, str]] = {
    "forward": (lambda: Doubled(3, 3), "its class Doubled has a forward of its own"),
    "conv": (lambda: WeightStandardised(3, 3, 2), "its class WeightStandardised has a forward of"),
    "padded": (lambda: Padded(3, 3, 2), "its class Padded has a _conv_forward of its own"),
    "embedding": (lambda: ScaledEmbedding(3, 3), "its class ScaledEmbedding has a forward of its"),
    "instance": (replaced_forward, "its forward was replaced"),
    "accelerate": (of_custom_hook, "its forward was replaced"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        "its weight is computed from other parameters (a parametrization)",
    ),
    "old weight norm": (
        lambda: nn.utils.weight_norm(nn.Linear(3, 3)),
        "its weight is computed from other parameters (weight_norm or pruning)",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5),
        "its weight is computed from other parameters (weight_norm or pruning)",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("name", REFUSED)
def test_modules_that_compute_something_else_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, reason = REFUSED[name]
    module = make()
    with pytest.raises(ValueError, match=re.escape(f"module block.0: {reason}")) as caught:
        make_layer("block.0", module)
    monkeypatch.setattr(layers, "_kinds", dict(layers._kinds))
    kind = layer_kind(module)
    assert kind is not None
    register_layer_kind(type(module), kind)
    if "register_layer_kind(type(module), " in str(caught.value):
        assert make_layer("block.0", module) is not None  # the user's word for it


def test_subclasses_that_keep_the_forward_are_layers() -> None:
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
    from transformers.models.falcon.modeling_falcon import FalconLinear

    hooks = AlignDevicesHook(), SequentialHook(AlignDevicesHook())
    moved = [add_hook_to_module(nn.Linear(3, 3), hook) for hook in hooks]
    for module in (Named(3, 3), FalconLinear(3, 3), *moved):
        assert type(make_layer("a", module)) is LinearLayer
        x = torch.randn(2, 4, 3)
        layer = make_layer("a", module)
        assert layer is not None
        with Capture(module, [layer], 2) as capture:
            module(x).square().sum().backward()
        losses = [module(one).square().sum() for one in x]
        wanted = torch.stack([torch.autograd.grad(loss, module.weight)[0] for loss in losses])
        torch.testing.assert_close(capture.gradients()["a"], wanted)


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="kind: expected a subclass of Layer"):
        register_layer_kind(nn.Linear, nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="module_class: expected a subclass of Module"):
        register_layer_kind("Conv1D", LinearLayer)  # type: ignore[arg-type]


class Shared(nn.Module):
    """Three layers with one input, changed in place before the last, and one with a copy of it."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.gate, self.up, self.late, self.other = (kind() for _ in range(4))
        self.in_place = True  # which weight gradients would not allow

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.gate(x).sigmoid() * self.up(x)
        x = x.add_(1) if self.in_place else x + 1
        y = y + self.late(x)
        result: Tensor = y + self.other(x.clone())
        return result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "ranks", "computed"),
    [
        ("linear", (8, 8, 8, 8), 3),
        ("linear", (8, 5, 8, 8), 3),
        ("linear", (5, 8, 8, 8), 4),  # not all of up's is there
        ("random", (8, 8, 8, 8), 4),
        ("conv", (8, 8, 8, 8), 4),
    ],
)
def test_modules_of_one_input_and_one_basis_project_it_once(
    kind: str, ranks: tuple[int, ...], computed: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a pilot, whose eigenvectors of one input are the same in every module."""
    torch.manual_seed(0)
    conv = kind == "conv"
    model = Shared((lambda: nn.Conv2d(2, 4, 2)) if conv else (lambda: nn.Linear(8, 4)))
    layers = make_layers(model, bias=bias)
    width = layers[0].in_features
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    for layer, rank in zip(layers, ranks, strict=True):
        proj = torch.randn(rank, width) if kind == "random" else basis[:rank].contiguous()
        layer.projection = ModuleProjection(width, 4, proj, torch.randn(3, 4))
    inputs: list[Tensor] = []
    project = Layer.project

    def counted(self: Layer, x: Tensor, call: Call) -> Tensor:
        inputs.append(x)
        return project(self, x, call)

    monkeypatch.setattr(Layer, "project", counted)
    x = torch.randn(3, 2, 5, 5) if conv else torch.randn(3, 6, 8)
    rows = capture_rows(model, layers, 3, lambda: model(x).square().sum())
    assert len(inputs) == computed
    model.in_place = False
    alone = [lambda n=n: model(x[n : n + 1]).square().sum() for n in range(3)]
    torch.testing.assert_close(
        rows.double(), autograd_rows(model, layers, alone), rtol=1e-4, atol=1e-4
    )
