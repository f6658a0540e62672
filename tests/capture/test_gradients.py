"""Rows against a loop of autograd over single examples, and the ways not to disturb them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import (
    Mlp,
    Recurrent,
    SmallCnn,
    autograd_rows,
    capture_rows,
    causal_loss,
    make_layers,
    ragged_batch,
    square_sum,
    tiny_gpt2,
    tiny_llama,
)

from logra_kernels.capture import Capture
from logra_kernels.capture.layers import Layer

DTYPES = [torch.float64, torch.float32]
LENGTHS = [9, 4, 7, 1]


def assert_rows(
    model: nn.Module,
    layers: Sequence[Layer],
    got: Tensor,
    losses: Sequence[Callable[[], Tensor]],
    dtype: torch.dtype,
) -> None:
    """float64: 1e-10. float32: four times what a float32 autograd loop itself loses.

    The loop and the capture round the same chain of products, in another order; four is the
    margin for the two sums over tokens and features that they do differently.
    """
    want = autograd_rows(model, layers, losses)
    scale = want.abs().max()
    assert got.dtype == dtype
    if dtype == torch.float64:
        assert (got - want).abs().max() <= 1e-10 * scale
        return
    truth = autograd_rows(model.double(), layers, losses)
    model.float()
    allowed = 4 * (want - truth).abs().max() + 2**-22 * scale
    assert (got.double() - truth).abs().max() <= allowed


def assert_squares(
    model: nn.Module, layers: Sequence[Layer], x: Tensor, mask: Tensor | None = None
) -> None:
    """The rows of a float64 model whose loss is the sum of its squared outputs."""
    got = capture_rows(model, layers, len(x), partial(square_sum, model, x), mask)
    singles = [partial(square_sum, model, one[None]) for one in x]
    assert_rows(model, layers, got, singles, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "bias"), [(None, True), ((3, 5), True), (4, False), (2, False)])
@pytest.mark.parametrize(("make", "shape"), [(Mlp, (5, 7)), (SmallCnn, (3, 2, 12, 11))])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_classifiers(
    make: type[nn.Module], shape: tuple[int, ...], dtype: torch.dtype, rank: Any, bias: bool
) -> None:
    torch.manual_seed(0)
    model, count = make().to(dtype), shape[0]
    layers = make_layers(model, rank=rank, bias=bias)
    x, y = torch.randn(shape), torch.randint(3, (count,))

    def loss(examples: slice) -> Tensor:
        outputs = model(x[examples].to(next(model.parameters()).dtype))
        return nn.functional.cross_entropy(outputs, y[examples], reduction="sum")

    got = capture_rows(model, layers, count, lambda: loss(slice(None)))
    singles = [lambda n=n: loss(slice(n, n + 1)) for n in range(count)]
    assert_rows(model, layers, got, singles, dtype)


def watched_gpt2(model: nn.Module) -> list[str]:
    # not wpe: GPT-2 looks positions up, and here position_ids are per example, so it could be
    # watched; not lm_head, whose weight is wte's
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "Conv1D" or name.endswith("wpe")
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("make", "rank"), [(tiny_gpt2, None), (tiny_gpt2, (4, 6)), (tiny_llama, (4, 6))]
)
def test_ragged_language_models(
    make: Callable[[torch.dtype], Any], rank: tuple[int, int] | None, side: str, dtype: torch.dtype
) -> None:
    """The truth is computed on the bare examples, without any padding."""
    model = make(dtype)
    watched = watched_gpt2(model) if make is tiny_gpt2 else None
    layers = make_layers(model, watched, rank=rank, bias=True)
    assert len(layers) >= 9
    ids, mask = ragged_batch(61, LENGTHS, side)
    rows = capture_rows(model, layers, len(LENGTHS), lambda: causal_loss(model, ids, mask), mask)

    def bare(n: int) -> Tensor:
        alone = ids[n][mask[n] == 1][None]
        return causal_loss(model, alone, torch.ones_like(alone))

    # the last example has one token, which predicts nothing: its row is zero
    singles = [lambda n=n: bare(n) for n in range(len(LENGTHS))]
    assert_rows(model, layers, rows, singles, dtype)
    assert rows[-1].abs().max() == 0
    assert all(rows[:-1].abs().amax(dim=1) > 0)


@pytest.mark.parametrize("rank", [None, 3])
def test_padding_changes_nothing(rank: int | None) -> None:
    """Whatever stands in the padding, and however much of it there is."""
    model = tiny_llama(torch.float64)
    layers = make_layers(model, rank=rank)
    ids, mask = ragged_batch(61, LENGTHS, "right")
    rows = []
    for width, filler in ((9, 0), (9, 33), (14, 60)):
        padded = torch.full((len(LENGTHS), width), filler)
        padded[:, :9] = torch.where(mask == 1, ids, filler)
        wide = torch.zeros_like(padded)
        wide[:, :9] = mask
        loss = partial(causal_loss, model, padded, wide)
        rows.append(capture_rows(model, layers, len(LENGTHS), loss, wide))
    for other in rows[1:]:
        assert (other - rows[0]).abs().max() <= 1e-12 * rows[0].abs().max()


def test_masked_token_contributes_nothing_even_if_the_loss_counts_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5)).double()
    layers = make_layers(model)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    x[0, 2] = torch.nan
    with Capture(model, layers, 2, mask) as capture:
        model(x).square().sum().backward()
    got = capture.gradients()["0"]
    for n in range(2):
        kept = x[n][mask[n] == 1]
        assert torch.allclose(got[n], 2 * model(kept).T @ kept, rtol=1e-12)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_module_called_again_adds_up(rank: int | None) -> None:
    torch.manual_seed(0)
    model = Recurrent().double()
    layers = make_layers(model, rank=rank, bias=True)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    assert_squares(model, layers, x)


def test_tokens_flattened_before_the_layer() -> None:
    """[N·T, I] with a mask [N, T] is folded back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5)).double()
    layers = make_layers(model, rank=3)
    x, mask = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[1, 1, 1], [1, 0, 0]])
    rows = []
    for tokens in (x, x.flatten(0, 1)):
        rows.append(capture_rows(model, layers, 2, partial(square_sum, model, tokens), mask))
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_activations_and_gradients_of_any_strides(rank: int | None, bias: bool) -> None:
    """A transposed input, and the gradient of a plain sum, which is one number expanded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    layers = make_layers(model, rank=rank, bias=bias)
    x = torch.randn(3, 6, 7).transpose(1, 2)
    got = capture_rows(model, layers, 3, lambda: model(x).sum())
    singles = [lambda n=n: model(x[n : n + 1]).sum() for n in range(3)]
    want = autograd_rows(model, layers, singles)
    # sums of 7 tokens and of at most 7 features, twice
    assert (got - want).abs().max() <= 32 * 2**-23 * want.abs().max()


def test_more_than_one_token_axis() -> None:
    """[N, H, W, I], as vision models have it, is T = H·W; a mask [N, H·W] fits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5)).double()
    layers = make_layers(model, rank=3)
    x, mask = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.ones(2, 6)
    assert_squares(model, layers, x, mask)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("rank", [None, (3, 6)])
def test_embedding(padding_idx: int | None, rank: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 5, padding_idx=padding_idx), nn.Linear(5, 2)).double()
    layers = make_layers(model, rank=rank)
    ids = torch.tensor([[1, 3, 3, 10], [3, 0, 1, 1]])
    assert_squares(model, layers, ids)


def test_batch_split_changes_rows_by_rounding_only() -> None:
    """A batch of 4, two of 2 and four of 1: the model's own products may round differently."""
    model = tiny_llama()
    layers = make_layers(model, rank=4)
    ids, mask = ragged_batch(61, LENGTHS, "right")
    rows = []
    for size in (4, 2, 1):
        parts = []
        for begin in range(0, 4, size):
            part = slice(begin, begin + size)
            loss = partial(causal_loss, model, ids[part], mask[part])
            parts.append(capture_rows(model, layers, size, loss, mask[part]))
        rows.append(torch.cat(parts))
    for other in rows[1:]:
        # about 30 roundings lie one behind another in two layers' forward and backward passes
        assert (other - rows[0]).abs().max() <= 30 * 2**-23 * rows[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    """Rows are float32; they miss the float32 model's by the model's own rounding."""
    model = tiny_llama()
    layers = make_layers(model, rank=4)
    ids, mask = ragged_batch(61, LENGTHS, "right")
    rows = []
    for kind in (torch.float32, dtype):
        model.to(kind)
        rows.append(capture_rows(model, layers, 4, lambda: causal_loss(model, ids, mask), mask))
        assert rows[-1].dtype == torch.float32
    # 2**-8 (bf16) or 2**-11 (fp16) for each of about 30 roundings, which mostly cancel
    tolerance = 8 * torch.finfo(dtype).eps
    assert (rows[1] - rows[0]).norm() <= tolerance * rows[0].norm()


def test_autocast() -> None:
    model = tiny_gpt2()
    layers = make_layers(model, watched_gpt2(model), rank=4)
    ids, mask = ragged_batch(61, LENGTHS, "right")
    rows = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = lambda: causal_loss(model, ids, mask)  # noqa: E731
            rows.append(capture_rows(model, layers, 4, loss, mask))
    assert rows[1].dtype == torch.float32
    assert not torch.equal(rows[0], rows[1])
    assert (rows[1] - rows[0]).norm() <= 8 * 2**-8 * rows[0].norm()


@pytest.mark.parametrize("rank", [None, 3])
def test_token_scores_sum_to_the_row_score(rank: int | None) -> None:
    model = tiny_llama(torch.float64)
    watched = [name for name, _ in model.named_modules() if "mlp" in name]
    layers = make_layers(model, watched, rank=rank, bias=True)
    ids, mask = ragged_batch(61, LENGTHS, "left")
    width = sum(layer.ko * layer.ki for layer in layers)
    queries = torch.randn(3, width, dtype=torch.float64)
    with Capture(model, layers, 4, mask, token_queries=queries) as capture:
        causal_loss(model, ids, mask).backward()
    scores = capture.token_scores()
    assert scores.shape == (3, 4, 9)
    want = queries @ capture.rows().T
    assert torch.allclose(scores.sum(dim=2), want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))
    assert (scores[:, mask == 0] == 0).all()


class AddOn(nn.Module):
    """LoGra's own form (§3.1): y = W x + P_oᵀ B P_i x, whose bottleneck B is zero."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.bottleneck = nn.Parameter(torch.zeros(layer.ko, layer.ki, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        p_in, p_out = self.layer.projection.proj_in, self.layer.projection.proj_out
        assert p_in is not None
        assert p_out is not None
        out: Tensor = self.layer.module(x)
        return out + x @ p_in.double().T @ self.bottleneck.T @ p_out.double()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_rows_are_the_gradients_of_the_bottlenecks_of_add_on_layers(make: Any) -> None:
    """Which are Σ_t (P_o dy_t)(P_i x_t)ᵀ; the model computes what it always did."""
    model = make(torch.float64)
    watched = watched_gpt2(model) if make is tiny_gpt2 else None
    layers = [
        layer for layer in make_layers(model, watched, rank=(2, 3)) if "wpe" not in layer.name
    ]
    ids, mask = ragged_batch(61, LENGTHS[:3], "left")
    loss = partial(causal_loss, model, ids, mask)
    rows, value = capture_rows(model, layers, 3, loss, mask), loss().item()
    additions = [AddOn(layer) for layer in layers]
    for layer, addition in zip(layers, additions, strict=True):
        parent, _, child = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), child, addition)
    assert loss().item() == pytest.approx(value, rel=1e-12)
    weights = [addition.bottleneck for addition in additions]
    for n, row in enumerate(rows):
        alone = causal_loss(model, ids[n : n + 1], mask[n : n + 1])
        want = torch.cat([g.flatten() for g in torch.autograd.grad(alone, weights)])
        assert (row - want).abs().max() <= 1e-10 * want.abs().max()
