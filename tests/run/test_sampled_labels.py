"""Curvatures of labels that the model draws: the Fisher matrix, from passes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sampled_losses import sampled
from summed_losses import COUNT, Sample, gpt, log, mlp, watch
from torch import Tensor, nn

import logra_kernels as logra
from logra_kernels import Run
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature, curvature_kind, kinds, load_curvature
from logra_kernels.run import sample_labels
from logra_kernels.store import Store, StoreMismatchError


def sampled_mlp() -> Sample:
    x = torch.randn(COUNT, 7, generator=torch.Generator().manual_seed(1))
    model, _, _ = mlp()
    return model, sampled(lambda model, part: model(x[list(part)])), None


def sampled_gpt() -> Sample:
    model, _, mask = gpt()
    assert mask is not None
    ids = torch.randint(1, 61, mask.shape, generator=torch.Generator().manual_seed(0))

    def logits(model: nn.Module, part: Sequence[int]) -> Tensor:
        of_all: Tensor = model(input_ids=ids[list(part)], attention_mask=mask[list(part)]).logits
        return of_all[:, :-1]

    return model, sampled(logits, mask[:, 1:]), mask


SAMPLES = {"mlp": (mlp, sampled_mlp), "gpt": (gpt, sampled_gpt)}


def begun(folder: Path, name: str, kind: str, labels: str, **options: bool) -> Run:
    run = Run("toy", logra.Config(root_dir=str(folder), dtype="float32"), **options)
    model, _, _ = SAMPLES[name][0]()
    watch(run, model, name, 3, True)
    run.setup({"save": "grad", "statistic": kind, "labels": labels})
    return run


def passed(run: Run, name: str, which: int, batch: int = 4) -> None:
    """Pass all examples with the data's labels (0), or with sampled ones (1)."""
    _, loss, mask = SAMPLES[name][which]()
    model = run._watched.model  # type: ignore[union-attr]
    log(run, model, loss, mask, batch)


def finished(folder: Path, name: str, kind: str, batch: int = 4) -> Store:
    run = begun(folder, name, kind, "sampled")
    passed(run, name, 0, batch)
    for _ in run.curvature_passes():
        passed(run, name, 1, batch)
    run.finalize()
    return run.store


def tensors_of(store: Store, kind: str) -> tuple[dict[str, bytes], int]:
    tensors, meta = store.load_curvature(kind)
    return {key: array.tobytes() for key, array in tensors.items()}, meta["count"]


@pytest.mark.usefixtures("set_threads")
@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("name", SAMPLES)
def test_the_curvature_is_that_of_sampled_rows_and_the_rows_are_the_datas(
    tmp_path: Path, name: str, kind: str
) -> None:
    """Bit for bit: a run whose own labels are the sampled ones has the curvature, another the rows.

    On one thread; the GPT's own products have equal bits in batches of other sizes, too.
    """
    torch.set_num_threads(1)
    batches = (9, 2, 1) if name == "gpt" else (4, 4, 4)
    store = finished(tmp_path / "store", name, kind)
    of_data, of_sampled = (begun(tmp_path / str(n), name, kind, "data") for n in (0, 1))
    passed(of_data, name, 0, batches[0])
    passed(of_sampled, name, 1, batches[1])
    for run in (of_data, of_sampled):
        run.finalize()
    assert (store.take(range(COUNT)) == of_data.store.take(range(COUNT))).all()
    assert tensors_of(store, kind) == tensors_of(of_sampled.store, kind)
    assert tensors_of(store, kind) != tensors_of(of_data.store, kind)
    other = finished(tmp_path / "other", name, kind, batches[2])
    assert tensors_of(other, kind) == tensors_of(store, kind)
    assert load_curvature(store).labels == "sampled"
    assert load_curvature(of_sampled.store).labels == "data"
    assert not store.verify()
    queries = torch.from_numpy(store.take(range(2)))
    assert Attributor(store).scores(queries).scores.isfinite().all()


def test_the_fisher_is_the_gauss_newton_matrix(tmp_path: Path) -> None:
    """E over drawn labels of g gᵀ is Jᵀ (diag p - p pᵀ) J: within 5 % for 4,000 draws a label."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3))
    x, draws = torch.randn(2, 3), 4000
    run = Run("toy", logra.Config(root_dir=str(tmp_path), dtype="float32"))
    run.watch(model)
    run.setup({"statistic": "raw", "labels": "sampled"})
    for _ in run.curvature_passes():
        for start in range(0, draws, 500):
            ids = [f"{n}-{m}" for m in range(start, start + 500) for n in range(2)]
            with run(ids):
                logits = model(x.repeat(500, 1))
                labels = sample_labels(logits, ids)
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    run.finalize()
    curvature = run.curvature
    assert isinstance(curvature, RawCurvature)
    want = torch.zeros(9, 9)
    for one in x:
        p = model(one).softmax(0).detach()
        want += torch.kron(p.diag() - torch.outer(p, p), torch.outer(one, one)) / 2
    got = curvature.covariance("0").float() / curvature.count
    assert (got - want).norm() <= 0.05 * want.norm()


def test_a_killed_run_samples_anew(tmp_path: Path) -> None:
    """Rows that are stored are not logged again; the sampled passes begin at their beginning."""
    whole = finished(tmp_path / "whole", "gpt", "ekfac")
    run = begun(tmp_path / "parts", "gpt", "ekfac", "sampled")
    passed(run, "gpt", 0)
    for number in run.curvature_passes():
        passed(run, "gpt", 1)
        if number == 1:
            break
    with pytest.raises(RuntimeError, match="'sampled' was asked for; pass the examples inside"):
        run.finalize()
    assert run._recorder is not None
    run._recorder.suspend()
    run = begun(tmp_path / "parts", "gpt", "ekfac", "sampled", resume=True)
    assert all(run.is_logged(f"row{n}") for n in range(COUNT))
    for _ in run.curvature_passes():
        passed(run, "gpt", 1)
    run.finalize()
    assert tensors_of(run.store, "ekfac") == tensors_of(whole, "ekfac")
    assert run.store.num_rows == COUNT
    again = begun(tmp_path / "parts", "gpt", "ekfac", "sampled", resume=True)
    passed(again, "gpt", 0)
    again.finalize()  # the store's curvature stays
    assert tensors_of(again.store, "ekfac") == tensors_of(whole, "ekfac")
    other = begun(tmp_path / "parts", "gpt", "ekfac", "data", resume=True)
    with pytest.raises(StoreMismatchError, match="its curvature 'ekfac' is of sampled labels"):
        passed(other, "gpt", 0)


def test_what_sampling_refuses(tmp_path: Path) -> None:
    run = begun(tmp_path, "mlp", "kfac", "data")
    with pytest.raises(RuntimeError, match=r'setup\(\{"labels": "sampled"'):
        next(run.curvature_passes())
    with pytest.raises(ValueError, match="labels: expected 'data' or 'sampled', got 'model'"):
        run.setup({"statistic": "kfac", "labels": "model"})
    with pytest.raises(ValueError, match="labels: 'sampled' is of a curvature; name one"):
        run.setup({"save": "grad", "labels": "sampled"})
    run.setup({"save": "grad", "statistic": "kfac", "labels": "sampled"})
    passed(run, "mlp", 0)
    with pytest.raises(RuntimeError, match="no example was passed inside"):
        list(run.curvature_passes())
    with pytest.raises(ValueError, match="kfac: has no eigenvalues to correct"):
        curvature_kind("kfac")(run.layout).correct(torch.zeros(1, run.layout.dim))
    a, b = (curvature_kind("raw")(run.layout) for _ in range(2))
    a.labels = "sampled"
    with pytest.raises(ValueError, match="other: expected sampled labels, got data"):
        a.merge(b)


def test_labels_follow_from_seed_and_id_alone() -> None:
    logits = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0))
    ids = ["a", "b", "c", "d", "e"]
    labels = sample_labels(logits, ids)
    for n, name in enumerate(ids):
        assert torch.equal(sample_labels(logits[n : n + 1], [name])[0], labels[n])
    assert not torch.equal(sample_labels(logits, ids, seed=1), labels)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]]).expand(5, 7)  # padding on the left
    padded = sample_labels(logits, ids, mask=mask)
    assert torch.equal(padded[:, 2:], sample_labels(logits[:, 2:], ids))
    assert not padded[:, :2].any()
    certain = torch.full((3, 4), -100.0)
    certain[range(3), [0, 3, 1]] = 100.0
    assert sample_labels(certain, [1, 2, 3]).tolist() == [0, 3, 1]
    with pytest.raises(ValueError, match=r"logits: expected \[5, ..., C\], got \[4, 7, 11\]"):
        sample_labels(logits[:4], ids)
    with pytest.raises(ValueError, match=r"mask: expected \[5, 7\], got \[5, 6\]"):
        sample_labels(logits, ids, mask=mask[:, :6])


def test_labels_have_the_models_probabilities() -> None:
    """Within four standard deviations of a binomial for each class."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 20000
    labels = sample_labels(p.log().expand(1, count, 5), ["x"])[0]
    found = torch.bincount(labels, minlength=5) / count
    assert ((found - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()
