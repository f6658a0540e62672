"""Embeddings: their inputs are one-hot, so that C_F is diagonal, and no V x V matrix is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from logra_kernels import Config, Run
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import KroneckerCurvature, curvature_kind
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.store import Store

COUNT, TOKENS, VOCABULARY, WIDTH = 9, 6, 13, 4
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(VOCABULARY - 2, (COUNT, TOKENS), generator=GENERATOR)  # two ids never come
MASK = torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (COUNT, 1), generator=GENERATOR)
PADDING = 3  # an id like any other, whose embedding gets no gradient


class Reader(nn.Module):
    """A classifier of embedded tokens; `one_hot` makes the embedding a linear layer."""

    def __init__(self, one_hot: bool, vocabulary: int = VOCABULARY, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(width, 3)
        table = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.embed: nn.Module = table
        if one_hot:
            self.embed = nn.Linear(vocabulary, width, bias=False)
            self.embed.weight.data = table.weight.data.T.clone()
        self.one_hot = one_hot

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = ids
        if self.one_hot:
            x = nn.functional.one_hot(ids, VOCABULARY).float()
            x[..., PADDING] = 0
        embedded = self.embed(x).tanh() * mask[..., None]
        logits: Tensor = self.head(embedded.sum(1))
        return logits


def begun(folder: Path, one_hot: bool, dtype: str = "float32", **sizes: int) -> Run:
    run = Run("toy", Config(root_dir=str(folder), dtype=dtype))
    run.watch(Reader(one_hot, **sizes), type_filter=[nn.Linear, nn.Embedding])
    return run


def passed(run: Run, ids: Tensor = IDS, batch: int = 4, begin: int = 0) -> None:
    model = run._watched.model  # type: ignore[union-attr]
    for start in range(begin, COUNT, batch):
        part = slice(start, min(start + batch, COUNT))
        with run([f"row{n}" for n in range(COUNT)[part]], MASK[part].long()):
            logits = model(ids[part], MASK[part])
            nn.functional.cross_entropy(
                logits, torch.arange(COUNT)[part] % 3, reduction="sum"
            ).backward()


def logged(folder: Path, kind: str, one_hot: bool) -> Store:
    run = begun(folder, one_hot)
    run.setup({"save": "grad", "statistic": kind})
    passed(run)
    run.finalize()
    return run.store


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_an_embedding_is_a_linear_layer_of_one_hot_inputs(tmp_path: Path, kind: str) -> None:
    """Its dense twin has the same moments, scores and norms: 1e-5 of |u||g|, float32 products."""
    stores = [logged(tmp_path / str(flag), kind, flag) for flag in (False, True)]
    found = [curvature_kind(kind).load(store) for store in stores]
    for curvature in found:
        assert isinstance(curvature, KroneckerCurvature)
    counts, dense = (curvature.moments["embed"][0] for curvature in found)  # type: ignore[attr-defined]
    assert counts.shape == (VOCABULARY,)
    assert torch.equal(counts.diag(), dense)
    seen = torch.bincount(IDS[MASK], minlength=VOCABULARY).double()
    seen[PADDING] = 0
    assert torch.equal(counts, seen / MASK.sum())
    rows, of_twin = (torch.from_numpy(store.take(range(COUNT))) for store in stores)
    assert torch.allclose(rows, of_twin, rtol=1e-5, atol=1e-6)
    ours, theirs = (Attributor(store) for store in stores)
    for mode in SCAN_MODES:
        got, want = (a.scores(rows, mode).scores for a in (ours, theirs))
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max())), mode
    sigmas = [attributor.self_influence() for attributor in (ours, theirs)]
    assert torch.allclose(sigmas[0], sigmas[1], rtol=1e-5)
    dimensions = [a.preconditioner.effective_dimensions()["embed"] for a in (ours, theirs)]
    assert dimensions[0] == pytest.approx(dimensions[1], rel=1e-6)
    factors = [a.preconditioner.factors["embed"] for a in (ours, theirs)]
    got, want = (factor.T @ factor for factor in factors)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_its_sums_are_kept_resumed_and_merged(tmp_path: Path) -> None:
    whole = logged(tmp_path / "whole", "ekfac", False)
    first = begun(tmp_path / "parts", False)
    first.setup({"save": "grad", "statistic": "ekfac"})
    model = first._watched.model  # type: ignore[union-attr]
    with first([f"row{n}" for n in range(4)], MASK[:4].long()):
        labels = torch.arange(4) % 3
        nn.functional.cross_entropy(model(IDS[:4], MASK[:4]), labels, reduction="sum").backward()
    first._recorder.suspend()  # type: ignore[union-attr]
    second = Run("toy", Config(root_dir=str(tmp_path / "parts"), dtype="float32"), resume=True)
    second.watch(Reader(False), type_filter=[nn.Linear, nn.Embedding])
    second.setup({"save": "grad", "statistic": "ekfac"})
    passed(second, begin=4)
    second.finalize()
    tensors = [store.load_curvature("ekfac")[0] for store in (whole, second.store)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all((tensors[0][key] == tensors[1][key]).all() for key in tensors[0])
    a, b, joint = (curvature_kind("kfac")(whole.layout) for _ in range(3))
    places = whole.layout.names.index("embed")
    for part, ids in ((a, [0, 2, -1]), (b, [2, 2])):
        for one in (part, joint):
            one.update_tokens(places, torch.tensor(ids), torch.ones(len(ids), WIDTH))
    a.merge(b)
    assert torch.equal(a.moments["embed"][0], joint.moments["embed"][0])  # type: ignore[attr-defined]
    assert a.moments["embed"][0].tolist()[:3] == [0.2, 0.0, 0.6]  # type: ignore[attr-defined]
    empty = curvature_kind("kfac")(whole.layout).merge(a)
    assert torch.equal(empty.moments["embed"][0], joint.moments["embed"][0])  # type: ignore[attr-defined]
    c = curvature_kind("kfac")(whole.layout)
    c.update_tokens(places, torch.ones(1, VOCABULARY), torch.ones(1, WIDTH))
    with pytest.raises(ValueError, match="other: expected one-hot inputs on both sides"):
        c.merge(a)
    with pytest.raises(ValueError, match="inputs: module 'embed': expected one-hot vectors in"):
        c.update_tokens(places, torch.tensor([1]), torch.ones(1, WIDTH))


def test_pilots_select_tokens(tmp_path: Path) -> None:
    """PCA takes the ids that come most often; eigenbasis rows of all coordinates are full EKFAC."""
    run = begun(tmp_path / "pca", False)
    with run.pilot("pca", rank=3):
        passed(run)
    projection = run._watched.projections["embed"]  # type: ignore[union-attr]
    counts = torch.bincount(IDS[MASK], minlength=VOCABULARY)
    counts[PADDING] = 0
    most = counts.sort(descending=True, stable=True).indices[:3]
    assert projection.proj_in is not None
    assert torch.equal(projection.proj_in, nn.functional.one_hot(most, VOCABULARY).float())
    full = logged(tmp_path / "full", "ekfac", False)
    run = begun(tmp_path / "eigen", False)
    with run.pilot("eigen", coordinates=full.layout.dim):
        passed(run)
    run.setup({"save": "grad", "statistic": "diagonal"})
    passed(run)
    run.finalize()
    rows, rotated = (torch.from_numpy(s.take(range(COUNT))) for s in (full, run.store))
    got, want = Attributor(run.store).scores(rotated).scores, Attributor(full).scores(rows).scores
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.usefixtures("set_threads")
@pytest.mark.parametrize("way", ["kfac", "pca", "eigen"])
def test_no_matrix_of_the_vocabulary_squared_is_made(tmp_path: Path, way: str) -> None:
    """20,000 ids: V x V is 400 million elements; what is made holds a few rows of the gradient."""
    torch.set_num_threads(1)  # more would run outside the mode
    vocabulary = 20_000
    ids = torch.randint(vocabulary, IDS.shape, generator=torch.Generator().manual_seed(1))
    run = begun(tmp_path, False, vocabulary=vocabulary, width=2)
    with Largest() as largest:
        if way == "kfac":
            run.setup({"save": "grad", "statistic": "kfac"})
            passed(run, ids)
            run.finalize()
            Attributor(run.store).top_k(torch.from_numpy(run.store.take([0])), 2)
        else:
            options: dict[str, Any] = {"rank": 9} if way == "pca" else {"coordinates": 50}
            with run.pilot(way, **options):
                passed(run, ids)
            run.setup({"save": "grad"})
            passed(run, ids)
            run.finalize()
    assert largest.elements <= 64 * vocabulary


def test_what_embeddings_have_no_diagonal_for(tmp_path: Path) -> None:
    run = begun(tmp_path, False)
    run.setup({"save": "grad", "statistic": "kfac-reduce"})
    with pytest.raises(ValueError, match="module embed: the mean of one-hot inputs has a moment"):
        passed(run)
    run = begun(tmp_path / "b", False)
    with (
        pytest.raises(ValueError, match="moments: module embed has one-hot inputs"),
        run.pilot("pca", rank=2, moments="sequence"),
    ):
        passed(run)
