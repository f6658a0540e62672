"""Means, variances and statistics of a user's own, of rows and of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from summed_losses import COUNT, PARTS, gpt, log, mlp, watch
from torch import Tensor

import logra_kernels as logra
from logra_kernels import Covariance, Run
from logra_kernels.cli import main
from logra_kernels.curvature import KfacCurvature, Mean, Statistic, Variance
from logra_kernels.store import Store


class Largest(Statistic):
    """The largest magnitude, as docs/your-own-model.md writes it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.values = torch.zeros(size)

    def update(self, vectors: Tensor) -> None:
        self.values = torch.maximum(self.values, vectors.abs().amax(0))

    def merge(self, other: Largest) -> None:
        self.values = torch.maximum(self.values, other.values)

    def save(self) -> dict[str, Tensor]:
        return {"values": self.values}

    @classmethod
    def load(cls, size: int, tensors: Mapping[str, Tensor]) -> Largest:
        largest = cls(size)
        largest.values = tensors["values"]
        return largest


EVERY = {
    "grad": [Mean, Variance, Largest],
    "forward": [Covariance, Mean, Largest],
    "backward": [Covariance, "variance"],
}
ASKED: list[tuple[str, type[Mean] | type[Largest]]] = [
    ("grad", Mean), ("grad", Variance), ("grad", Largest),
    ("forward", Mean), ("forward", Largest), ("backward", Variance),
]  # fmt: skip


def begun(folder: Path, setup: Any = None, resume: bool = False, **config: Any) -> Run:
    model, _, _ = gpt()
    run = Run("toy", logra.Config(root_dir=str(folder), **config), resume=resume)
    watch(run, model, "gpt", 3, True)
    run.setup(setup or {"save": "grad", "statistic": EVERY})
    return run


def passed(run: Run, batch: int = 4, begin: int = 0, end: int = COUNT) -> None:
    _, loss, mask = gpt()
    assert mask is not None
    model = run._watched.model  # type: ignore[union-attr]
    left = [n for n in range(begin, end) if not run.is_logged(f"row{n}")]
    for part in (left[start : start + batch] for start in range(0, len(left), batch)):
        with run([f"row{n}" for n in part], mask[part]):
            loss(model, part).backward()


def finished(folder: Path, batch: int = 4) -> Run:
    run = begun(folder)
    passed(run, batch)
    run.finalize()
    return run


def tensors_of(store: Store) -> dict[str, dict[str, bytes]]:
    kept = {name: store.load_curvature(name)[0] for name in store.curvatures}
    return {name: {k: v.tobytes() for k, v in tensors.items()} for name, tensors in kept.items()}


def test_they_are_what_their_names_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of "grad" by the stored rows; of tokens by a kfac beside them, which has seen the same."""
    run = finished(tmp_path)
    rows = torch.from_numpy(run.store.take(range(COUNT))).double()
    reader = Run("toy", logra.Config(root_dir=str(tmp_path)))
    reader.watch(gpt()[0], name_filter=PARTS["gpt"], bias=True)
    reader.initialize_from_log()
    found = {(tensor, kind): dict(reader.statistic(tensor, kind)) for tensor, kind in ASKED}
    curvature = reader.curvature
    assert isinstance(curvature, KfacCurvature)
    for module, part in zip(run.layout, run.layout.split(rows), strict=True):
        mean, variance, largest = (
            found["grad", kind][module.name] for kind in (Mean, Variance, Largest)
        )
        assert isinstance(mean, Mean)
        assert isinstance(variance, Variance)
        assert isinstance(largest, Largest)
        assert (mean.count, variance.count) == (COUNT, COUNT)
        assert torch.allclose(mean.value, part.mean(0), rtol=1e-12, atol=1e-14)
        assert torch.allclose(variance.value, part.var(0, unbiased=False), rtol=1e-9, atol=1e-14)
        assert torch.equal(largest.values, part.abs().amax(0).float())
        out, into = found["backward", Variance][module.name], found["forward", Mean][module.name]
        assert isinstance(out, Variance)
        assert isinstance(into, Mean)
        means = out._sums.total()[0] / out.count
        second = curvature.moments[module.name][1].diagonal()
        assert torch.allclose(out.value + means**2, second, rtol=1e-6)
        assert out.count == into.count == curvature._moments[0][1].count
    assert not run.store.verify()
    assert main(["info", str(run.path)]) == 0
    told = capsys.readouterr().out
    assert "curvature    kfac, of 9 rows\n" in told
    assert "statistics   grad-mean, of 9 rows; grad-variance, of 9 rows;" in told


@pytest.mark.usefixtures("set_threads")
def test_bits_do_not_depend_on_batches_and_kills(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = tensors_of(finished(tmp_path / "whole").store)
    assert tensors_of(finished(tmp_path / "ones", 1).store) == whole
    for suspended in (True, False):
        folder = tmp_path / str(suspended)
        first = begun(folder)
        passed(first, end=6)
        recorder = first._recorder
        assert recorder is not None
        if suspended:
            recorder.suspend()
        else:
            recorder._writer.close(finalize=False)
        second = begun(folder, resume=True)
        assert second.is_logged("row0") == suspended
        passed(second, 2)
        second.finalize()
        assert second.store.num_rows == COUNT
        assert tensors_of(second.store) == whole


def test_a_running_run_gives_them_too(tmp_path: Path) -> None:
    run = begun(tmp_path, {"statistic": {"grad": Mean}})
    passed(run)
    mean = next(iter(run.statistic("grad", Mean).values()))
    assert mean.count == COUNT
    run.finalize()
    assert run.store.num_rows == 0
    again = next(iter(run.statistic("grad", Mean).values()))
    assert torch.equal(mean.value, again.value)


def test_parts_merge(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(700, 5, generator=generator)
    for kind in (Mean, Variance, Largest):
        whole, a, b = (kind(5) for _ in range(3))
        whole.update(vectors)
        a.update(vectors[:300])
        b.update(vectors[300:])
        a.merge(b)  # type: ignore[arg-type]
        for key, value in whole.save().items():
            if key in ("values",):
                assert torch.equal(value, a.save()[key])
        if isinstance(whole, Mean) and isinstance(a, Mean):
            assert a.count == 700
            assert torch.allclose(a.value, whole.value, rtol=1e-12, atol=1e-15)


def test_what_is_refused(tmp_path: Path) -> None:
    run = begun(tmp_path, {"save": "grad"})
    passed(run)
    run.setup({"save": "grad", "statistic": {"grad": Mean}})
    with pytest.raises(RuntimeError, match="rows were saved before it was asked for"):
        passed_again(run)
    run.finalize()
    with pytest.raises(ValueError, match="keeps no statistic 'grad-variance'"):
        run.statistic("grad", Variance)
    other = finished(tmp_path / "b")

    class Mean2(Mean):
        pass

    Mean2.__name__ = "Largest"
    with pytest.raises(ValueError, match=r"statistic 'grad-largest' of module '.*' cannot be read"):
        other.statistic("grad", Mean2)


def passed_again(run: Run) -> None:
    _, loss, mask = gpt()
    assert mask is not None
    with run(["new"], mask[:1]):
        loss(run._watched.model, [0]).backward()  # type: ignore[union-attr]


def test_eigenbasis_rows_have_statistics_of_their_sides(tmp_path: Path) -> None:
    """A row holds some coordinates; the sides are the whole projected ones."""
    model, loss, mask = mlp()
    run = Run("toy", logra.Config(root_dir=str(tmp_path)))
    run.watch(model)
    with run.pilot("eigen", coordinates=40):
        log(run, model, loss, mask, 4)
    run.setup({"save": "grad", "statistic": {"grad": [Mean, "diagonal"], "forward": Mean}})
    log(run, model, loss, mask, 4)
    run.finalize()
    projections = run._watched.projections  # type: ignore[union-attr]
    for tensor, sizes in (
        ("grad", {module.name: module.size for module in run.layout}),
        ("forward", {name: p.ki for name, p in projections.items()}),
    ):
        found = run.statistic(tensor, Mean)
        assert {name: len(mean.value) for name, mean in found.items()} == sizes
