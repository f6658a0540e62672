"""K-FAC and EK-FAC beside kronfluence's: moments, eigenvalues and scores.

With the data's labels, and with labels that the model draws.

Runs in the environment of `make peers-env` (its Python, -m pytest --import-mode=importlib).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dense_influence import unpacked
from sampled_losses import sampled
from summed_losses import COUNT, Losses, Sample, cnn, log, mlp
from torch import Tensor, nn
from torch.utils.data import Dataset
from toy_models import causal_loss, ragged_batch

import logra_kernels as logra
from logra_kernels import Run
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import KroneckerCurvature, load_curvature

pytest.importorskip("kronfluence", reason="kronfluence is not installed (make peers-env)")
pytest.importorskip("transformers")

TOLERANCE = 1e-4  # of the largest value


def llama() -> Sample:
    """A causal model with biases, on a ragged batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids, mask = ragged_batch(61, [5, 9, 2, 7, 9, 3, 8, 6, 4], "right")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attention_bias=True, mlp_bias=True,
    )  # fmt: skip

    def loss(model: nn.Module, part: Any) -> Tensor:
        return causal_loss(model, ids[list(part)], mask[list(part)])

    return LlamaForCausalLM(config), loss, mask


def reads_padding() -> Sample:
    """A loss that reads masked tokens too, as that of a mean over a padded batch would."""
    torch.manual_seed(0)
    x, mask = torch.randn(COUNT, 6, 5), torch.arange(6) < torch.arange(1, COUNT + 1)[:, None]

    def loss(model: nn.Module, part: Any) -> Tensor:
        output: Tensor = model(x[list(part)])
        return (output.square() + output).sum()

    return nn.Sequential(nn.Linear(5, 4)), loss, mask.long()


SAMPLES = {"mlp": mlp, "cnn": cnn, "llama": llama, "padding": reads_padding}
# kronfluence has no circular convolutions, and no padding that differs between two sides.
PARTS = {"cnn": ["plain", "grouped", "head"], "llama": ["self_attn", "mlp"]}


class Theirs(NamedTuple):
    moments: dict[str, tuple[Tensor, Tensor]]  # C_F, C_B
    eigenvalues: dict[str, tuple[Tensor, Tensor]]  # of C_F and C_B
    corrected: dict[str, Tensor]  # Λ [Ko, Ki]; empty for "kfac"
    scores: dict[str, Tensor]  # [N, N] of each module


class Examples(Dataset[Tensor]):
    """The numbers of the examples, as kronfluence reads them."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def theirs(
    folder: Path,
    kind: str,
    model: nn.Module,
    loss: Losses,
    mask: Tensor | None,
    names: dict[str, str],
    sampled_loss: Losses | None = None,
) -> Theirs:
    """What kronfluence makes of some modules; names: {ours: theirs}.

    With `sampled_loss` the factors are of that loss, and the scores of the other.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Summed(Task):
        def compute_train_loss(
            self, batch: Tensor, model: nn.Module, sample: bool = False
        ) -> Tensor:
            drawn = sampled_loss if sample else loss
            assert drawn is not None
            return drawn(model, batch.tolist())

        def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
            return loss(model, batch.tolist())

        def get_influence_tracked_modules(self) -> list[str]:
            return list(names.values())

        def get_attention_mask(self, batch: Tensor) -> Tensor | None:
            return None if mask is None else mask[batch]

    task = Summed()
    analyzer = Analyzer(
        "test", prepare_model(model, task), task, cpu=True, log_level=logging.ERROR,
        disable_tqdm=True, output_dir=str(folder),
    )  # fmt: skip
    analyzer.fit_all_factors(
        factors_name="factors",
        dataset=Examples(),
        per_device_batch_size=4,
        factor_args=FactorArguments(strategy=kind, use_empirical_fisher=sampled_loss is None),
    )
    analyzer.compute_pairwise_scores(
        scores_name="scores",
        factors_name="factors",
        query_dataset=Examples(),
        train_dataset=Examples(),
        per_device_query_batch_size=4,
        per_device_train_batch_size=4,
        score_args=ScoreArguments(damping_factor=None, compute_per_module_scores=True),
    )
    sums = analyzer.load_covariance_matrices("factors")
    bases = analyzer.load_eigendecomposition("factors")
    squares = analyzer.load_lambda_matrices("factors") if kind == "ekfac" else None
    moments, eigenvalues, corrected = {}, {}, {}
    for name, place in names.items():
        into, out = (
            sums[f"{side}_covariance"][place].double()
            / sums[f"num_{side}_covariance_processed"][place]
            for side in ("activation", "gradient")
        )
        moments[name] = into, out
        into, out = (bases[f"{side}_eigenvalues"][place] for side in ("activation", "gradient"))
        eigenvalues[name] = into, out
        if squares is not None:
            count = squares["num_lambda_processed"][place]
            corrected[name] = squares["lambda_matrix"][place] / count
    scores = analyzer.load_pairwise_scores("scores")
    each = {name: scores[place] for name, place in names.items()}
    return Theirs(moments, eigenvalues, corrected, each)


class AddOn(nn.Module):
    """A module plus P_oᵀ A P_i x with A = 0, whose gradient is the projected one."""

    def __init__(self, module: nn.Module, proj_in: Tensor, proj_out: Tensor) -> None:
        super().__init__()
        self.module = module
        self.proj_in, self.proj_out = proj_in, proj_out
        sizes = len(proj_in), len(proj_out)
        conv = isinstance(module, nn.Conv2d)
        self.inner = nn.Conv2d(*sizes, 1, bias=False) if conv else nn.Linear(*sizes, bias=False)
        nn.init.zeros_(self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x)
        if not isinstance(self.module, nn.Conv2d):
            added: Tensor = self.inner(x @ self.proj_in.T) @ self.proj_out
            return output + added
        kernel = self.proj_in.view(-1, *self.module.weight.shape[1:])
        x = nn.functional.conv2d(x, kernel, None, self.module.stride, self.module.padding)
        return output + nn.functional.conv2d(self.inner(x), self.proj_out.T[:, :, None, None])


def ours(
    folder: Path, name: str, kind: str, rank: int | None, sampled_loss: Losses | None = None
) -> Run:
    model, loss, mask = SAMPLES[name]()
    run = Run("ours", logra.Config(root_dir=str(folder), dtype="float32"))
    run.watch(model, name_filter=PARTS.get(name), bias=rank is None)
    if rank is not None:
        run.add_lora(rank=rank)
    labels = "data" if sampled_loss is None else "sampled"
    run.setup({"save": "grad", "statistic": kind, "labels": labels})
    log(run, model, loss, mask, 4)
    if sampled_loss is not None:
        for _ in run.curvature_passes():
            log(run, model, sampled_loss, mask, 4)
    run.finalize()
    return run


def of_kronfluence(folder: Path, run: Run, name: str, kind: str, rank: int | None) -> Theirs:
    """The same modules of the same model in kronfluence."""
    model, loss, mask = SAMPLES[name]()
    names = list(run.layout.names)
    if rank is None:
        return theirs(folder, kind, model, loss, mask, {name: name for name in names})
    assert run._watched is not None
    for layer in run._watched.layers:
        proj = layer.projection  # a side of at most `rank` features is not projected
        proj_in = torch.eye(layer.in_features) if proj.proj_in is None else proj.proj_in
        proj_out = torch.eye(layer.out_features) if proj.proj_out is None else proj.proj_out
        added = AddOn(model.get_submodule(layer.name), proj_in, proj_out)
        parent, _, child = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), child, added)
    return theirs(folder, kind, model, loss, mask, {name: f"{name}.inner" for name in names})


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= TOLERANCE


@pytest.mark.parametrize("rank", [None, 3], ids=["whole", "projected"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "llama"])
def test_curvature_and_scores_are_kronfluences(
    tmp_path: Path, name: str, kind: str, rank: int | None
) -> None:
    """λ = 0.1 · mean eigenvalue in both. Modules with biases whole; projected without."""
    run = ours(tmp_path / "ours", name, kind, rank)
    assert_kronfluences(run, of_kronfluence(tmp_path / "theirs", run, name, kind, rank))


@pytest.mark.parametrize("name", ["mlp", "cnn", "llama"])
def test_full_ekfac_without_a_stored_row_is_kronfluences(tmp_path: Path, name: str) -> None:
    """Two passes for the curvature, one for the scores."""
    model, loss, mask = SAMPLES[name]()
    run = Run("ours", logra.Config(root_dir=str(tmp_path / "ours")))
    run.watch(model, name_filter=PARTS.get(name), bias=True)
    run.setup({"statistic": "ekfac"})
    for _ in run.curvature_passes():
        log(run, model, loss, mask, 4)
    run.finalize()
    run.eval()
    log(run, model, loss, mask, COUNT)
    groups = {name: [name] for name in run.layout.names}
    with run.streamed(run.last_rows()[1], "dot", groups=groups) as streamed:
        log(run, model, loss, mask, 4)
    result = streamed.result()
    expected = of_kronfluence(tmp_path / "theirs", run, name, "ekfac", None)
    for module in run.layout.names:
        assert_near(result.groups[module].scores, expected.scores[module])


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_sampled_labels_give_kronfluences_default_factors(tmp_path: Path, kind: str) -> None:
    """use_empirical_fisher=False there, with the same drawn labels in every pass."""
    x = torch.randn(COUNT, 7, generator=torch.Generator().manual_seed(1))
    drawn = sampled(lambda model, part: model(x[list(part)]))
    run = ours(tmp_path / "ours", "mlp", kind, None, drawn)
    model, loss, mask = mlp()
    names = {name: name for name in run.layout.names}
    assert_kronfluences(run, theirs(tmp_path / "theirs", kind, model, loss, mask, names, drawn))


def assert_kronfluences(run: Run, expected: Theirs) -> None:
    curvature = load_curvature(run.store)
    assert isinstance(curvature, KroneckerCurvature)
    for module in run.layout.names:
        for got, want in zip(curvature.moments[module], expected.moments[module], strict=True):
            assert_near(got, want)
        values_in, _, values_out, _ = curvature.bases[module]
        for got, want in zip((values_in, values_out), expected.eigenvalues[module], strict=True):
            assert_near(got, want)
        if expected.corrected:
            assert_near(curvature.eigenvalues[module], expected.corrected[module])
    result = Attributor(run.store).scores(
        unpacked(run.store), groups={name: [name] for name in run.layout.names}
    )
    for module in run.layout.names:
        assert_near(result.groups[module].scores, expected.scores[module])


def test_kronfluence_masks_activations_alone(tmp_path: Path) -> None:
    """Where a loss reads padding, kronfluence's C_B and Λ hold the masked tokens, and ours do not.

    A masked token is no part of a row (docs/methods.md), so it is none of its curvature. C_F is
    masked on both sides, and both divide by the number of tokens that count.
    """
    run = ours(tmp_path / "ours", "padding", "ekfac", None)
    expected = of_kronfluence(tmp_path / "theirs", run, "padding", "ekfac", None)
    model, loss, mask = reads_padding()
    assert mask is not None
    x = torch.zeros(COUNT, 6, 5)
    layer = model.get_submodule("0")
    kept: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x.copy_(inputs[0])
        output.register_hook(kept.append)

    layer.register_forward_hook(keep)
    loss(model, range(COUNT)).backward()
    x = torch.cat([x, torch.ones(COUNT, 6, 1)], dim=2).double()
    dy, seen, count = kept[0].double(), mask.bool(), int(mask.sum())

    curvature = load_curvature(run.store)
    assert isinstance(curvature, KroneckerCurvature)
    (c_f, c_b), (their_f, their_b) = curvature.moments["0"], expected.moments["0"]
    for got in (c_f, their_f):
        assert_near(got, x[seen].T @ x[seen] / count)
    assert_near(c_b, dy[seen].T @ dy[seen] / count)
    assert_near(their_b, dy.flatten(0, 1).T @ dy.flatten(0, 1) / count)
    assert float(their_b.trace() / c_b.trace()) > 1.2
    assert_near(
        unpacked(run.store), torch.einsum("nt,nto,nti->noi", mask.double(), dy, x).flatten(1)
    )
    energy = torch.einsum("nto,nti->noi", dy, x).square().sum() / COUNT  # of unmasked gradients
    assert_near(expected.corrected["0"].sum(), energy)
