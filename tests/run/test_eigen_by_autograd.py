"""Eigenbasis rows of convolutions and embeddings, from pilot to score: full EKFAC by autograd.

Truth is float64, of single examples: gradients by `torch.autograd.grad`, and Kronecker factors of
tokens whose products give these gradients again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from logra_kernels import Config, Run
from logra_kernels.defaults import DAMPING_SCALE
from logra_kernels.projection import stored_projections
from logra_kernels.store import Store

TRAIN, QUERIES = 24, 3
VOCABULARY, PADDING = 17, 3


class Convolutions(nn.Module):
    """Stride, padding of each kind, dilation, a bias or none; and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(2, 5, 3, stride=2, padding=1)
        self.same = nn.Conv2d(5, 4, (2, 3), padding="same", dilation=(1, 2))
        self.circular = nn.Conv2d(4, 6, 3, padding=(1, 0), padding_mode="circular", bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.strided(x))
        x = torch.tanh(self.same(x))
        logits: Tensor = self.head(torch.tanh(self.circular(x)).mean(dim=(2, 3)))
        return logits


class Embedded(nn.Module):
    """An embedding with a padding id, a layer on each token, and one on their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 5, padding_idx=PADDING)
        self.each = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.each(self.embed(ids)))
        return self.head(x.sum(dim=1))  # type: ignore[no-any-return]


@dataclass
class Sample:
    """A model, its inputs, and labels of TRAIN + QUERIES examples."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def loss(self, places: range) -> Tensor:
        inputs = self.inputs[list(places)]
        dtype = next(self.model.parameters()).dtype
        logits = self.model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        labels = self.labels[list(places)]
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


def sample(name: str) -> Sample:
    torch.manual_seed(0)
    count = TRAIN + QUERIES
    model = Convolutions() if name == "convolutions" else Embedded()
    inputs = torch.randn(count, 2, 9, 8)
    if name == "embedding":
        inputs = torch.randint(VOCABULARY, (count, 7))
    return Sample(model, inputs, torch.randint(3, (count,)))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)
    }


def tokens_of(module: nn.Module, x: Tensor) -> Tensor:
    """[T, I], with the bias's column, of one example's input."""
    if isinstance(module, nn.Embedding):
        one_hot = nn.functional.one_hot(x[0], VOCABULARY).double()
        one_hot[:, PADDING] = 0
        return one_hot
    if isinstance(module, nn.Conv2d):
        mode = "circular" if module.padding_mode == "circular" else "constant"
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        size, dilation, stride = module.kernel_size, module.dilation, module.stride
        x = nn.functional.unfold(x, size, dilation=dilation, stride=stride).mT
    x = x.reshape(-1, x.shape[-1])
    return x if module.bias is None else torch.cat([x, x.new_ones(len(x), 1)], dim=1)


@dataclass
class Truth:
    """Full EKFAC of one module in its eigenbasis, eigenvalues falling."""

    gradients: Tensor  # Q_Bᵀ G Q_F of all examples, [TRAIN + QUERIES, O, I]
    eigenvalues: Tensor  # Λ [O, I]

    def scores(self, damping: float, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Influence [QUERIES, TRAIN] and self-influence [TRAIN], of some coordinates alone."""
        rows = self.gradients.flatten(1)
        inverse = 1 / (self.eigenvalues.flatten() + damping)
        if chosen is not None:
            rows, inverse = rows[:, chosen], inverse[chosen]
        train, queries = rows[:TRAIN], rows[TRAIN:]
        return (queries * inverse) @ train.T, (train**2 * inverse).sum(1)


def full_ekfac(of: Sample) -> dict[str, Truth]:
    """By autograd, in float64, one example at a time."""
    model = of.model.double()
    watched = layers(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen[name] = (args[0].detach(), output)

    undo = [
        module.register_forward_hook(lambda m, a, o, name=name: keep(name, m, a, o))
        for name, module in watched.items()
    ]
    gradients: dict[str, list[Tensor]] = {name: [] for name in watched}
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in watched}
    for n in range(TRAIN + QUERIES):
        loss = of.loss(range(n, n + 1))
        for name, module in watched.items():
            x, output = seen[name]
            asked = [output, *module.parameters()]
            dy, weight, *bias = torch.autograd.grad(loss, asked, retain_graph=True)
            if isinstance(module, nn.Embedding):
                gradient = weight.T
            else:
                gradient = torch.cat([weight.flatten(1), *(b[:, None] for b in bias)], dim=1)
            x = tokens_of(module, x)
            dy = (
                dy[0].flatten(1).T
                if isinstance(module, nn.Conv2d)
                else dy.reshape(-1, dy.shape[-1])
            )
            torch.testing.assert_close(dy.T @ x, gradient)
            gradients[name].append(gradient)
            if n < TRAIN:
                sides[name].append((x, dy))
    for handle in undo:
        handle.remove()
    model.float()
    found = {}
    for name in watched:
        x, dy = (torch.cat(side) for side in zip(*sides[name], strict=True))
        into, out = (
            torch.linalg.eigh(side.T @ side / len(side)).eigenvectors.flip(1) for side in (x, dy)
        )
        rotated = out.T @ torch.stack(gradients[name]) @ into
        found[name] = Truth(rotated, rotated[:TRAIN].square().mean(0))
    return found


def passed(run: Run, of: Sample) -> None:
    for start in range(0, TRAIN, 7):
        part = range(start, min(start + 7, TRAIN))
        with run([f"row{n}" for n in part]):
            of.loss(part).backward()


def piloted(folder: Path, of: Sample, coordinates: int, dtype: str = "float32") -> Store:
    run = Run("toy", Config(root_dir=str(folder), dtype=dtype))
    run.watch(of.model, type_filter=[nn.Conv2d, nn.Linear, nn.Embedding], bias=True)
    with run.pilot("eigen", coordinates=coordinates):
        passed(run, of)
    run.setup({"save": "grad", "statistic": "diagonal"})
    passed(run, of)
    run.finalize()
    return run.store


def queried(folder: Path, of: Sample) -> tuple[Run, Tensor]:
    """A later program: the store's projection, and the queries' rows [QUERIES, D]."""
    run = Run("toy", Config(root_dir=str(folder)))
    run.watch(of.model, type_filter=[nn.Conv2d, nn.Linear, nn.Embedding], bias=True)
    run.initialize_from_log()
    run.eval()
    with run([f"query{n}" for n in range(QUERIES)]):
        of.loss(range(TRAIN, TRAIN + QUERIES)).backward()
    return run, run.last_rows()[1]


def truth_of(of: Sample, store: Store, dampings: dict[str, float]) -> dict[str, Tensor]:
    """Influence, l-RelatIF and self-influence over the coordinates that the store's rows hold."""
    scores, sigma = torch.zeros(QUERIES, TRAIN).double(), torch.zeros(TRAIN).double()
    for name, truth in full_ekfac(of).items():
        made = stored_projections(store)[name]
        assert made.coordinates is not None
        chosen = made.coordinates // made.ki * truth.eigenvalues.shape[1]
        of_module = truth.scores(dampings[name], chosen + made.coordinates % made.ki)
        scores, sigma = scores + of_module[0], sigma + of_module[1]
    return {"dot": scores, "l-relatif": scores / sigma.sqrt(), "sigma": sigma}


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within a share of the largest score, which is about what |u||g| is."""
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("name", ["convolutions", "embedding"])
def test_all_coordinates_are_full_ekfac(tmp_path: Path, name: str) -> None:
    """Scores and norms to 1e-4, and λ too; from the store, and of passes that store none."""
    of = sample(name)
    full = full_ekfac(of)
    dim = sum(truth.eigenvalues.numel() for truth in full.values())
    store = piloted(tmp_path, of, dim)
    run, queries = queried(tmp_path, of)
    attributor = run.attributor()
    dampings = {n: DAMPING_SCALE * float(t.eigenvalues.mean()) for n, t in full.items()}
    assert attributor.dampings == pytest.approx(dampings, rel=1e-4)
    want = truth_of(of, store, dampings)
    for mode in ("dot", "l-relatif"):
        close(attributor.scores(queries, mode).scores, want[mode], 1e-4)
        with run.streamed(queries, mode) as streamed:
            passed(run, of)
        close(streamed.result().scores, want[mode], 1e-4)
    close(attributor.self_influence(), want["sigma"], 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", ["convolutions", "embedding"])
def test_some_coordinates_are_those_of_full_ekfac(tmp_path: Path, name: str, dtype: str) -> None:
    """With the store's λ, whose share of all coordinates is the pilot's.

    An element of a module is off by 2**-11 of the largest of its row in float16, 2**-8 in int8; a
    score is a sum of 60 products of both signs.
    """
    of = sample(name)
    store = piloted(tmp_path, of, 60, dtype)
    assert store.layout.dim == 60
    run, queries = queried(tmp_path, of)
    attributor = run.attributor()
    want = truth_of(of, store, attributor.dampings)
    tolerance = {"float32": 1e-4, "float16": 2e-3, "int8": 2e-2}[dtype]
    for mode in ("dot", "l-relatif"):
        close(attributor.scores(queries, mode).scores, want[mode], tolerance)
    close(attributor.self_influence(), want["sigma"], tolerance)


def test_the_rows_of_images_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """A query passed alone has the row that it has among others, to float32's rounding."""
    of = sample("convolutions")
    piloted(tmp_path, of, 60)
    run, together = queried(tmp_path, of)
    for n in range(QUERIES):
        with run([f"alone{n}"]):
            of.loss(range(TRAIN + n, TRAIN + n + 1)).backward()
        assert torch.allclose(run.last_rows()[1][0], together[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("moments", ["expand", "sequence"])
def test_a_grouped_convolution_is_refused_by_name(tmp_path: Path, moments: str) -> None:
    """Its weight's gradient is a product for each group, which no two bases rotate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3))
    run = Run("toy", Config(root_dir=str(tmp_path)))
    run.watch(model)
    with (
        pytest.raises(ValueError, match="module 0: its kind Conv2dLayer has gradients of its own"),
        run.pilot("eigen", coordinates=20, moments=moments),
        run(["a", "b"]),
    ):
        model(torch.randn(2, 4, 3, 3)).square().sum().backward()
    assert not (tmp_path / "toy").exists()
