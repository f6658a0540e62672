"""Covariance, damping and the inverse, against dense float64."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_influence import DIM, MODULES, SIZES, gradients, make_store, unpacked
from refusals import refused
from torch import Tensor

from logra_kernels.curvature import (
    DiagonalCurvature,
    IdentityPreconditioner,
    RawCurvature,
    raw,
)
from logra_kernels.curvature import preconditioner as preconditioner_module
from logra_kernels.store import Module

# float32 rows have exact float64 products; what is left is the order of float64 additions
EXACT = 1e-13
FLOAT32 = 2.0**-20  # 256 additions at 2**-24 each, of which a few are the largest


def curvature_of(
    rows: Tensor, modules: Sequence[Module] = MODULES, dtype: torch.dtype | None = None
) -> RawCurvature:
    curvature = RawCurvature(modules, dtype)
    curvature.update(rows)
    return curvature


def moments(rows: Tensor, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    return [part.T @ part for part in rows.double().split(list(sizes), dim=1)]


def assert_moments(curvature: RawCurvature, rows: Tensor, tolerance: float) -> None:
    """The sums of the rows' outer products, but for a part of their trace."""
    for module, want in zip(MODULES, moments(rows), strict=True):
        error = (curvature.covariance(module.name) - want).abs().max()
        assert error <= tolerance * want.trace()


def damped_matrix(rows: Tensor, i: int, damping_scale: float = 0.1) -> Tensor:
    moment = moments(rows)[i] / len(rows)
    size = moment.shape[0]
    return moment + damping_scale * moment.trace() / size * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, FLOAT32)])
def test_covariance_is_the_sum_of_outer_products(dtype: torch.dtype, tolerance: float) -> None:
    rows = gradients(600)
    curvature = curvature_of(rows, dtype=dtype)
    assert curvature.count == 600
    assert_moments(curvature, rows, tolerance)
    for got in curvature.covariances.values():
        assert got.dtype == torch.float64
        assert torch.equal(got, got.T)
    assert set(curvature.covariances) == {module.name for module in MODULES}


def test_accumulator_is_float64_up_to_1024_columns_and_float32_above() -> None:
    curvature = RawCurvature([Module("small", 32, 32), Module("large", 25, 41)])
    curvature.update(torch.ones(1, 1024 + 1025))
    sums = [curvature._moments[i].snapshot()[0] for i in range(2)]
    assert [total.dtype for total in sums if total is not None] == [torch.float64, torch.float32]


@pytest.mark.parametrize("split", [1, 7, 255, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bits_do_not_depend_on_how_rows_are_split_into_calls(
    split: int, dtype: torch.dtype
) -> None:
    rows = gradients(600)
    curvature = RawCurvature(MODULES, dtype)
    for part in rows.split(split):
        curvature.update(part)
    assert curvature.checksum == curvature_of(rows, dtype=dtype).checksum


def test_reading_half_way_changes_nothing() -> None:
    rows = gradients(600)
    curvature = RawCurvature(MODULES)
    seen = []
    for part in rows.split(100):
        curvature.update(part)
        seen.append(curvature.checksum)
        curvature.damped()
        curvature.covariance("layer.0.up")
    assert curvature.checksum == curvature_of(rows).checksum
    assert len(set(seen)) == len(seen)


def test_buffer_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "FOLD_BYTES", 4 * DIM * 10)
    curvature = RawCurvature(MODULES)
    assert curvature.fold_rows == 10
    curvature.update(gradients(25))
    assert_moments(curvature, gradients(25), EXACT)


def test_covariance_is_additive_over_shards() -> None:
    rows = gradients(500)
    merged = curvature_of(rows[:130]).merge(curvature_of(rows[130:]))
    assert merged.count == 500
    assert_moments(merged, rows, EXACT)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merge_of_very_different_sizes(order: int, dtype: torch.dtype) -> None:
    # more rows than are folded into sums at a time
    parts = [gradients(300) * 1e-18, gradients(300, seed=1) * 1e18][::order]
    merged = curvature_of(parts[0], dtype=dtype).merge(curvature_of(parts[1], dtype=dtype))
    assert_moments(merged, torch.cat(parts), FLOAT32)


def test_merge_refuses_other_modules() -> None:
    with pytest.raises(ValueError, match=r"other: expected the modules .*layer\.0\.up.* got .*'x'"):
        RawCurvature(MODULES).merge(RawCurvature([Module("x", 2, 2)]))


@pytest.mark.parametrize("size", [1e-20, 1e20, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_squares_beyond_float32_survive(size: float, dtype: torch.dtype) -> None:
    """1e20 squared is over float32's range, 1e-20 squared under it."""
    rows = gradients(50) * size
    assert_moments(curvature_of(rows, dtype=dtype), rows, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_huge_row_among_small_ones(dtype: torch.dtype) -> None:
    rows = gradients(600)
    rows[300] *= 1e18
    assert_moments(curvature_of(rows, dtype=dtype), rows, FLOAT32)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("shard_rows", [1, 64, 1000])
def test_rebuild_equals_the_incremental_sum_bit_for_bit(
    tmp_path: Path, dtype: str, shard_rows: int
) -> None:
    count = 20 if shard_rows == 1 else 600
    store = make_store(tmp_path / "s", gradients(count), dtype, shard_rows)
    kept = RawCurvature(MODULES)
    for part in unpacked(store).float().split(37):
        kept.update(part)
    seen = []
    rebuilt = RawCurvature.rebuild(store, progress=lambda done, total: seen.append((done, total)))
    assert rebuilt.checksum == kept.checksum
    assert seen[-1] == (count, count)


def test_save_and_load(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", gradients(300))
    curvature = RawCurvature.rebuild(store)
    curvature.save(store)
    loaded = RawCurvature.load(store)
    assert loaded.checksum == curvature.checksum
    assert loaded.count == 300
    assert torch.equal(
        loaded.damped().precondition(gradients(2)), curvature.damped().precondition(gradients(2))
    )
    more = gradients(10, seed=5)
    loaded.update(more)
    curvature.update(more)
    want = curvature.covariance("layer.0.up")
    assert (loaded.covariance("layer.0.up") - want).abs().max() <= EXACT * want.trace()


def test_load_says_how_to_make_one(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", gradients(3))
    with pytest.raises(ValueError, match=r"holds no curvature.*RawCurvature\.rebuild\(store\)"):
        RawCurvature.load(store)


def test_load_refuses_sums_that_do_not_match_their_checksum(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", gradients(30))
    curvature = RawCurvature.rebuild(store)
    curvature.save(store)
    tensors, meta = store.load_curvature("raw")
    store.save_curvature("raw", tensors, {**meta, "count": 31})
    refused("does not match its checksum; rebuild it", RawCurvature.load, store)
    tensors["layer.0.up"] = np.zeros((2, 2))
    store.save_curvature("raw", tensors, meta)
    refused("'layer.0.up': expected [12, 12], got [2, 2]", RawCurvature.load, store)


def test_save_refuses_another_layout(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", gradients(3))
    with pytest.raises(ValueError, match=r"store: expected the modules \[\('x', 4\)\], got"):
        curvature_of(torch.ones(2, 4), [Module("x", 2, 2)]).save(store)


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
@pytest.mark.parametrize("damping_scale", [1e-3, 0.1, 10.0])
def test_precondition_is_the_damped_inverse(solver: str, damping_scale: float) -> None:
    rows, queries = gradients(200), gradients(5, seed=1).double()
    got = (
        curvature_of(rows).damped(damping_scale=damping_scale, solver=solver).precondition(queries)
    )
    for i, (part, query) in enumerate(
        zip(got.split(SIZES, dim=1), queries.split(SIZES, dim=1), strict=True)
    ):
        matrix = damped_matrix(rows, i, damping_scale)
        want = torch.linalg.solve(matrix, query.T).T
        # a float64 solve loses the condition number, here below 1e6, times 2**-53
        assert (part - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
def test_factors_square_to_the_inverse(solver: str) -> None:
    rows = gradients(200)
    factors = curvature_of(rows).damped(solver=solver).factors
    for i, module in enumerate(MODULES):
        factor = factors[module.name]
        assert factor.dtype == torch.float32
        want = torch.linalg.inv(damped_matrix(rows, i))
        got = factor.double().T @ factor.double()
        # each element of W is rounded to 2**-24, and a product holds two
        assert (got - want).abs().max() <= 2**-22 * want.trace()


def test_lambda_is_relative_to_the_mean_eigenvalue_per_module() -> None:
    rows = gradients(200)
    preconditioner = curvature_of(rows).damped(damping_scale=0.5)
    for module, moment in zip(MODULES, moments(rows), strict=True):
        want = 0.5 * float(torch.linalg.eigvalsh(moment / 200).mean())
        assert preconditioner.dampings[module.name] == pytest.approx(want, rel=1e-12)
    absolute = curvature_of(rows).damped(damping=3.0)
    assert absolute.dampings == {module.name: 3.0 for module in MODULES}


@pytest.mark.parametrize("count", [5, 400])
def test_auto_adds_columns_per_row_to_the_scale(count: int) -> None:
    curvature = curvature_of(gradients(count))
    auto = curvature.damped(damping_scale="auto")
    for i, module in enumerate(MODULES):
        scale = 0.1 + module.size / count
        want = curvature.damped(damping_scale=scale)
        assert auto.dampings[module.name] == want.dampings[module.name]
        assert auto.mean_eigenvalues[i] == want.mean_eigenvalues[i]
    (swept,) = curvature.sweep(damping_scales=["auto"])
    assert swept.dampings == auto.dampings


def test_auto_is_refused_where_no_whole_matrix_is_estimated() -> None:
    curvature = DiagonalCurvature(MODULES)
    curvature.update(gradients(5))
    with pytest.raises(ValueError, match="damping_scale: 'auto' is for a curvature that"):
        curvature.damped(damping_scale="auto")


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
@pytest.mark.parametrize("damping", [{"damping_scale": 0.1}, {"damping": 3.0}, {}])
def test_effective_dimensions_are_the_trace(solver: str, damping: dict[str, float]) -> None:
    """d_λ = tr H(H+λI)⁻¹, against float64; relative to K 1e-12: the trace of a float64 inverse."""
    rows = gradients(40)
    found = curvature_of(rows).damped(solver=solver, **damping)
    got = found.effective_dimensions()
    for i, module in enumerate(MODULES):
        part = rows.double().split(list(SIZES), dim=1)[i]
        values = torch.linalg.eigvalsh(part.T @ part / len(part)).clamp(min=0)
        want = float((values / (values + found.dampings[module.name])).sum())
        assert got[module.name] == pytest.approx(want, abs=1e-12 * module.size)
        assert 0 < got[module.name] < min(module.size, len(rows))


def test_effective_dimension_without_damping_is_the_rank() -> None:
    rows = gradients(4)
    rows[:, : MODULES[0].size] = 0
    curvature = curvature_of(rows)
    with pytest.warns(UserWarning, match="no gradient ever reached"):
        got = curvature.damped(damping=0.0, solver="eigh").effective_dimensions()
    want = [0, *(min(4, module.size) for module in MODULES[1:])]
    assert list(got.values()) == want
    with pytest.warns(UserWarning, match="no gradient ever reached"):
        assert curvature.damped().effective_dimensions()[MODULES[0].name] == 0
    silent = curvature.damped(damping=2.0).effective_dimensions()[MODULES[0].name]
    assert silent == pytest.approx(0, abs=1e-12)
    refused("d_λ: expected a curvature", IdentityPreconditioner(MODULES).effective_dimensions)


def test_default_damping_is_a_tenth_of_the_mean_eigenvalue() -> None:
    curvature = curvature_of(gradients(50))
    assert curvature.damped().key == curvature.damped(damping_scale=0.1).key


@pytest.mark.parametrize(
    "meta",
    [
        None,
        [],
        {},
        {"exponents": 3, "count": 9, "checksum": ""},
        {"exponents": {}, "count": 9, "checksum": ""},
        {"exponents": {m.name: [] for m in MODULES}, "count": 9, "checksum": ""},
        {"exponents": {m.name: 0 for m in MODULES}, "count": 1e400, "checksum": ""},
        {"exponents": {m.name: 0 for m in MODULES}, "count": 9},
    ],
)
def test_a_manifest_that_lies_about_the_curvature(tmp_path: Path, meta: Any) -> None:
    store = make_store(tmp_path, gradients(9))
    RawCurvature.rebuild(store).save(store)
    store.manifest["curvature"]["raw"]["meta"] = meta
    refused("lacks its exponents, count or checksum; rebuild it", RawCurvature.load, store)


def test_key_depends_on_the_rows_and_on_the_count() -> None:
    rows = gradients(50)
    keys = {
        curvature_of(rows).damped(damping=1.0).key,
        curvature_of(torch.cat([rows, torch.zeros(1, DIM)])).damped(damping=1.0).key,
        curvature_of(rows.flip(1)).damped(damping=1.0).key,
        curvature_of(rows).damped(damping=1.0, solver="eigh").key,
        IdentityPreconditioner(MODULES).key,
    }
    assert len(keys) == 5


def test_keys_are_those_of_version_0_1() -> None:
    """The folders in which version 0.1 kept norms beside a store go on being used for them."""
    modules = [Module("a", 2, 2), Module("b", 1, 3)]
    rows = (torch.arange(35.0).reshape(5, 7) - 17) / 4  # their products are exact
    curvature = curvature_of(rows, modules)
    assert curvature.checksum == "eefce9c40a8611fcb42e20f67b285d87"
    assert curvature.damped().key == "8794078da020e93e420562c6fa620d97"
    assert curvature.damped(damping_scale=0.5).key == "63c07e7effc8b18e94bb8f51e35b5481"
    assert curvature.damped(damping=2).key == "07fef45a1c42035ffd3742e99a47d7bc"
    eigen = curvature.damped(damping=0.25, solver="eigh")
    assert eigen.key == "316d4512709266e663c916957ec6b5ab"
    single = curvature_of(rows, modules, torch.float32).damped(damping=2.0)
    assert single.key == "3a5a597c3a2201b06005a912f5c1fc53"
    assert IdentityPreconditioner(modules).key == "b465ab6dec9a018f70fea6eac250b19a"


def test_singular_without_damping_names_module_and_rank() -> None:
    curvature = curvature_of(gradients(9))
    message = r"module 'layer\.0\.up': H \+ 0 I has rank 9 of 12 .*solver='eigh'"
    with pytest.raises(ValueError, match=message):
        curvature.damped(damping=0.0)


def test_eigh_takes_the_pseudo_inverse() -> None:
    rows, queries = gradients(9), gradients(3, seed=1).double()
    got = curvature_of(rows).damped(damping=0.0, solver="eigh").precondition(queries)
    for moment, part, query in zip(
        moments(rows), got.split(SIZES, dim=1), queries.split(SIZES, dim=1), strict=True
    ):
        want = query @ torch.linalg.pinv(moment / 9, rtol=1e-12, hermitian=True)
        # eigenvalues down to 1e-6 of the largest are kept, and lose that much of 2**-53
        assert (part - want).abs().max() <= 1e-8 * want.abs().max()


def test_sweep_takes_one_eigendecomposition_per_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    eigh = torch.linalg.eigh

    def spy(matrix: Tensor) -> Any:
        calls.append(matrix.shape)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", spy)
    curvature, queries = curvature_of(gradients(100)), gradients(2, seed=1).double()
    scales = [1e-3, 0.1, 1.0]
    for scale, preconditioner in zip(scales, curvature.sweep(damping_scales=scales), strict=True):
        want = curvature.damped(damping_scale=scale).precondition(queries)
        assert torch.allclose(preconditioner.precondition(queries), want, rtol=1e-9)
    assert len(calls) == len(MODULES)
    curvature.update(gradients(1, seed=8))
    assert next(curvature.sweep(dampings=[0.5])).dampings["layer.0.up"] == 0.5
    assert len(calls) == 2 * len(MODULES)
    refused("sweep: expected damping_scales or dampings, one of", next, curvature.sweep())


def test_a_module_without_gradients_scores_zero_and_says_so() -> None:
    rows = gradients(50)
    rows[:, : SIZES[0]] = 0
    for solver in ("cholesky", "eigh"):
        with pytest.warns(UserWarning, match=r"no gradient ever reached layer\.0\.up: "):
            preconditioner = curvature_of(rows).damped(solver=solver)
        got = preconditioner.precondition(gradients(2, seed=1))
        assert not got[:, : SIZES[0]].any()
        assert got[:, SIZES[0] :].isfinite().all()
        assert not preconditioner.factors["layer.0.up"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        absolute = curvature_of(rows).damped(damping=2.0)
    query = gradients(1, seed=1)
    assert torch.allclose(absolute.precondition(query)[:, : SIZES[0]], query[:, : SIZES[0]] / 2)


def test_bits_are_equal_on_one_and_two_threads(set_threads: None) -> None:
    modules = [Module("a", 15, 15), Module("b", 10, 13)]
    rows = gradients(700, modules=modules)
    # in float64: rounded to float32 the results are equal more often than not, whatever is done
    queries = gradients(40, seed=1, modules=modules).double()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        preconditioner = curvature_of(rows, modules).damped()
        results.append((preconditioner.precondition(queries), preconditioner.factors))
        assert torch.get_num_threads() == threads
    assert torch.equal(results[0][0], results[1][0])
    for name in ("a", "b"):
        assert torch.equal(results[0][1][name], results[1][1][name])


def test_factors_that_are_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    curvature, queries = curvature_of(gradients(100)), gradients(2, seed=1)
    kept = curvature.damped()
    monkeypatch.setattr(preconditioner_module, "KEPT_FACTOR_BYTES", 0)
    again = curvature.damped()
    assert torch.equal(kept.precondition(queries), again.precondition(queries))
    curvature.update(gradients(1, seed=3))
    refused("rows came in since", again.precondition, queries, error=RuntimeError)


def test_none_is_the_identity() -> None:
    identity, queries = IdentityPreconditioner(MODULES), gradients(3)
    assert torch.equal(identity.precondition(queries), queries)
    assert torch.equal(identity.factors["layer.1.up"], torch.eye(7))
    assert identity.dampings == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"damping": -1.0}, "damping: expected a finite number >= 0, got -1.0"),
        ({"damping": float("nan")}, "damping: expected a finite number >= 0, got nan"),
        (
            {"damping_scale": float("inf")},
            "damping_scale: expected a finite number >= 0 or 'auto', got inf",
        ),
        ({"damping_scale": "Auto"}, "expected a finite number >= 0 or 'auto', got 'Auto'"),
        ({"damping": "auto"}, "damping: expected a finite number >= 0, got 'auto'"),
        (
            {"damping": 1.0, "damping_scale": "auto"},
            "expected one of the two, got damping_scale=auto and damping=1.0",
        ),
        (
            {"damping": 1.0, "damping_scale": 0.1},
            "expected one of the two, got damping_scale=0.1 and damping=1.0",
        ),
        ({"solver": "lu"}, "solver: expected one of cholesky, eigh, got 'lu'"),
    ],
)
def test_bad_damping(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curvature_of(gradients(5)).damped(**kwargs)


def test_bad_rows() -> None:
    curvature = RawCurvature(MODULES)
    with pytest.raises(TypeError, match="rows: expected float32, got float16"):
        curvature.update(torch.ones(2, DIM, dtype=torch.float16))
    refused(f"rows: expected [R, {DIM}], got [2, 3]", curvature.update, torch.ones(2, 3))
    rows = torch.ones(2, DIM)
    rows[1, SIZES[0]] = float("nan")
    refused("rows: row 1 is not finite in module 'layer.0.down'", curvature.update, rows)
    assert curvature.count == 0
    refused("curvature: expected at least one row, got none", curvature.damped)
    refused("modules: expected at least one, got none", RawCurvature, [])
    refused("dtype: expected float32, float64 or None, got", RawCurvature, MODULES, torch.float16)
    refused("no module 'x'", curvature.covariance, "x", error=KeyError)
    with pytest.raises(TypeError, match="rows: expected float32 or float64, got int64"):
        IdentityPreconditioner(MODULES).precondition(torch.ones(1, DIM, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"rows: expected \[Q, {DIM}\], got \[2, 3\]"):
        IdentityPreconditioner(MODULES).precondition(torch.ones(2, 3))
