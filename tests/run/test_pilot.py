"""Projections from a pilot: PCA and eigenbasis rows, against their definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from summed_losses import COUNT, PARTS, SAMPLES, gpt, log, watch
from torch import Tensor, nn

from logra_kernels import Config, Run
from logra_kernels.attribution import Attributor
from logra_kernels.capture import Capture
from logra_kernels.capture.layers import make_layer
from logra_kernels.curvature import KroneckerCurvature, RawCurvature
from logra_kernels.curvature.moment import SequenceMoments
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.projection import PilotProjection, stored_projections
from logra_kernels.projection.pilot import Basis, staircase
from logra_kernels.store import Store


def rows_of(store: Store, count: int = COUNT) -> Tensor:
    return torch.from_numpy(store.take(range(count)))


def piloted(
    folder: Path,
    name: str,
    init: str = "eigen",
    batch: int = 4,
    dtype: str = "float32",
    moments: str = "expand",
    rank: int | None = None,
    coordinates: int | None = None,
) -> Run:
    """A run whose projection is made from all nine examples, and that then logs them."""
    model, loss, mask = SAMPLES[name]()
    run = Run("toy", Config(root_dir=str(folder), dtype=dtype))
    run.watch(model, name_filter=PARTS[name], bias=True)
    with run.pilot(init, rank=rank, coordinates=coordinates, moments=moments):
        log(run, model, loss, mask, batch)
    run.setup({"save": "grad", "statistic": "diagonal"})
    log(run, model, loss, mask, batch)
    run.finalize()
    return run


def ekfac_of(folder: Path, name: str, kind: str = "ekfac") -> Run:
    """The same without a projection."""
    model, loss, mask = SAMPLES[name]()
    run = Run("toy", Config(root_dir=str(folder), dtype="float32"))
    watch(run, model, name, None, True)
    run.setup({"save": "grad", "statistic": kind})
    log(run, model, loss, mask, 4)
    run.finalize()
    return run


OF_MOMENTS = {"expand": "ekfac", "reduce": "ekfac-reduce", "sequence": "ec-shampoo"}


# Nine vectors leave most of a basis of ekfac-reduce undetermined.
@pytest.mark.parametrize(
    ("name", "moments"),
    [(name, moments) for name in SAMPLES for moments in ("expand", "sequence")],
)
def test_eigen_rows_of_all_coordinates_reproduce_full_ekfac(
    tmp_path: Path, name: str, moments: str
) -> None:
    """Relative to |u||g| 1e-4: both are float32 products of float64 bases."""
    full = ekfac_of(tmp_path / "full", name, OF_MOMENTS[moments]).store
    run = piloted(tmp_path / "eigen", name, coordinates=full.layout.dim, moments=moments)
    ekfac, eigen = Attributor(full), Attributor(run.store)
    assert eigen.preconditioner.kind == "diagonal"
    rows, rotated = rows_of(full), rows_of(run.store)
    for module, a in ekfac.dampings.items():
        assert eigen.dampings[module] == pytest.approx(a, rel=1e-5)
    plain = run.preconditioner(False).precondition(rotated)  # g / s of the rows s·g
    norms = (plain * rotated).sum(dim=1).sqrt()
    assert torch.allclose(norms, rows.norm(dim=1), rtol=1e-5)
    allowed = ekfac.precondition(rows).norm(dim=1)[:, None] * rows.norm(dim=1)
    got, want = eigen.scores(rotated).scores, ekfac.scores(rows).scores
    assert ((got - want).abs() <= 1e-4 * allowed).all()
    assert torch.allclose(eigen.self_influence(), ekfac.self_influence(), rtol=1e-4)


def test_the_staircase_is_the_largest_products_of_eigenvalues(tmp_path: Path) -> None:
    """Against all products of full K-FAC, each module's over their mean."""
    full = ekfac_of(tmp_path / "full", "mlp", "kfac")
    curvature = full.curvature
    assert isinstance(curvature, KroneckerCurvature)
    relative = {name: v / v.mean() for name, v in curvature.eigenvalues.items()}
    best = torch.cat([values.flatten() for values in relative.values()]).sort(descending=True)
    run = piloted(tmp_path / "eigen", "mlp", coordinates=60)
    assert run.layout.dim == 60
    shares = run.store.projection["energy_shares"]
    kept = sum(shares[name] * values.numel() for name, values in relative.items())
    assert kept == pytest.approx(float(best.values[:60].sum()), rel=1e-6)
    widths = [p.ko * p.ki for p in run._watched.projections.values()]  # type: ignore[union-attr]
    assert sum(widths) < full.layout.dim  # the corners are cut to the stairs


def basis_of(values_out: list[float], values_in: list[float]) -> Basis:
    sides = [torch.tensor(values).double() for values in (values_in, values_out)]
    eyes = [torch.eye(len(values)).double() for values in sides]
    return Basis(sides[0], eyes[0], sides[1], eyes[1])


def test_staircase_gives_each_module_a_coordinate_and_keeps_to_d() -> None:
    """a's products over their mean: [[3.6, 0.9, 0], [1.2, 0.3, 0]]; no gradient reached b."""
    bases = {"a": basis_of([3, 1], [4, 1, 0]), "b": basis_of([0, 0], [0, 0, 0])}
    made = staircase(bases, {"a": 12.0, "b": 0.0}, 4, 7)
    a, b = (made.projections[name] for name in "ab")
    assert a.coordinates is not None
    assert b.coordinates is not None
    assert a.scale is not None
    assert b.scale is not None
    assert (a.ko, a.ki, a.coordinates.tolist()) == (2, 2, [0, 1, 2])
    assert (b.ko, b.ki, b.coordinates.tolist()) == (1, 1, [0])
    assert a.scale.pow(-2).tolist() == pytest.approx([2 * 3.7, 2 * 1.0, 2 * 1.3])  # mean of Λ: 2
    assert b.scale.tolist() == [1.0]
    assert made.described["energy_shares"] == {"a": pytest.approx(5.7 / 6), "b": 1.0}
    for count in (1, 13):
        with pytest.raises(ValueError, match=rf"expected 2 \(one a module\) to 12, got {count}"):
            staircase(bases, {"a": 12.0, "b": 0.0}, count, 7)


def test_a_few_far_coordinates_do_not_widen_the_corner() -> None:
    """Vectors that only they need cost more than they keep; all coordinates need all vectors."""
    into, out = [100.0] * 24 + [0.5] * 376, [100.0] * 16 + [0.5] * 284
    for count, sides in ((400, (16, 32)), (300 * 400, (300, 400))):
        made = staircase({"m": basis_of(out, into)}, {"m": 1.0}, count, 7).projections["m"]
        assert made.coordinates is not None
        assert len(made.coordinates) == count
        assert made.ko <= sides[0] + 16
        assert made.ki <= sides[1] + 16
        if count > 400:
            assert (made.ko, made.ki) == sides


def test_a_basis_may_order_tokens() -> None:
    """A basis of an embedding that is an order of its tokens: rows hold those tokens' gradients."""
    embedding, order = nn.Embedding(30, 6), torch.randperm(30)
    ids, dy = torch.randint(30, (4, 9)), torch.randn(4, 9, 6)
    gradients = torch.einsum("nti,nto->noi", nn.functional.one_hot(ids, 30).float(), dy)
    values = [torch.arange(size, 0, -1).double() for size in (30, 6)]
    basis = Basis(values[0], torch.eye(30).double()[order].T, values[1], torch.eye(6).double())
    layer = make_layer("e", embedding)
    assert layer is not None
    layer.projection = made = staircase({"e": basis}, {"e": 1.0}, 25, 4).projections["e"]
    with Capture(nn.Sequential(embedding), [layer], 4) as capture:
        (embedding(ids) * dy).sum().backward()
    assert made.coordinates is not None
    assert made.scale is not None
    rows, columns = made.coordinates // made.ki, made.coordinates % made.ki
    torch.testing.assert_close(capture.rows(), gradients[:, rows, order[columns]] * made.scale)


@pytest.mark.parametrize("equal", [False, True])
def test_the_staircase_of_any_d_is_what_sorting_all_products_gives(
    equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logra_kernels.projection.pilot.KEPT_GAIN", 1.0)  # whatever it costs
    generator = torch.Generator().manual_seed(0)
    bases = {}
    for name, sizes in {"a": (7, 12), "b": (9, 3), "c": (1, 5)}.items():
        values = [
            torch.rand(size, generator=generator).pow(8).sort(descending=True).values
            for size in sizes
        ]
        values = [torch.ones(size) if equal else v for v, size in zip(values, sizes, strict=True)]
        bases[name] = basis_of(*(v.tolist() for v in values))
    products = [torch.outer(b.values_out, b.values_in) for b in bases.values()]
    every = torch.cat([(p / p.mean()).flatten() for p in products]).sort(descending=True).values
    for count in range(3, len(every) + 1):
        made = staircase(bases, dict.fromkeys(bases, 1.0), count, 7)
        kept_by = [math.prod(p.row_shape) for p in made.projections.values()]
        assert sum(kept_by) == count
        shares = made.described["energy_shares"]
        kept = sum(shares[n] * p.numel() for n, p in zip(bases, products, strict=True))  # type: ignore[index]
        alone = sum(float((p / p.mean()).max()) < float(every[count - 1]) for p in products)
        if not alone:  # a module whose best is not among the first D displaces the last of them
            assert kept == pytest.approx(float(every[:count].sum()), rel=1e-9)


@pytest.mark.parametrize("moments", ["expand", "reduce", "sequence"])
def test_pca_is_the_first_eigenvectors(tmp_path: Path, moments: str) -> None:
    run = piloted(tmp_path / "pca", "gpt", "pca", rank=5, moments=moments)
    kind = {"expand": "kfac", "reduce": "kfac-reduce", "sequence": "ec-shampoo"}[moments]
    curvature = ekfac_of(tmp_path / "whole", "gpt", kind).curvature
    assert isinstance(curvature, KroneckerCurvature)
    for name, projection in run._watched.projections.items():  # type: ignore[union-attr]
        sides = zip(curvature.moments[name], (projection.proj_in, projection.proj_out), strict=True)
        for moment, matrix in sides:
            assert matrix is not None
            assert torch.allclose(matrix @ matrix.T, torch.eye(5), atol=1e-6)
            values = torch.linalg.eigvalsh(moment).flip(0)[:5]
            kept = torch.einsum("ki,ij,kj->k", matrix.double(), moment, matrix.double())
            assert torch.allclose(kept, values, rtol=1e-5, atol=1e-6 * float(values[0]))
    assert run.store.projection["kind"] == "pca"
    assert run.store.projection.get("moments", "expand") == moments


def test_sequence_moments_are_the_gradients() -> None:
    """Formed without G for few tokens, and of G for many: float64's rounding apart."""
    generator = torch.Generator().manual_seed(0)
    sums, want_in, want_out = SequenceMoments(30, 20), torch.zeros(30, 30), torch.zeros(20, 20)
    for tokens in (1, 3, 200):
        x, dy = (torch.randn(tokens, k, generator=generator) for k in (30, 20))
        gradient = dy.double().T @ x.double()
        want_in, want_out = want_in + gradient.T @ gradient, want_out + gradient @ gradient.T
        sums.add(x, dy)
    for got, want in ((sums.inputs, want_in), (sums.outputs, want_out)):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


def unwhitened(*arguments: Any) -> PilotProjection:
    """`staircase` as it was before rows were whitened: a store of that time has no scale."""
    made = staircase(*arguments)
    bare = {name: replace(p, scale=None) for name, p in made.projections.items()}
    return PilotProjection(bare, made.described)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_scores_of_whitened_rows_are_those_of_the_coordinates(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mode and damping, and no curvature, to the rounding of float32 rows."""
    white = piloted(tmp_path / "white", name, coordinates=90)
    monkeypatch.setattr("logra_kernels.run.pilot.staircase", unwhitened)
    bare = piloted(tmp_path / "bare", name, coordinates=90)
    rows = [rows_of(run.store) for run in (white, bare)]
    scales = [p.scale for p in white._watched.projections.values()]  # type: ignore[union-attr]
    scale = torch.cat([s for s in scales if s is not None])
    assert scale.shape == (90,)
    assert torch.allclose(rows[0], rows[1] * scale, rtol=1e-5)
    # All columns of all modules are of about one size: the pilot saw just these rows.
    assert 0.3 < float(rows[0].square().mean()) < 1
    for options in (
        {},
        {"damping_scale": 1.0},
        {"damping_scale": 0.0},
        {"damping": 1e-3},
        {"curvature": "none"},
    ):
        ours, theirs = (Attributor(run.store, **options) for run in (white, bare))
        assert ours.preconditioner.dampings == pytest.approx(theirs.preconditioner.dampings)
        for mode in SCAN_MODES:
            got, want = (
                a.scores(r, mode).scores.double() for a, r in zip((ours, theirs), rows, strict=True)
            )
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    dimensions = [run.preconditioner().effective_dimensions() for run in (white, bare)]
    assert dimensions[0] == pytest.approx(dimensions[1], rel=1e-5)
    one, other = (run.preconditioner(False) for run in (white, bare))
    assert torch.allclose(one.precondition(rows[0]) * scale, other.precondition(rows[1]), 1e-5)


def test_only_the_diagonal_goes_with_scaled_rows(tmp_path: Path) -> None:
    store = piloted(tmp_path, "mlp", coordinates=90).store
    with pytest.raises(ValueError, match="which 'raw' would damp by their scale; 'diagonal' and"):
        Attributor(store, RawCurvature.rebuild(store))
    run = Run("toy", Config(root_dir=str(tmp_path)))
    run.initialize_from_log()
    assert run.curvature.kind == "diagonal"


@pytest.mark.parametrize("init", ["eigen", "pca"])
def test_queries_are_projected_as_the_store_says(tmp_path: Path, init: str) -> None:
    """A new process opens the store, and its queries have the rows of the training examples."""
    rank, coordinates = (None, 700) if init == "eigen" else (5, None)
    piloted(tmp_path, "gpt", init, dtype="float16", rank=rank, coordinates=coordinates)
    model, loss, mask = gpt()
    run = Run("toy", Config(root_dir=str(tmp_path)))
    run.watch(model, name_filter=PARTS["gpt"], bias=True)
    run.initialize_from_log()
    log(run, model, loss, mask, COUNT)
    queries = run.last_rows()[1]
    stored = rows_of(run.store)
    assert (queries - stored).norm() <= 2**-10 * stored.norm()
    top = run.attributor().top_k(queries, 1, "l-relatif")
    assert top.top_rows[:, 0].tolist() == list(range(COUNT))
    u = run.attributor().precondition(queries[:2])
    assert mask is not None
    with run.token_scores(u, COUNT, mask) as capture:
        loss(model, range(COUNT)).backward()
    want = (u @ queries.T).double()
    assert torch.allclose(capture.token_scores().sum(2).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("set_threads")
def test_the_rows_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    """The pilot's float64 products of single examples are the same in every batch.

    On one thread: the model's own products may differ between batches where threads share them.
    """
    torch.set_num_threads(1)
    stores = [
        piloted(tmp_path / str(batch), "gpt", batch=batch, coordinates=200).store
        for batch in (1, 4, 9)
    ]
    for store in stores[1:]:
        assert store.projection == stores[0].projection
        assert torch.equal(rows_of(store), rows_of(stores[0]))


@pytest.mark.parametrize("kind", ["kfac", "kfac-reduce"])
@pytest.mark.parametrize("name", SAMPLES)
def test_eigen_from_statistics_is_the_pilots(tmp_path: Path, name: str, kind: str) -> None:
    """`add_lora(init="eigen")` after a pass with statistics: the same examples, the same rows.

    With and without finalize between, from a store that holds them, and with rows in float16.
    The scales come from E‖G‖², which is of float32 gradients here, of float64 products there.
    """
    moments = "reduce" if kind == "kfac-reduce" else "expand"
    pilot = piloted(tmp_path / "pilot", name, coordinates=60, moments=moments).store
    model, loss, mask = SAMPLES[name]()
    for way in ("at once", "finalized", "opened", "float16"):
        dtype = "float16" if way == "float16" else "float32"
        config = Config(root_dir=str(tmp_path / way), dtype=dtype)
        run = Run("toy", config)
        run.watch(model, name_filter=PARTS[name], bias=True)
        run.setup({"statistic": kind})
        log(run, model, loss, mask, 4)
        if way in ("finalized", "opened"):
            run.finalize()
        if way == "opened":
            run = Run("toy", config)
            run.watch(model, name_filter=PARTS[name], bias=True)
            run.initialize_from_log()
        run.add_lora(init="eigen", coordinates=60)
        run.setup({"save": "grad", "statistic": "diagonal"})
        log(run, model, loss, mask, 4)
        run.finalize()
        described = {**run.store.projection, "sha256": pilot.projection["sha256"]}  # of scales too
        assert described == pilot.projection
        for module, found in stored_projections(run.store).items():
            want = stored_projections(pilot)[module]
            for key in ("proj_in", "proj_out", "coordinates"):
                assert torch.equal(getattr(found, key), getattr(want, key))
            assert found.scale is not None
            assert want.scale is not None
            assert torch.allclose(found.scale, want.scale, rtol=1e-6, atol=0)
        if dtype == "float32":
            assert torch.allclose(rows_of(run.store), rows_of(pilot), rtol=1e-5, atol=1e-7)


def test_coordinates_out_of_range_leave_the_statistics(tmp_path: Path) -> None:
    model, loss, mask = gpt()
    run = Run("toy", Config(root_dir=str(tmp_path)))
    watch(run, model, "gpt", None, True)
    run.setup({"statistic": "kfac"})
    log(run, model, loss, mask, 4)
    bad: list[Any] = [3, 1 << 30, 10.0]
    for coordinates in bad:
        with pytest.raises(ValueError, match=r"coordinates: expected 4 \(one a module\) to"):
            run.add_lora(init="eigen", coordinates=coordinates)
    run.add_lora(init="eigen", coordinates=90)
    assert run.layout.dim == 90
    assert (run.config.init, run.config.coordinates) == ("eigen", 90)


def test_a_pilot_that_is_left_changes_nothing(tmp_path: Path) -> None:
    model, loss, mask = gpt()
    run = Run("toy", Config(root_dir=str(tmp_path)))
    watch(run, model, "gpt", 3, True)
    layout = run.layout

    def stopped() -> None:
        with run.pilot("eigen", coordinates=90):
            log(run, model, loss, mask, 4)
            raise OSError("the data ended")

    with pytest.raises(OSError, match="the data ended"):
        stopped()
    assert run.layout == layout
    with (
        pytest.raises(RuntimeError, match="no example was passed inside"),
        run.pilot("eigen", coordinates=90),
    ):
        pass
    assert run.layout == layout
    assert not (tmp_path / "toy").exists()


def test_what_a_pilot_refuses(tmp_path: Path) -> None:
    model, loss, mask = gpt()
    run = Run("toy", Config(root_dir=str(tmp_path)))
    watch(run, model, "gpt", None, True)
    for options, message in (
        ({"init": "random", "rank": 3}, "init: expected one of pca, eigen, got 'random'"),
        ({"init": "eigen"}, "coordinates: init='eigen' takes it, and no rank"),
        ({"init": "pca", "coordinates": 9}, "rank: init='pca' takes it, and no coordinates"),
        ({"init": "eigen", "coordinates": 3}, "expected a whole number of at least 4, one a"),
        (
            {"init": "pca", "rank": 3, "moments": "token"},
            "moments: expected one of expand, reduce, sequence, got 'token'",
        ),
        ({"init": "eigen", "coordinates": 10.0}, "expected a whole number of at least 4, one a"),
    ):
        with pytest.raises(ValueError, match=message), run.pilot(**options):
            pass
    with pytest.raises(ValueError, match=r"init: 'eigen' is made from a pilot"):
        run.add_lora(coordinates=90, init="eigen")
    with pytest.raises(ValueError, match=r"rank: init='eigen' takes coordinates, and no rank, got"):
        run.add_lora(rank=3, init="eigen", coordinates=90)
    for init, coordinates in (("eigen", None), ("pca", 90), ("random", 90)):
        with pytest.raises(ValueError, match="coordinates: expected a number with init 'eigen', a"):
            run.add_lora(init=init, coordinates=coordinates)
    with run.pilot("eigen", coordinates=90):
        log(run, model, loss, mask, 4)
    run.setup({"save": "grad", "statistic": "kfac"})
    with pytest.raises(ValueError, match="'diagonal' and 'shrunk' are their curvatures"):
        log(run, model, loss, mask, 4)


def test_examples_that_are_not_finite_are_left_out_of_a_pilot(tmp_path: Path) -> None:
    model, loss, mask = SAMPLES["mlp"]()
    config = Config(root_dir=str(tmp_path), on_nonfinite="skip")
    run = Run("toy", config)
    run.watch(model, bias=True)

    def pilot() -> None:
        with run.pilot("eigen", coordinates=80):
            log(run, model, loss, mask, 4)
            with run(["bad"]):
                (loss(model, [0]) * float("nan")).backward()

    with pytest.warns(UserWarning, match="NaN or infinite in module"):
        pilot()
    assert run.skipped_ids == ["bad"]
    assert run.layout.dim == 80
