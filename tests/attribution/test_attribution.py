"""Scores, top k, self-influence and their cache, through the store."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_influence import (
    DIM,
    MODULES,
    SIZES,
    assert_influence,
    assert_same,
    dense,
    gradients,
    make_store,
    unpacked,
)
from refusals import refused
from torch import Tensor

from logra_kernels import ops
from logra_kernels.attribution import Attributor, InfluenceResult, influence_between, plan
from logra_kernels.curvature import IdentityPreconditioner, RawCurvature
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.rows import share
from logra_kernels.store import Store, codec_names, row_codec

QUERIES = gradients(4, seed=7)
NORMALISED = ("l-relatif", "theta-relatif", "whitened-cosine")


def open_attributor(store: Store, **kwargs: Any) -> Attributor:
    return Attributor(store, RawCurvature.rebuild(store), **kwargs)


@pytest.fixture
def attributor(store: Store) -> Attributor:
    return open_attributor(store)


@pytest.fixture
def sigma_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that went through ops.self_influence, one entry a call."""
    calls = []
    op = ops.self_influence

    def spy(rows: Tensor, factor: Tensor) -> Tensor:
        calls.append(len(rows))
        return op(rows, factor)

    monkeypatch.setattr(ops, "self_influence", spy)
    return calls


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    plan._warn_of_cosine.cache_clear()


@pytest.mark.parametrize("mode", SCAN_MODES)
def test_top_k_is_a_stable_sort_of_the_scores(store: Store, mode: str) -> None:
    attributor = open_attributor(store, block_rows=16)
    scores = attributor.scores(QUERIES, mode).scores
    for k in (1, 10, 150):
        top = attributor.top_k(QUERIES, k, mode)
        best = scores.sort(dim=1, descending=True, stable=True)
        worst = scores.sort(dim=1, stable=True)
        assert torch.equal(top.top_rows, best.indices[:, :k])
        assert torch.equal(top.top_scores, best.values[:, :k])
        assert torch.equal(top.bottom_rows, worst.indices[:, :k])
        assert torch.equal(top.bottom_scores, worst.values[:, :k])


def test_ties_go_to_the_lower_row(tmp_path: Path) -> None:
    rows = gradients(3)[[0, 1, 0, 1, 2, 0]]
    attributor = open_attributor(make_store(tmp_path / "s", rows, shard_rows=2))
    top = attributor.top_k(QUERIES, 6, "dot")
    scores = attributor.scores(QUERIES, "dot").scores
    for query in range(len(QUERIES)):
        for order in (top.top_rows[query].tolist(), top.bottom_rows[query].tolist()):
            for same in ([0, 2, 5], [1, 3]):
                places = [order.index(row) for row in same]
                assert places == sorted(places)
    assert torch.equal(scores[:, 0], scores[:, 2])


def test_l_relatif_does_not_change_when_a_training_row_is_scaled(tmp_path: Path) -> None:
    rows = gradients(60)
    curvature = RawCurvature(MODULES)
    curvature.update(rows)
    scaled = rows * (2.0 ** torch.arange(-30, 30))[:, None]
    for dtype in ("float16", "float32"):
        plain = make_store(tmp_path / f"{dtype}-plain", rows, dtype, shard_rows=25)
        other = make_store(tmp_path / f"{dtype}-scaled", scaled, dtype, shard_rows=25)
        for mode in NORMALISED:
            want = Attributor(plain, curvature).scores(QUERIES, mode).scores
            got = Attributor(other, curvature).scores(QUERIES, mode).scores
            # powers of two: only the float16 rounding of subnormals, 2**-11 of |g| each, differs
            tolerance = 2.0**-10 if dtype == "float16" else 2.0**-20
            assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize("mode", [*NORMALISED, "l2"])
def test_tiny_and_huge_gradients(tmp_path: Path, dtype: str, size: float, mode: str) -> None:
    """A store whose gradients are all tiny or huge gives the normalised scores of usual ones."""
    store = make_store(tmp_path / "s", gradients(60) * size, dtype, shard_rows=25)
    truth = dense(QUERIES * size, unpacked(store))
    result = open_attributor(store).scores(QUERIES * size, mode)
    assert_influence(result.scores, truth, mode, dtype=dtype)
    assert result.zero_rows == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("mode", SCAN_MODES)
def test_queries_of_all_sizes_over_tiny_rows(tmp_path: Path, dtype: str, mode: str) -> None:
    """(H + λI)⁻¹g of rows near 1e-20 is some 1e40 times the query, which float32 cannot hold."""
    store = make_store(tmp_path / "s", gradients(60) * 1e-20, dtype, shard_rows=25)
    queries = gradients(5, seed=7) * torch.tensor([1e-10, 1e-20, 1.0, 1e-20, 1e-3])[:, None]
    truth = dense(queries, unpacked(store))
    want = truth.scores(mode)
    attributor = open_attributor(store, block_rows=16)
    got = attributor.scores(queries, mode).scores
    # int8: as assert_influence allows, for a query of 44 columns
    rounding = 1.2e-4 if dtype == "int8" else 1e-5
    assert ((got - want).abs() <= rounding * truth.allowance(mode)).all()
    for q in range(len(queries)):
        assert_same(attributor.scores(queries[q : q + 1], mode).scores, got[q : q + 1])
    top = attributor.top_k(queries, 60, mode)
    best = got.sort(dim=1, descending=True, stable=True)
    assert torch.equal(top.top_rows, best.indices)
    assert torch.equal(top.top_scores, best.values)
    assert torch.equal(top.bottom_scores, got.sort(dim=1, stable=True).values)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_tiny_and_huge_gradients_in_one_store(tmp_path: Path, dtype: str) -> None:
    rows = gradients(60)
    rows[:20] *= 1e-20
    rows[20:25] *= 1e16
    store = make_store(tmp_path / "s", rows, dtype, shard_rows=25)
    held = unpacked(store)
    assert (held.abs().amax(dim=1) > 0).all()
    truth = dense(QUERIES, held)
    attributor = open_attributor(store)
    for mode in NORMALISED:
        assert_influence(attributor.scores(QUERIES, mode).scores, truth, mode, dtype=dtype)
    sigma = attributor.self_influence()
    # K float32 additions of squares of float32 sums of K; |W g| itself may cancel: 1e-4 for cond
    assert torch.allclose(sigma, truth.sigma, rtol=1e-4, atol=0)


def test_self_influence_is_computed_once(store: Store, sigma_calls: list[int]) -> None:
    open_attributor(store).scores(QUERIES, "l-relatif")
    blocks = 4  # 150 rows in shards of 40
    assert len(sigma_calls) == blocks * len(MODULES)
    again = open_attributor(Store.open(store.path))
    again.scores(QUERIES, "l-relatif")
    again.top_k(QUERIES, 3, "whitened-cosine")
    again.scores(QUERIES, "l2")
    again.self_influence()
    again.scores(QUERIES, "dot")
    assert len(sigma_calls) == blocks * len(MODULES)
    again.scores(QUERIES, "theta-relatif")  # another norm
    assert len(sigma_calls) == 2 * blocks * len(MODULES)


def test_another_damping_is_another_cache_entry_and_another_result(
    store: Store, sigma_calls: list[int]
) -> None:
    seen: list[Tensor] = []
    asked: list[dict[str, Any]] = [{"damping": 1e-3}, {"damping": 10.0}, {"damping_scale": 1.0}]
    for kwargs in asked:
        attributor = open_attributor(store, **kwargs)
        fresh = attributor.scores(QUERIES, "l-relatif").scores
        truth = dense(QUERIES, unpacked(store), **{"damping_scale": None, **kwargs})
        assert_influence(fresh, truth, "l-relatif")
        calls = len(sigma_calls)
        again = open_attributor(store, **kwargs).scores(QUERIES, "l-relatif").scores
        assert torch.equal(again, fresh)
        assert len(sigma_calls) == calls
        seen.append(fresh)
    assert len(sigma_calls) == 3 * 4 * len(MODULES)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-2)
    assert not torch.allclose(seen[0], seen[2], rtol=1e-2)


def test_an_interrupted_pass_keeps_its_shards(store: Store, sigma_calls: list[int]) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_attributor(store).top_k(QUERIES, 2, progress=interrupt)
    assert len(sigma_calls) == 3 * len(MODULES)
    got = open_attributor(store).scores(QUERIES, "l-relatif").scores
    # the third shard's pass was cut off after its only block, before it was committed
    assert len(sigma_calls) == (3 + 2) * len(MODULES)
    assert_influence(got, dense(QUERIES, unpacked(store)), "l-relatif")


def test_appended_shards_extend_the_cache(store: Store, sigma_calls: list[int]) -> None:
    curvature = RawCurvature.rebuild(store)
    Attributor(store, curvature).self_influence()
    calls = len(sigma_calls)
    more = gradients(30, seed=3)
    names = [f"more-{i}" for i in range(30)]
    grown = make_store(store.path, more, shard_rows=40, ids=names, resume=True)
    with pytest.warns(UserWarning, match="the curvature is of 150 rows, the store has 180"):
        attributor = Attributor(grown, curvature)
    sigma = attributor.self_influence()
    assert len(sigma_calls) == calls + len(MODULES)
    truth = dense(QUERIES, unpacked(grown), curvature_rows=unpacked(store))
    assert torch.allclose(sigma, truth.sigma, rtol=1e-4, atol=0)


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    store: Store, sigma_calls: list[int]
) -> None:
    (store.path / "self_influence").symlink_to("nowhere")
    attributor = open_attributor(store)
    with pytest.warns(UserWarning, match="self-influence is not kept beside the store: ") as seen:
        first = attributor.scores(QUERIES, "l-relatif").scores
    assert len(seen) == 1
    calls = len(sigma_calls)
    assert torch.equal(attributor.scores(QUERIES, "l-relatif").scores, first)
    assert len(sigma_calls) == calls


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_self_influence(tmp_path: Path, dtype: str) -> None:
    store = make_store(tmp_path / "s", gradients(90), dtype, shard_rows=40)
    attributor, truth = open_attributor(store), dense(QUERIES, unpacked(store))
    got = attributor.self_influence()
    assert got.dtype == torch.float64
    # a sum of K squares of K-term sums, K <= 25: 50 * 2**-24, times |W||g| / |W g|, below 4
    assert torch.allclose(got, truth.sigma, rtol=200 * 2**-24, atol=0)
    parts = attributor.self_influence({"up": "up", "down": ["down"]})
    assert set(parts) == {"total", "up", "down"}
    assert torch.equal(parts["total"], got)
    assert torch.allclose(parts["up"] + parts["down"], got, rtol=1e-12)
    assert torch.allclose(parts["down"], truth.group([1]).sigma, rtol=200 * 2**-24, atol=0)


@pytest.mark.parametrize("mode", SCAN_MODES)
def test_groups(store: Store, mode: str) -> None:
    attributor, truth = open_attributor(store), dense(QUERIES, unpacked(store))
    groups = {"up": ["up"], "down": "down", "first": ["layer.0"]}
    members = {"up": [0, 2], "down": [1], "first": [0, 1]}
    result = attributor.scores(QUERIES, mode, groups=groups)
    top = attributor.top_k(QUERIES, 150, mode, groups=groups)
    assert torch.equal(result.scores, attributor.scores(QUERIES, mode).scores)
    for name, modules in members.items():
        got = result.groups[name].scores
        assert_influence(got, truth.group(modules), mode)
        assert torch.equal(
            top.groups[name].top_scores, got.sort(dim=1, descending=True, stable=True).values
        )
    if mode == "dot":
        total = result.groups["up"].scores + result.groups["down"].scores
        assert ((total - result.scores).abs() <= 1e-5 * truth.allowance("dot")).all()
    assert set(result["influence"]) == {"total", "up", "down", "first"}
    assert torch.equal(result["influence"]["up"], result.groups["up"].scores)


def test_groups_may_be_a_list_of_substrings(store: Store) -> None:
    result = open_attributor(store).scores(QUERIES, "l-relatif", groups=["layer.0", "up"])
    assert list(result.groups) == ["layer.0", "up"]


@pytest.mark.parametrize("mode", NORMALISED)
@pytest.mark.parametrize("dtype", codec_names())
def test_rows_without_gradient_score_zero_and_are_counted(
    tmp_path: Path, mode: str, dtype: str
) -> None:
    rows = gradients(50)
    rows[[3, 44]] = 0
    rows[7, : SIZES[0]] = 0
    attributor = open_attributor(make_store(tmp_path / "s", rows, dtype, shard_rows=20))
    result = attributor.scores(QUERIES, mode, groups={"first": "layer.0.up"})
    assert result.zero_rows == 2
    assert not result.scores[:, [3, 44]].any()
    if row_codec(dtype).faithful:  # a module of few bits has the error of the others, rotated
        assert result.groups["first"].zero_rows == 3
        assert not result.groups["first"].scores[:, 7].any()
    assert result.scores.isfinite().all()
    assert attributor.scores(QUERIES, mode).zero_rows == 2  # from the cache
    assert attributor.scores(QUERIES, "dot").zero_rows is None


def test_a_query_without_gradient_scores_zero(store: Store) -> None:
    queries = torch.cat([QUERIES[:1], torch.zeros(1, DIM)])
    for mode in SCAN_MODES[:2] + SCAN_MODES[3:]:
        scores = open_attributor(store).scores(queries, mode).scores
        assert scores.isfinite().all()
        assert not scores[1].any()


def test_cosine_is_l_relatif_and_says_so_once(store: Store, attributor: Attributor) -> None:
    with pytest.warns(UserWarning, match="'cosine' is LogIX's name for l-RelatIF"):
        result = attributor.scores(QUERIES, "cosine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attributor.top_k(QUERIES, 2, "cosine")
    assert result.mode == "l-relatif"
    assert torch.equal(result.scores, attributor.scores(QUERIES, "l-relatif").scores)


def test_without_curvature_it_is_the_dot_product_of_gradients(store: Store) -> None:
    attributor, rows = Attributor(store, "none"), unpacked(store)
    want = QUERIES.double() @ rows.T
    size = QUERIES.double().norm(dim=1)[:, None] * rows.norm(dim=1)
    dot = attributor.scores(QUERIES, "dot")
    assert ((dot.scores - want).abs() <= 1e-5 * size).all()
    assert dot.dampings == {}
    cosine = attributor.scores(QUERIES, "whitened-cosine").scores
    assert (cosine - want / size).abs().max() <= 1e-5
    assert torch.allclose(attributor.self_influence(), rows.square().sum(1), rtol=1e-6)
    with pytest.raises(ValueError, match="damping: expected none with no curvature, got one"):
        Attributor(store, "none", damping=1.0)


def test_curvature_comes_from_the_store_by_default(store: Store) -> None:
    message = r"holds no curvature; .*RawCurvature\.rebuild\(store\)\.save\(store\)"
    with pytest.raises(ValueError, match=message):
        Attributor(store)
    curvature = RawCurvature.rebuild(store)
    curvature.save(store)
    want = Attributor(store, curvature).scores(QUERIES, "l-relatif").scores
    assert torch.equal(Attributor(str(store.path)).scores(QUERIES, "l-relatif").scores, want)
    assert torch.equal(
        Attributor(store, "raw", damping_scale=0.1).scores(QUERIES, "l-relatif").scores, want
    )
    ready = curvature.damped()
    assert torch.equal(Attributor(store, ready).scores(QUERIES, "l-relatif").scores, want)
    refused("damping: expected none with a preconditioner", Attributor, store, ready, damping=1.0)


@pytest.mark.parametrize("mode", SCAN_MODES)
def test_influence_between_rows_in_memory(tmp_path: Path, mode: str) -> None:
    rows = gradients(90)
    store = make_store(tmp_path / "s", rows, "float32")
    attributor = open_attributor(store)
    groups = {"up": "up"}
    want = attributor.scores(QUERIES, mode, groups=groups)
    names = [f"row-{i}" for i in range(90)]
    got = influence_between(
        QUERIES, rows, attributor.preconditioner, mode, groups=groups, row_ids=names
    )
    assert torch.equal(got.scores, want.scores)
    assert torch.equal(got.groups["up"].scores, want.groups["up"].scores)
    assert got["tgt_ids"] == want["tgt_ids"]
    assert got.zero_rows == want.zero_rows
    identity = influence_between(QUERIES, rows, IdentityPreconditioner(MODULES), "dot")
    assert identity["tgt_ids"] == [str(i) for i in range(90)]
    with pytest.raises(ValueError, match="row_ids: expected 90, got 1"):
        influence_between(QUERIES, rows, attributor.preconditioner, row_ids=["a"])
    bad = rows[:2].clone()
    bad[1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"rows: '1' is not finite in module 'layer\.0\.up'"):
        influence_between(QUERIES, bad, attributor.preconditioner)


def test_places_that_no_row_fills_have_no_id() -> None:
    """A score that is not a number is never selected; its place does not name the last row."""
    rows, scores = torch.tensor([[1, 0, -1]]), torch.tensor([[2.0, 1.0, -torch.inf]])
    result = InfluenceResult("dot", ["q"], ["a", "b"], {}, None, None, scores, rows, -scores, rows)
    assert result.top_ids == result.bottom_ids == [["b", "a"]]
    assert [row["id"] for row in result.rows(0)] == ["b", "a", "b", "a"]


def test_result_reads_like_logix_and_as_json(store: Store, attributor: Attributor) -> None:
    full = attributor.scores(QUERIES, "l-relatif", query_ids=["a", "b", 3, 4])
    assert dict(full).keys() == {"src_ids", "tgt_ids", "influence"}
    assert full["src_ids"] == ["a", "b", "3", "4"]
    assert full["tgt_ids"] == [f"row-{i}" for i in range(150)]
    assert full["influence"] is full.scores
    ranked = full.rows(1)
    assert [entry["score"] for entry in ranked] == sorted(full.scores[1].tolist(), reverse=True)
    with pytest.raises(AttributeError, match="top_ids: only a top-k result has it"):
        full.top_ids  # noqa: B018
    top = attributor.top_k(QUERIES, 2, groups={"up": "up"})
    assert top["tgt_ids"] == top.top_ids
    assert top.top_ids[1] == [entry["id"] for entry in ranked[:2]]
    assert top.bottom_ids[1] == [ranked[-1]["id"], ranked[-2]["id"]]
    first = top.rows(1)[0]
    assert (first["rank"], first["id"], first["end"]) == (1, ranked[0]["id"], "top")
    read = json.loads(top.to_json())
    assert read["mode"] == "l-relatif"
    assert read["queries"][1]["rows"] == top.rows(1)
    assert read["groups"]["up"]["queries"][0]["rows"] == top.groups["up"].rows(0)
    assert set(read["dampings"]) == {module.name for module in MODULES}
    with pytest.raises(KeyError):
        full["scores"]


def test_precondition_is_the_preconditioner_s(store: Store, attributor: Attributor) -> None:
    want = dense(QUERIES, unpacked(store)).preconditioned
    assert torch.allclose(attributor.precondition(QUERIES.double()), want, rtol=1e-9)
    assert attributor.precondition(QUERIES).dtype == torch.float32


def test_prepared_queries_are_solved_once_for_all_modes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributor, groups = open_attributor(store), {"up": "up"}
    want = {mode: attributor.scores(QUERIES, mode, groups=groups) for mode in SCAN_MODES}
    solves = []
    solve = attributor.preconditioner.precondition

    def spy(rows: Tensor) -> Tensor:
        solves.append(1)
        return solve(rows)

    monkeypatch.setattr(attributor.preconditioner, "precondition", spy)
    prepared = attributor.prepare(QUERIES, list("abcd"))
    for mode in SCAN_MODES:
        got = attributor.scores(prepared, mode, groups=groups)
        assert torch.equal(got.scores, want[mode].scores)
        assert torch.equal(got.groups["up"].scores, want[mode].groups["up"].scores)
        assert attributor.top_k(prepared, 3, mode).query_ids == list("abcd")
    assert len(solves) == 1
    assert torch.equal(prepared.solved.float(), attributor.precondition(QUERIES))
    with pytest.raises(ValueError, match="query_ids: expected none with prepared queries"):
        attributor.scores(prepared, query_ids=list("abcd"))
    with pytest.raises(ValueError, match="queries: were prepared for another curvature or damping"):
        open_attributor(store, damping=3.0).scores(prepared)


def test_a_matrix_is_dot_and_a_ranking_l_relatif_unless_asked_otherwise(store: Store) -> None:
    attributor = open_attributor(store)
    assert attributor.scores(QUERIES).mode == "dot"
    assert attributor.top_k(QUERIES, 2).mode == "l-relatif"
    between = influence_between(QUERIES, unpacked(store).float(), attributor.preconditioner)
    assert between.mode == "dot"


def test_progress_counts_every_row(store: Store) -> None:
    seen = []
    open_attributor(store, block_rows=25).scores(
        QUERIES, "l-relatif", progress=lambda *now: seen.append(now)
    )
    blocks = [25, 15, 25, 15, 25, 15, 25, 5]  # a shard's end ends a block
    assert seen == [(sum(blocks[: n + 1]), 150) for n in range(len(blocks))]


def test_reading_a_map_does_not_warn_or_copy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.float16).reshape(2, 3))
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = share(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (151, "k: expected at most 150, the rows in the store, got 151"),
        (0, "k: expected a whole number of at least 1, got 0"),
        (2.0, "k: expected a whole number of at least 1, got 2.0"),
    ],
)
def test_bad_k(store: Store, k: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_attributor(store).top_k(QUERIES, k)


def test_bad_queries(attributor: Attributor) -> None:
    scores, half, array = attributor.scores, QUERIES.half(), QUERIES.numpy()
    modes = "dot, l-relatif, l2, theta-relatif, whitened-cosine"
    refused(f"mode: expected one of {modes}", scores, QUERIES, "l1")
    refused("got 'l1'", scores, QUERIES, "l1")
    refused("queries: expected float32, got float16", scores, half, error=TypeError)
    refused(f"queries: expected [Q, {DIM}], got [4, 3]", scores, QUERIES[:, :3])
    refused(f"queries: expected [Q, {DIM}], got [{DIM}]", scores, QUERIES[0])
    refused("queries: expected a tensor [Q, D], got ndarray", scores, array, error=TypeError)
    bad = QUERIES.clone()
    bad[2, SIZES[0] + 1] = float("nan")
    named = partial(attributor.top_k, query_ids=list("abcd"))
    refused("queries: 'c' is not finite in module 'layer.0.down'", named, bad, 2)
    refused("query_ids: expected 4, one per query, got 1", scores, QUERIES, query_ids=["a"])


def test_no_queries_give_no_scores(store: Store) -> None:
    assert open_attributor(store).scores(QUERIES[:0], "l-relatif").scores.shape == (0, 150)


def test_bad_groups(attributor: Attributor) -> None:
    scores = partial(attributor.scores, QUERIES, "l-relatif")
    unknown = "groups: 'x' (attn) matches none of the modules layer"
    refused(unknown, scores, groups={"x": "attn"})
    refused("groups: the name 'total' is taken", scores, groups={"total": "up"})
    mapping = "groups: expected a list or a mapping of substrings"
    refused(mapping, scores, groups="up", error=TypeError)


def test_bad_attributor(tmp_path: Path, store: Store) -> None:
    empty = make_store(tmp_path / "empty", gradients(0))
    refused("empty: the store holds no rows; log some first", Attributor, empty, "none")
    refused("block_rows: expected at least 1, got 0", Attributor, store, "none", block_rows=0)
    with pytest.raises(
        ValueError, match=r"curvature: expected .*'raw', .*'none', .* got 'hessian'"
    ):
        Attributor(store, "hessian")
    other = RawCurvature(MODULES[:2])
    refused("curvature: expected the store's modules", Attributor, store, other)
    refused("damping: expected a finite number >= 0, got -1", open_attributor, store, damping=-1)


def test_a_singular_curvature_without_damping_is_an_error_of_the_attributor(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", gradients(4))
    refused("module 'layer.0.up': H + 0 I has rank 4 of 12", open_attributor, store, damping=0.0)
    scores = open_attributor(store, damping=0.0, solver="eigh").scores(QUERIES, "l-relatif").scores
    assert scores.isfinite().all()


@pytest.mark.parametrize("kind", ["sigma", "theta"])
def test_the_cache_beside_the_store_says_what_format_md_says(store: Store, kind: str) -> None:
    """scale[r]^2 * sum over m of (value[r, m] * 2**unit_exponents[m])^2, read with NumPy alone."""
    attributor, truth = open_attributor(store), dense(QUERIES, unpacked(store))
    attributor.scores(QUERIES, {"sigma": "l-relatif", "theta": "theta-relatif"}[kind])
    (folder,) = (store.path / "self_influence").iterdir()
    meta = json.loads((folder / "key.json").read_text())["meta"]
    assert meta["dampings"] == attributor.dampings
    files = sorted(folder.glob("shard-*.npy"))
    values = np.concatenate([np.load(file) for file in files]).astype(np.float64)
    scale = np.concatenate([shard.row_scale for shard in store.shards])
    units = np.array(meta["unit_exponents"])
    got = scale**2.0 * ((values * 2.0**units) ** 2).sum(axis=1)
    want = {"sigma": truth.sigma, "theta": truth.theta**2}[kind].numpy()
    # as in test_self_influence
    np.testing.assert_allclose(got, want, rtol=200 * 2**-24)
