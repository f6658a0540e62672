"""The shrunk curvature against its definition, in dense float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_influence import MODULES, SIZES, assert_influence, dense, gradients, unpacked
from summed_losses import SAMPLES, log
from torch import Tensor

import logra_kernels as logra
from logra_kernels import Run
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature, ShrunkCurvature
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.projection import stored_scales
from logra_kernels.store import Module, Store

QUERIES = gradients(4, seed=7)


def shrunk(rows: Tensor) -> tuple[Tensor, float]:
    """H [K, K] and ρ of rows [N, K] float64, by the sums of every product's own variance."""
    products = rows[:, :, None] * rows[:, None]
    h, errors = products.mean(0), products.var(0, correction=0) / len(rows)
    off = ~torch.eye(len(h), dtype=torch.bool)
    rho = float(errors[off].sum() / h[off].square().sum()) if len(h) > 1 else 1.0
    rho = min(1.0, rho)
    return torch.where(off, (1 - rho) * h, h), rho


def curvature_of(rows: Tensor) -> ShrunkCurvature:
    curvature = ShrunkCurvature(MODULES)
    curvature.update(rows)
    return curvature


@pytest.mark.parametrize("mode", SCAN_MODES)
def test_scores_are_the_dense_ones(store: Store, mode: str) -> None:
    rows = unpacked(store)
    truth = dense(QUERIES, rows)
    curvature = ShrunkCurvature.rebuild(store)
    for i, (name, part) in enumerate(zip(store.layout.names, rows.split(SIZES, 1), strict=True)):
        h, rho = shrunk(part)
        assert 0 < rho < 1
        assert curvature.shrinkages[name] == pytest.approx(rho, rel=1e-5)
        eye = torch.eye(len(h), dtype=torch.float64)
        truth.inverses[i] = torch.linalg.inv(h + 0.1 * h.diagonal().mean() * eye)
    assert_influence(Attributor(store, curvature).scores(QUERIES, mode).scores, truth, mode)


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
def test_rows_that_hold_scaled_coordinates_score_as_their_gradients(
    tmp_path: Path, solver: str
) -> None:
    """λ is of g = t / s, and so are the norms; ρ is of t, the rows as they are stored."""
    model, loss, mask = SAMPLES["gpt"]()
    run = Run("toy", logra.Config(root_dir=str(tmp_path), dtype="float32"))
    run.watch(model, name_filter=["attn", "mlp"])
    with run.pilot("eigen", coordinates=200):
        log(run, model, loss, mask, 4)
    run.setup({"save": "grad", "statistic": "shrunk"})
    log(run, model, loss, mask, 4)
    run.finalize()
    store = run.store
    rows = unpacked(store)
    attributor = Attributor(store, "shrunk", solver=solver)
    assert attributor.preconditioner.kind == "shrunk"
    preconditioned = attributor.precondition(rows.float())
    dot = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    sigma, theta = dot[0].clone(), dot[0].clone()
    dimensions = attributor.preconditioner.effective_dimensions()
    for i, s in enumerate(stored_scales(store)):
        name, part = store.layout.names[i], rows.split(store.layout.sizes, 1)[i]
        assert s is not None
        h, _ = shrunk(part)
        damping = attributor.dampings[name]
        h_g = h / torch.outer(s, s)
        inverse = torch.linalg.inv(h_g + damping * torch.eye(len(h), dtype=torch.float64))
        g = part / s
        dot += g @ inverse @ g.T
        sigma += ((g @ inverse) * g).sum(1)
        theta += (g @ inverse).square().sum(1)
        assert dimensions[name] == pytest.approx(float((h_g * inverse).sum()), rel=1e-6)
    largest = float(dot.abs().max())
    assert torch.allclose(preconditioned.double() @ rows.T, dot, rtol=1e-5, atol=1e-6 * largest)
    found = {mode: attributor.scores(rows.float(), mode).scores for mode in SCAN_MODES}
    wanted = {"dot": dot, "l-relatif": dot / sigma.sqrt(), "theta-relatif": dot / theta.sqrt()}
    for mode, want in wanted.items():
        size = float(want.abs().max())
        assert torch.allclose(found[mode].double(), want, rtol=1e-4, atol=1e-5 * size), mode
    # Relative to the mean over all coordinates of a weight, as the diagonal's damping is.
    diagonal = Attributor(store, logra.curvature.DiagonalCurvature.rebuild(store))
    assert attributor.dampings == pytest.approx(diagonal.dampings, rel=1e-5)


def test_between_the_diagonal_and_the_raw_curvature() -> None:
    """Few rows determine no products of coordinates; many independent ones, as good as all."""
    module = [Module("one", 4, 4)]
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator)
    for count, low, high in ((12, 0.4, 1.0), (20_000, 0.0, 0.01)):
        rows = torch.randn(count, 16, generator=generator) @ mix
        curvature, raw = ShrunkCurvature(module), RawCurvature(module)
        curvature.update(rows)
        raw.update(rows)
        assert low <= curvature.shrinkages["one"] <= high
    got, want = (one.damped().precondition(rows[:5]) for one in (curvature, raw))
    assert torch.allclose(got, want, rtol=0.05, atol=0.02 * float(want.abs().max()))
    single = ShrunkCurvature([Module("one", 1, 1)])
    single.update(torch.ones(3, 1))
    assert single.shrinkages == {"one": 1.0}
    assert single.damped().precondition(torch.ones(1, 1)).item() == pytest.approx(1 / 1.1)


@pytest.mark.parametrize("split", [1, 7, 256, 300])
def test_bits_do_not_depend_on_how_rows_are_split_into_calls(split: int) -> None:
    rows = gradients(300)
    curvature = ShrunkCurvature(MODULES)
    for part in rows.split(split):
        curvature.update(part)
    assert curvature.checksum == curvature_of(rows).checksum


def test_shards_merge() -> None:
    rows = gradients(300)
    merged = curvature_of(rows[:120]).merge(curvature_of(rows[120:]))
    whole = curvature_of(rows)
    assert merged.count == 300
    assert merged.shrinkages == pytest.approx(whole.shrinkages, rel=1e-9)
    got, want = (one.damped().precondition(QUERIES) for one in (merged, whole))
    assert torch.allclose(got, want, rtol=1e-6)


def test_a_store_keeps_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"holds no curvature 'shrunk'; .* ShrunkCurvature\.reb"):
        ShrunkCurvature.load(store)
    curvature = ShrunkCurvature.rebuild(store)
    curvature.save(store)
    loaded = ShrunkCurvature.load(store)
    assert loaded.checksum == curvature.checksum
    assert loaded.shrinkages == curvature.shrinkages
    tensors, meta = store.load_curvature("shrunk")
    for damage, message in (
        ({"products": [1.0, 2.0, 3.0]}, "does not match its checksum"),
        ({"products": [1.0]}, "lacks its exponents, count or checksum"),
    ):
        found = (tensors, {**meta, **damage})
        monkeypatch.setattr(Store, "load_curvature", lambda self, kind, found=found: found)
        with pytest.raises(ValueError, match=f"curvature 'shrunk' {message}; rebuild it with Shr"):
            ShrunkCurvature.load(store)
