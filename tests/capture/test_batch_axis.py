"""Which axis of an input is the batch: told, or refused where it is in doubt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import autograd_rows, make_layers

from logra_kernels.capture import Capture, Layer
from logra_kernels.capture.axes import set_batch_axes
from logra_kernels.run import WatchedLayers

N = T = 5


def refuse(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


class SequenceFirst(nn.Module):
    """[T, N, I] through an LSTM of torch's default, and layers before and after it."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.rnn = nn.LSTM(4, 6, batch_first=batch_first)
        self.token = nn.Linear(6, 3)
        self.pooled = nn.Linear(3, 2)

    def forward(self, ids: Tensor, flat: bool = False) -> Tensor:
        hidden = self.rnn(self.embed(ids))[0]  # [T, N, 6]
        tokens = self.token(hidden.flatten(0, 1)).view(*ids.shape, 3) if flat else None
        tokens = self.token(hidden) if tokens is None else tokens
        out: Tensor = self.pooled(tokens.tanh().sum(1 if self.rnn.batch_first else 0))
        return out


def loss_of(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    out: Tensor = model(ids, **options)
    return out.exp().sum()


def watched(model: nn.Module, rank: int | None = None, batch_dim: Any = None) -> list[Layer]:
    layers = make_layers(model, rank=rank, bias=True)
    set_batch_axes(model, layers, batch_dim)
    return layers


def assert_rows(
    model: nn.Module, layers: Sequence[Layer], got: Tensor, losses: Sequence[Callable[[], Tensor]]
) -> None:
    want = autograd_rows(model, layers, losses)
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("tokens", [3, T, 8])
def test_rows_of_a_sequence_first_model(tokens: int, flat: bool, rank: int | None) -> None:
    torch.manual_seed(0)
    model = SequenceFirst().double()
    layers = watched(model, rank, batch_dim=1)
    ids = torch.randint(11, (tokens, N))
    with Capture(model, layers, N, torch.ones(N, tokens)) as capture:
        loss_of(model, ids, flat=flat).backward()
    losses = [partial(loss_of, model, ids[:, n : n + 1]) for n in range(N)]
    assert_rows(model, layers, capture.rows(), losses)


def test_a_mask_of_a_sequence_first_model() -> None:
    """[N, T], as everywhere; a masked token may hold anything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    layers = watched(model, batch_dim=1)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    x[2, 0] = torch.nan
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    with Capture(model, layers, 2, mask) as capture:
        model(x).square().sum().backward()
    losses = [lambda n=n: model(x[:, n][mask[n] == 1][:, None]).square().sum() for n in range(2)]
    assert_rows(model, layers, capture.rows(), losses)


def test_sequence_first_is_refused_where_it_cannot_be_told() -> None:
    torch.manual_seed(0)
    model = SequenceFirst().double()
    with (
        refuse(
            "module embed: rnn has batch_first=False, so that its input [5, 5] may hold "
            "[T, N, ...], and the gradients of examples would be mixed; say which axis is the "
            "batch by watch(..., batch_dim=0 or 1), for one module by batch_dim={'embed': 0}"
        ),
        Capture(model, watched(model), N),
    ):
        loss_of(model, torch.randint(11, (T, N)))
    token = [layer for layer in watched(model) if layer.name == "token"]
    with refuse("module token: rnn has batch_first=False"), Capture(model, token, N):
        loss_of(model, torch.randint(11, (T, N)))
    # Flattened, [T·N, I] looks like [N·T, I] whatever N and T are.
    flattened = Capture(model, token, N, torch.ones(N, 3))
    with refuse("module token: rnn has batch_first=False"), flattened:
        loss_of(model, torch.randint(11, (3, N)), flat=True)
    with (
        refuse("got [3, 5, 6]; if its second axis is the batch, say watch(..., batch_dim=1)"),
        Capture(model, token, N),
    ):
        loss_of(model, torch.randint(11, (3, N)))


@pytest.mark.parametrize("kind", ["transformer", "attention"])
def test_modules_of_torch_that_take_sequences_first(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0).double()
    if kind == "attention":
        model = nn.ModuleDict({"attend": nn.MultiheadAttention(4, 2), "linear1": nn.Linear(4, 4)})
        model = model.double()
    names = [name for name in ("linear1", "linear2") if name in dict(model.named_modules())]

    def loss(x: Tensor) -> Tensor:
        if not isinstance(model, nn.ModuleDict):
            out: Tensor = model(x)
        else:
            hidden = model["linear1"](x)
            out = model["attend"](hidden, hidden, hidden)[0]
        return out.pow(3).sum()

    x = torch.randn(T, N, 4, dtype=torch.float64)
    layers = make_layers(model, names)
    with refuse("module linear1: ") as error, Capture(model, layers, N):
        set_batch_axes(model, layers, None)
        loss(x)
    assert "has batch_first=False" in str(error.value)
    set_batch_axes(model, layers, 1)
    with Capture(model, layers, N) as capture:
        loss(x).backward()
    assert_rows(model, layers, capture.rows(), [partial(loss, x[:, n : n + 1]) for n in range(N)])


class ByHand(nn.Module):
    """Puts sequences first by itself, and says so nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor, flat: bool = False, permute: bool = False) -> Tensor:
        x = self.below(x)
        x = x.permute(1, 0, 2) if permute else x.transpose(-3, 1)
        hidden = nn.functional.layer_norm(self.first(x).tanh(), (4,))
        y = self.second(hidden.flatten(0, 1)).view(*x.shape[:2], 3) if flat else self.second(hidden)
        y = y.transpose(0, 1).contiguous()  # [N, T, 3]
        loss: Tensor = (y.exp() * torch.arange(y.shape[1])[:, None]).sum()
        return loss


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("names", [["below", "first"], ["below", "second"], ["first"], ["second"]])
def test_sequences_put_first_by_hand_are_refused(names: list[str], permute: bool) -> None:
    """By the graph of a layer's input, its strides, or those of its output's gradient."""
    torch.manual_seed(0)
    model, x = ByHand().double(), torch.randn(N, T, 4, dtype=torch.float64)
    layers = make_layers(model, names)
    set_batch_axes(model, layers, None)
    with (
        refuse(
            f"module {names[-1]}: the first two axes of a tensor before or after it are swapped, "
            "so that its input [5, 5, "
        ),
        Capture(model, layers, N),
    ):
        model(x, permute=permute).backward()
    layers = make_layers(model, names)
    set_batch_axes(model, layers, {name: int(name != "below") for name in names})
    with Capture(model, layers, N) as capture:
        model(x, permute=permute).backward()
    losses = [partial(model, x[n : n + 1], permute=permute) for n in range(N)]
    assert_rows(model, layers, capture.rows(), losses)


def test_tokens_flattened_after_a_swap_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)}).double()
    x = torch.randn(N, 3, 4, dtype=torch.float64)
    layers = make_layers(model)
    set_batch_axes(model, layers, None)
    with (
        refuse("module b: the first two axes of a tensor before or after it are swapped"),
        Capture(model, layers, N, torch.ones(N, 3)),
    ):
        model["b"](model["a"](x).transpose(0, 1).reshape(-1, 4))
    with Capture(model, layers, N, torch.ones(N, 3)) as capture:
        model["b"](model["a"](x).reshape(-1, 4)).exp().sum().backward()
    losses = [lambda n=n: model["b"](model["a"](x[n])).exp().sum() for n in range(N)]
    assert_rows(model, layers, capture.rows(), losses)


def test_batch_first_raises_no_doubt() -> None:
    torch.manual_seed(0)
    model = SequenceFirst(batch_first=True).double()
    layers = watched(model)
    ids = torch.randint(11, (N, T))
    with Capture(model, layers, N) as capture:
        loss_of(model, ids).backward()
    losses = [partial(loss_of, model, ids[n : n + 1]) for n in range(N)]
    assert_rows(model, layers, capture.rows(), losses)


def test_a_told_axis_ends_the_doubt_for_its_part() -> None:
    model = SequenceFirst()
    layers = watched(model, batch_dim={"": 1, "embed": 0})
    assert [layer.axis.dim for layer in layers] == [0, 1, 1]
    torch.manual_seed(0)
    ids = torch.randint(11, (N, T))
    with Capture(model, layers, N) as capture:
        hidden = model.rnn(model.embed(ids).transpose(0, 1))[0]
        model.pooled(model.token(hidden).sum(0)).sum().backward()
    assert capture.rows().shape[0] == N


@pytest.mark.parametrize(
    ("batch_dim", "message"),
    [
        (2, "batch_dim: expected 0 or 1, got 2"),
        (True, "batch_dim: expected 0 or 1, got True"),
        ({"token": None}, "batch_dim: expected 0 or 1, got None for 'token'"),
        ({"tokens": 1}, "batch_dim: no watched module's name has the parts 'tokens': embed, token"),
    ],
)
def test_axes_that_are_refused(batch_dim: Any, message: str) -> None:
    with refuse(message):
        WatchedLayers.matching(SequenceFirst(), [nn.Linear, nn.Embedding], batch_dim=batch_dim)


def test_an_axis_beyond_the_first_needs_a_layer_that_has_it() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    with (
        refuse("module 0: expected an input of shape [N, C, H, W]"),
        Capture(model, watched(model, batch_dim=1), 2),
    ):
        model(torch.ones(2, 2, 4, 4))
    linear = nn.Sequential(nn.Linear(4, 4))
    with (
        refuse("module 0: expected an input of shape [T, N, features] with N = 3"),
        Capture(linear, watched(linear, batch_dim=1), 3),
    ):
        linear(torch.ones(3, 5, 4))


class Mixture(nn.Module):
    """Two experts of different tokens, behind a layer, and a head on the first token of each."""

    def __init__(self, names: Sequence[str] = ("expert_0", "expert_1")) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.mlp = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, route: Tensor, way: str) -> Tensor:
        hidden = self.inner(x).tanh()  # [N, T, 4]
        flat = hidden.flatten(0, 1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.mlp.values()):
            chosen = (route.flatten() == number).nonzero()[:, 0]
            out = out.index_add(0, chosen, expert(picked(hidden, route == number, way)))
        mixed: Tensor = hidden + out.view_as(hidden)
        logits: Tensor = self.head(mixed[:, 0])
        return logits.exp().sum() + mixed.square().sum()


def picked(hidden: Tensor, wanted: Tensor, way: str) -> Tensor:
    """The tokens [K, 4] of hidden [N, T, 4] that are wanted [N, T], as models take them."""
    flat, places = hidden.flatten(0, 1), wanted.flatten().nonzero()[:, 0]
    if way == "index":
        return flat[places]
    if way == "hugging face":
        return flat[None, places].reshape(-1, 4)
    if way == "select":
        return flat.index_select(0, places)
    if way == "bool":
        return hidden[wanted]
    if way == "select from behind":
        return flat.index_select(-2, places)
    return flat[wanted.flatten()] if way == "flat bool" else hidden[wanted.nonzero(as_tuple=True)]


ROUTE = torch.tensor([[0, 0, 1], [1, 1, 0]])  # three tokens for each expert, two examples
ROUTE_OF_TWO = torch.tensor([[0, 0, 1], [1, 1, 1]])  # expert 0 has the first example's alone
ONE_EACH = torch.tensor([[0, 1, 1], [1, 1, 0]])  # expert 0 has one token of each example
WAYS = ["index", "hugging face", "select", "select from behind", "bool", "flat bool", "axes"]


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_receives_n_tokens_is_refused(way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    model = Mixture().double()
    layers = make_layers(model, ["inner", "mlp.expert_0", "head"])
    set_batch_axes(model, layers, None)
    with (
        refuse("module mlp.expert_0: its input [2, 4] is not one token of each of the 2 examples"),
        Capture(model, layers, 2),
    ):
        model(x, ROUTE_OF_TWO, way)
    # Where nothing below is watched, there is no graph, and the name tells it.
    alone = make_layers(model, ["mlp.expert_0"])
    set_batch_axes(model, alone, None)
    message = "module mlp.expert_0: mlp.expert_0 is an expert, so that its input [2, 4] may hold"
    with refuse(message), Capture(model, alone, 2):
        model(x, ROUTE_OF_TWO, way)
    with refuse("expected an input of shape [N, ...]"), Capture(model, alone, 2):
        model(x, ROUTE, way)


@pytest.mark.parametrize("way", WAYS)
def test_picked_tokens_are_told_by_the_graph_whatever_the_name(way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    model = Mixture(("left", "right")).double()
    layers = make_layers(model, ["inner", "mlp.left", "head"])
    set_batch_axes(model, layers, None)
    with (
        refuse("module mlp.left: its input [2, 4] is not one token of each of the 2 examples"),
        Capture(model, layers, 2),
    ):
        model(x, ROUTE_OF_TWO, way)
    # One token of each example, in order: rows are right, here and for pooled features.
    with Capture(model, layers, 2) as capture:
        model(x, ONE_EACH, way).backward()
    losses = [partial(model, x[n : n + 1], ONE_EACH[n : n + 1], way) for n in range(2)]  # [N]
    assert_rows(model, layers, capture.rows(), losses)


def test_an_expert_sees_every_example_where_examples_have_one_token() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"shared_expert": nn.Linear(4, 3)}).double()
    layers = watched(model)
    x = torch.randn(5, 1, 4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        out: Tensor = model["shared_expert"](x.flatten(0, 1)).exp().sum()
        return out

    with Capture(model, layers, 5, torch.ones(5, 1)) as capture:
        loss(x).backward()
    assert_rows(model, layers, capture.rows(), [partial(loss, x[n : n + 1]) for n in range(5)])


def test_experts_that_see_every_example_are_told_so() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])}).double()
    layers = watched(model, batch_dim={"experts": 0})

    def loss(x: Tensor) -> Tensor:
        outs: list[Tensor] = [expert(x) for expert in model["experts"].children()]
        return (outs[0] * outs[1].softmax(1)).sum()

    x = torch.randn(5, 4, dtype=torch.float64)
    with Capture(model, layers, 5) as capture:
        loss(x).backward()
    assert_rows(model, layers, capture.rows(), [partial(loss, x[n : n + 1]) for n in range(5)])


@pytest.mark.parametrize("pool", ["first", "last", "flat", "gather"])
def test_pooled_heads_are_no_experts(pool: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"token": nn.Linear(4, 4), "head": nn.Linear(4, 3)}).double()
    layers = watched(model)
    last = torch.tensor([2, 0, 1])

    def loss(x: Tensor, last: Tensor) -> Tensor:
        hidden = model["token"](x)
        rows = torch.arange(len(x))
        pooled = {
            "first": lambda: hidden[:, 0],
            "last": lambda: hidden[rows, last],
            "flat": lambda: hidden.flatten(0, 1)[rows * 3 + last],
            "gather": lambda: hidden.gather(1, last[:, None, None].expand(-1, 1, 4))[:, 0],
        }[pool]()
        out: Tensor = model["head"](pooled).exp().sum()
        return out

    x = torch.randn(3, 3, 4, dtype=torch.float64)
    with Capture(model, layers, 3) as capture:
        loss(x, last).backward()
    losses = [partial(loss, x[n : n + 1], last[n : n + 1]) for n in range(3)]
    assert_rows(model, layers, capture.rows(), losses)


def test_rows_of_a_table_are_no_tokens() -> None:
    """A table that is indexed by hand, and requires a gradient while training."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(4, 3)}).double()
    model.register_parameter("table", nn.Parameter(torch.randn(6, 4).double()))
    layers = watched(model)

    def loss(ids: Tensor) -> Tensor:
        out: Tensor = model["head"](model.get_parameter("table")[ids]).exp().sum()
        return out

    ids = torch.tensor([5, 0, 3])
    with Capture(model, layers, 3, weight_gradients=True) as capture:
        loss(ids).backward()
    assert_rows(model, layers, capture.rows(), [partial(loss, ids[n : n + 1]) for n in range(3)])
