"""Stores whose rows have exponents of their own score as dense float64 does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_influence import MODULES, SIZES, Dense, dense, gradients, make_store, unpacked
from test_pipeline import LateLanes
from torch import Tensor

from logra_kernels.attribution import Attributor
from logra_kernels.attribution import attributor as attributor_module
from logra_kernels.curvature import RawCurvature
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.store import Store

EXPONENTS = [-14, 0, 0]
READINGS = ("mapped", "streamed", "resident")
GROUPS = {"up": [0, 2], "down": [1], "layer.0.up": [0]}
SUBSTRINGS = {"up": ["up"], "down": ["down"], "layer.0.up": ["layer.0.up"]}


def typical(count: int, seed: int) -> Tensor:
    """Rows whose first module is 2**-60 times the others' size."""
    rows = gradients(count, seed)
    rows[:, :12] *= 2.0**-60
    return rows


def odd_store(path: Path, shard_rows: int = 25) -> Store:
    """90 rows; in some, a module is 2**-45 times what it is in the others; rows 60 to 74 are plain.

    So of shards of 15 rows one needs no exponents.
    """
    rows = typical(90, 0)
    rows[1::4, 12:37] *= 2.0**-45
    rows[2::4, 37:] *= 2.0**-50
    rows[60:75, :12] = 0
    rows[60:75, 12:] = gradients(15, 5)[:, 12:]
    store = make_store(path, rows, shard_rows=shard_rows, exponents=EXPONENTS)
    assert store.manifest["version"] == 2
    return store


QUERIES = typical(3, 7)


def allowed(truth: Dense, mode: str) -> Tensor:
    """1e-5 of Σ |u||g| over the modules, each counted in full, [Q, N]."""
    parts = [truth.group([i]) for i in range(len(SIZES))]
    size = torch.stack([part.allowance("dot") for part in parts]).sum(dim=0)
    if mode == "l2":
        return 1e-5 * (size + truth.sigma / 2)
    allowance: Tensor = truth.allowance(mode) / truth.allowance("dot") * size
    return 1e-5 * allowance


@pytest.mark.parametrize("mode", SCAN_MODES)
def test_scores_top_k_and_groups_equal_the_formula(tmp_path: Path, mode: str) -> None:
    store = odd_store(tmp_path / "s")
    truth = dense(QUERIES, unpacked(store))
    attributor = Attributor(store, RawCurvature.rebuild(store), block_rows=16)
    result = attributor.scores(QUERIES, mode, groups=SUBSTRINGS)
    best = attributor.top_k(QUERIES, 5, mode, groups=SUBSTRINGS)
    for name, members in {"total": [0, 1, 2], **GROUPS}.items():
        part = truth.group(members)
        got = result if name == "total" else result.groups[name]
        top = best if name == "total" else best.groups[name]
        there = (part.rows != 0).any(dim=1)  # a row that is zero scores 0
        error = (got.scores - part.scores(mode))[:, there].abs()
        assert (error <= allowed(part, mode)[:, there]).all()
        assert (got.scores[:, ~there] == 0).all()
        order = got.scores.sort(dim=1, descending=True, stable=True)
        assert torch.equal(top.top_scores, order.values[:, :5])
        assert torch.equal(top.top_rows, order.indices[:, :5])
        assert (part.scores(mode)[:, there] != 0).all()


def test_self_influence_equals_the_formula(tmp_path: Path) -> None:
    store = odd_store(tmp_path / "s")
    truth = dense(QUERIES, unpacked(store))
    attributor = Attributor(store, RawCurvature.rebuild(store))
    for _ in range(2):  # computed, then found
        found = attributor.self_influence(groups=SUBSTRINGS)
        for name, members in {"total": [0, 1, 2], **GROUPS}.items():
            want = truth.group(members).sigma
            assert ((found[name] - want).abs() <= 1e-5 * want).all()


def results(attributor: Attributor, mode: str) -> list[Tensor]:
    top = attributor.top_k(QUERIES, 7, mode, groups=SUBSTRINGS)
    full = attributor.scores(QUERIES, mode, groups=SUBSTRINGS)
    out = [full.scores, top.top_scores, top.top_rows, top.bottom_scores, top.bottom_rows]
    out += [full.groups[name].scores for name in GROUPS]
    out += [top.groups[name].top_rows for name in GROUPS]
    return [*out, attributor.self_influence()]


@pytest.mark.parametrize("mode", ["l2", "l-relatif"])
def test_every_reading_and_block_gives_the_same_bits(
    tmp_path: Path, mode: str, native: None
) -> None:
    want = None
    for number, (shard_rows, block_rows) in enumerate([(90, None), (90, 7), (15, 16), (6, 6)]):
        store = odd_store(tmp_path / str(number), shard_rows)
        curvature = RawCurvature.rebuild(store)
        for reading in READINGS:
            shutil.rmtree(store.path / "self_influence", ignore_errors=True)
            attributor = Attributor(store, curvature, reading=reading, block_rows=block_rows)
            for _ in range(2):  # norms are found then, and resident rows not read again
                got = results(attributor, mode)
                want = want or got
                for one, other in zip(want, got, strict=True):
                    assert torch.equal(one, other)


@pytest.mark.parametrize("reading", READINGS)
def test_a_device_with_lanes_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: str, native: None
) -> None:
    store = odd_store(tmp_path / "s")
    curvature = RawCurvature.rebuild(store)
    want = results(Attributor(store, curvature), "l-relatif")
    uploaded = []

    class Lanes(LateLanes):
        def upload(self, values: np.ndarray) -> Tensor:
            uploaded.append(values.dtype)
            return super().upload(values)

    monkeypatch.setattr(attributor_module, "lanes_of", lambda device: Lanes("copies late"))
    attributor = Attributor(store, curvature, reading=reading, block_rows=16)
    for _ in range(2):
        for one, other in zip(want, results(attributor, "l-relatif"), strict=True):
            assert torch.equal(one, other)
    assert np.int16 in uploaded


def test_streamed_exponents_are_not_kept(tmp_path: Path) -> None:
    odd_store(tmp_path / "s")
    kept = {}
    for reading in ("mapped", "streamed"):
        store = Store.open(tmp_path / "s")
        Attributor(store, "none", reading=reading).scores(QUERIES, "dot")
        kept[reading] = {"row_exponents" in shard.__dict__ for shard in store.shards}
    assert kept == {"mapped": {True}, "streamed": {False}}


def test_the_curvature_is_that_of_the_rows_as_stored(tmp_path: Path) -> None:
    store = odd_store(tmp_path / "s")
    curvature = RawCurvature(MODULES)
    curvature.update(unpacked(store).float())
    assert RawCurvature.rebuild(store).checksum == curvature.checksum
    assert float(curvature.covariance("layer.0.up").diagonal().min()) > 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("power", "scored"), [(-100, True), (-140, True), (-190, False)])
def test_how_small_a_module_may_be_to_be_scored(tmp_path: Path, power: int, scored: bool) -> None:
    """It is stored at any size.

    A scan in float32 has its elements down to 2**-140 of the row's, and adds it to others that are
    2**100 times larger.
    """
    rows = gradients(20) * 2.0**60
    rows[:, :12] = torch.ldexp(gradients(20)[:, :12].double(), torch.tensor(power + 60)).float()
    store = make_store(tmp_path / "s", rows, exponents=[0, 0, 0])
    part = unpacked(store)[:, :12]
    largest = rows[:, :12].double().abs().amax(dim=1, keepdim=True)
    assert ((part - rows[:, :12].double()).abs() <= 2.0**-11 * largest).all()
    truth = dense(rows[:3], unpacked(store))
    attributor = Attributor(store, RawCurvature.rebuild(store))
    result = attributor.scores(rows[:3], "l-relatif", groups=SUBSTRINGS)
    for name, members in GROUPS.items():
        formula, got = truth.group(members), result.groups[name]
        if power == -100 or 0 not in members or (scored and members == [0]):
            error = (got.scores - formula.scores("l-relatif")).abs()
            assert (error <= allowed(formula, "l-relatif")).all()
        elif not scored and members == [0]:
            assert not got.scores.any()
            assert got.zero_rows == 20
