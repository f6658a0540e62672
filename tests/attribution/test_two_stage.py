"""A scan of coarse rows, then exact scores of the rows that may lead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_influence import MODULES, gradients, make_store
from refusals import refused
from torch import Tensor

from logra_kernels.attribution import (
    Attributor,
    InfluenceResult,
    TwoStage,
    bounds,
    compress_store,
    influence_between,
    norms,
)
from logra_kernels.curvature import RawCurvature
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.rows import share
from logra_kernels.store import (
    RowLayout,
    Store,
    StoreError,
    StoreFormatError,
    StoreMismatchError,
    codecs,
)

KEPT = ("top_rows", "top_scores", "bottom_rows", "bottom_scores")
ROWS = 900


class Rough(codecs.Float32):
    """Float32 rows rounded to powers of two: the error of a codec of few bits."""

    name = "rough-for-tests"
    version = 2

    def encode(
        self, rows: np.ndarray, layout: RowLayout, exponents: Any = ()
    ) -> tuple[np.ndarray, None, None]:
        """As in RowCodec."""
        fraction, exponent = np.frexp(rows)
        return np.ldexp(np.sign(fraction) * 0.75, exponent).astype(np.float32), None, None


@pytest.fixture
def rough(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(codecs.base._codecs, Rough.name, Rough())
    return Rough.name


def odd_rows(count: int = ROWS) -> Tensor:
    """Rows among which are equal ones, zeros and one that outweighs all others."""
    rows = gradients(count)
    rows[200:230] = rows[3]
    rows[500:510] = 0
    rows[77] *= 1e6
    rows[800] = rows[77]
    rows[600:603] = -rows[77]
    return rows


def odd_queries(rows: Tensor, count: int = 200) -> Tensor:
    """Queries of all sizes, some of which are rows, and one that is zero."""
    queries = gradients(count, seed=5)
    queries[:10] = rows[3:803:80]
    queries[15] *= 1e-25
    queries[16] *= 1e20
    queries[17] = 0
    return queries


def finer_store(path: Path, dtype: str = "float16", rows: Tensor | None = None) -> Store:
    """A store with its curvature."""
    store = make_store(path, odd_rows() if rows is None else rows, dtype, shard_rows=400)
    RawCurvature.rebuild(store).save(store)
    return Store.open(path)


def two_stages(tmp_path: Path, codec: str = "int8", **options: Any) -> tuple[TwoStage, Attributor]:
    """Both stages, and an Attributor of the finer store alone."""
    finer = finer_store(tmp_path / "finer", **options)
    coarse = compress_store(finer, tmp_path / "coarse", codec, shard_rows=333)
    return TwoStage(Attributor(coarse), finer), Attributor(finer)


def assert_equal(found: InfluenceResult, exact: InfluenceResult) -> None:
    for key in KEPT:
        assert torch.equal(getattr(found, key), getattr(exact, key)), key
    assert found.zero_rows == exact.zero_rows
    assert found.query_ids == exact.query_ids


@pytest.mark.parametrize("mode", SCAN_MODES)
@pytest.mark.parametrize(
    ("finer", "codec"),
    [
        ("float16", "int8"),
        ("float32", "int8"),
        ("float32", "float16"),
        ("float32", "int4"),
        ("float16", "sign"),
    ],
)
def test_certified_answers_are_the_exact_ones(
    tmp_path: Path, finer: str, codec: str, mode: str
) -> None:
    two, exact = two_stages(tmp_path, codec, dtype=finer)
    queries = odd_queries(odd_rows())
    for k in (1, 10):
        found = two.top_k(queries, k, mode, certified=True)
        assert_equal(found, exact.top_k(queries, k, mode))
        assert found.answer.method == "certified"
        # The zero query's scores all tie, so that it needs every row; the others need few.
        needed = sorted(found.answer.candidates)
        assert mode == "l2" or needed[-1] == 2 * ROWS
        assert codec in ("int4", "sign") or needed[len(needed) // 2] < 60 * k


@pytest.mark.parametrize("mode", ["dot", "l-relatif"])
def test_certified_where_the_bound_says_nothing(tmp_path: Path, rough: str, mode: str) -> None:
    two, exact = two_stages(tmp_path, rough)
    queries = odd_queries(odd_rows(), 30)
    found = two.top_k(queries, 5, mode, certified=True)
    assert_equal(found, exact.top_k(queries, 5, mode))
    assert found.answer.reranked_rows == ROWS


def test_more_entries_than_are_held_become_rows_of_all_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MOST_ENTRIES", 100)
    monkeypatch.setattr(bounds, "PAIRS", 500)
    two, exact = two_stages(tmp_path)
    queries = odd_queries(odd_rows(), 40)
    found = two.top_k(queries, 5, certified=True)
    assert_equal(found, exact.top_k(queries, 5))
    assert min(found.answer.candidates) > 100


@pytest.mark.parametrize("mode", SCAN_MODES)
@pytest.mark.parametrize("codec", ["int8", "float16", "int4", "sign", "rough-for-tests"])
@pytest.mark.usefixtures("rough")
def test_no_exact_score_is_outside_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, mode: str
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    add = bounds.Frontier.add

    def spy(self: bounds.Frontier, middle: Tensor, radius: Tensor, first_row: int) -> None:
        seen.append((middle, radius))
        add(self, middle, radius, first_row)

    monkeypatch.setattr(bounds.Frontier, "add", spy)
    two, exact = two_stages(tmp_path, codec, dtype="float32")
    queries = odd_queries(odd_rows())
    two.top_k(queries, 3, mode, certified=True)
    middle, radius = (torch.cat(parts[::2], dim=1) for parts in zip(*seen, strict=True))
    scores = exact.scores(queries, mode).scores.double()
    assert ((scores - middle).abs() <= radius).all()
    # Not a bound that is right for being infinite.
    assert radius[20:].isfinite().all()


def test_certified_over_huge_and_tiny_rows(tmp_path: Path) -> None:
    """Scores near both ends of float32's range."""
    rows = gradients(200)
    rows[:50] *= 1e30
    rows[50:100] *= 1e-33
    finer = make_store(tmp_path / "finer", rows, "float32")
    coarse = compress_store(finer, tmp_path / "coarse")
    two = TwoStage(Attributor(coarse, "none"), finer)
    queries = gradients(20, seed=2)
    for mode in SCAN_MODES:
        found = two.top_k(queries, 7, mode, certified=True)
        assert_equal(found, Attributor(finer, "none").top_k(queries, 7, mode))


@pytest.mark.parametrize("mode", SCAN_MODES)
def test_scores_of_candidates_have_the_finer_rows_bits(tmp_path: Path, mode: str) -> None:
    two, exact = two_stages(tmp_path)
    queries = odd_queries(odd_rows(), 30)
    scores = exact.scores(queries, mode).scores
    found = two.top_k(queries, 5, mode, candidates=20, query_ids=[f"q{i}" for i in range(30)])
    assert torch.equal(found.top_scores, scores.gather(1, found.top_rows))
    assert torch.equal(found.bottom_scores, scores.gather(1, found.bottom_rows))
    assert found.query_ids[3] == "q3"
    assert found.answer.candidates == (40,) * 30
    assert_equal(two.top_k(queries, 5, mode, candidates=2 * ROWS), exact.top_k(queries, 5, mode))


@pytest.mark.parametrize("mode", SCAN_MODES)
@pytest.mark.parametrize("codec", ["int4", "int2"])
def test_the_first_plane_is_scanned_and_all_planes_rank(
    tmp_path: Path, codec: str, mode: str
) -> None:
    source = finer_store(tmp_path / "source", "float32", gradients(ROWS))
    store = compress_store(source, tmp_path / "made", codec, shard_rows=333)
    two, exact = TwoStage(Attributor(store.first_planes(1)), store), Attributor(store)
    queries = gradients(20, seed=3)
    want = exact.top_k(queries, 5, mode)
    assert_equal(two.top_k(queries, 5, mode, candidates=ROWS), want)
    found = two.top_k(queries, 5, mode, candidates=100)
    assert recall_of(found, want, 5) > 0.9
    assert found.answer.reranked_bytes == found.answer.reranked_rows * store.row_bytes
    scores = exact.scores(queries, mode).scores
    assert torch.equal(found.top_scores, scores.gather(1, found.top_rows))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_the_candidates_norms_are_the_ones_beside_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    source = finer_store(tmp_path / "source")
    finer = compress_store(source, tmp_path / "finer", codec, shard_rows=300)
    coarse = compress_store(finer, tmp_path / "coarse", "sign", shard_rows=333)
    queries = odd_queries(odd_rows(), 20)
    exact = Attributor(finer)
    wanted = exact.top_k(queries, 5)
    computed = []
    compute = norms.Norms.compute

    def spy(self: norms.Norms, block: Any, found: norms.ShardNorms) -> None:
        if found.fresh:
            computed.append(block.rows.shape[0])
        compute(self, block, found)

    monkeypatch.setattr(norms.Norms, "compute", spy)
    found = TwoStage(Attributor(coarse), finer).top_k(queries, 5, candidates=ROWS)
    assert_equal(found, wanted)
    assert computed == []


def recall_of(found: InfluenceResult, exact: InfluenceResult, k: int) -> float:
    hits = [
        len(set(got) & set(want)) / k
        for key in ("top_rows", "bottom_rows")
        for got, want in zip(
            getattr(found, key).tolist(), getattr(exact, key).tolist(), strict=True
        )
    ]
    return float(np.mean(hits))


@pytest.mark.parametrize("mode", ["dot", "l-relatif"])
def test_a_recall_is_reached_and_estimated(tmp_path: Path, rough: str, mode: str) -> None:
    rows = gradients(6000)
    two, exact = two_stages(tmp_path, rough, rows=rows)
    queries = gradients(40, seed=3)
    want = exact.top_k(queries, 10, mode)
    alone = recall_of(two.scan.top_k(queries, 10, mode), want, 10)
    assert alone < 0.85
    before = 0
    for target in (0.9, 0.98):
        found = two.top_k(queries, 10, mode, recall=target)
        reached = recall_of(found, want, 10)
        assert reached >= target
        assert found.answer.recall is not None
        assert found.answer.recall_interval is not None
        low, high = found.answer.recall_interval
        assert low <= reached <= high
        assert target <= found.answer.recall
        needed = sum(found.answer.candidates)
        assert before < needed < 40 * 6000 / 4
        before = needed
    few = two.top_k(queries, 10, mode, candidates=10)
    assert few.answer.recall_interval is not None
    low, high = few.answer.recall_interval
    assert low <= recall_of(few, want, 10) <= high


def test_a_recall_may_take_every_row(tmp_path: Path) -> None:
    """Coarse scores that say nothing: as many rows are listed as there are."""
    rows = gradients(700)
    finer = finer_store(tmp_path / "finer", rows=rows)
    other = make_store(tmp_path / "other", gradients(700, seed=9), "float16")
    RawCurvature.rebuild(finer).save(other)
    two = TwoStage(Attributor(Store.open(tmp_path / "other"), RawCurvature.rebuild(finer)), finer)
    queries = gradients(5, seed=3)
    found = two.top_k(queries, 10, "l-relatif")
    want = Attributor(finer, RawCurvature.rebuild(finer)).top_k(queries, 10, "l-relatif")
    assert torch.equal(found.top_rows, want.top_rows)
    assert (found.answer.reranked_rows, found.answer.recall) == (700, 1.0)


def test_rows_may_be_computed(tmp_path: Path) -> None:
    rows = odd_rows()
    two, exact = two_stages(tmp_path, dtype="float32")
    asked: list[np.ndarray] = []

    def compute(numbers: np.ndarray) -> Tensor:
        asked.append(numbers)
        return rows[torch.from_numpy(numbers)]

    queries = odd_queries(rows, 20)
    computed = TwoStage(two.scan, compute)
    found = computed.top_k(queries, 5, candidates=30)
    for numbers in asked:
        assert (np.diff(numbers) > 0).all()
    scores = influence_between(queries, rows, two.scan.preconditioner, "l-relatif").scores
    assert torch.equal(found.top_scores, scores.gather(1, found.top_rows))
    assert torch.equal(found.top_rows, exact.top_k(queries, 5).top_rows)
    assert (found.answer.finer, found.answer.reranked_bytes) == ("computed", None)
    refused(
        "certified: expected a finer store, whose rows' residuals are known; got a function",
        computed.top_k,
        queries,
        5,
        certified=True,
    )
    with pytest.raises(ValueError, match=r"^rerank: expected \d+ rows, got 1$"):
        TwoStage(two.scan, lambda numbers: rows[:1]).top_k(queries, 5)


def test_the_answer_says_how_it_was_found(tmp_path: Path) -> None:
    two, exact = two_stages(tmp_path)
    queries = gradients(3, seed=3)
    assert exact.top_k(queries, 5).answer.method == "scan"
    assert str(exact.top_k(queries, 5).answer) == "every row was scored"
    found = two.top_k(queries, 5, candidates=7)
    told = json.loads(found.to_json())["answer"]
    assert told["method"] == "re-ranked"
    assert told["reranked_bytes"] == told["reranked_rows"] * 2 * two.scan.store.dim
    assert told["candidates"] == [14, 14, 14]
    assert f"{told['reranked_rows']} of {ROWS} rows were scored again" in str(found.answer)
    assert "estimated recall" in str(found.answer)
    assert "certified, the ranking of all float16 rows" in str(
        two.top_k(queries, 5, certified=True).answer
    )


def test_residuals_are_kept_beside_the_coarse_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, exact = two_stages(tmp_path)
    queries = gradients(3, seed=3)
    two.top_k(queries, 5, certified=True)
    folders = list((tmp_path / "coarse" / "self_influence").glob("residual-*"))
    assert len(folders) == 1
    assert two.scan.store.verify() == []
    taken: list[int] = []
    take = Store.take

    def spy(self: Store, rows: Any) -> np.ndarray:
        taken.append(len(rows))
        return take(self, rows)

    monkeypatch.setattr(Store, "take", spy)
    two.top_k(queries, 5, certified=True)
    assert taken == []
    files = sorted(folders[0].glob("shard-00001-*.npy"))
    files[0].write_bytes(files[0].read_bytes()[:-4])
    assert_equal(two.top_k(queries, 5, certified=True), exact.top_k(queries, 5))
    assert sum(taken) == 333  # of the damaged shard
    # Other finer rows have residuals of their own.
    again = finer_store(tmp_path / "again", "float32")
    other = TwoStage(Attributor(two.scan.store, two.scan.preconditioner), again)
    other.top_k(queries, 5, certified=True)
    assert len(list((tmp_path / "coarse" / "self_influence").glob("residual-*"))) == 2


def test_what_is_refused(tmp_path: Path) -> None:
    two, _ = two_stages(tmp_path)
    queries = gradients(3, seed=3)
    refused(
        "expected one of candidates, recall and certified, got candidates and certified",
        two.top_k,
        queries,
        5,
        candidates=7,
        certified=True,
    )
    refused("candidates: expected at least k = 5, got 4", two.top_k, queries, 5, candidates=4)
    refused("candidates: expected a whole number", two.top_k, queries, 5, candidates=0)
    refused("recall: expected a number between 0 and 1, got 1", two.top_k, queries, 5, recall=1)
    refused(f"k: expected at most {ROWS}", two.top_k, queries, ROWS + 1)
    refused("mode: expected one of", two.top_k, queries, 5, "best")
    scan = two.scan
    shorter = make_store(tmp_path / "shorter", odd_rows()[:-1])
    with pytest.raises(StoreMismatchError, match="rows: the store has 900, the finer store has 8"):
        TwoStage(scan, shorter)
    renamed = make_store(tmp_path / "renamed", odd_rows(), ids=range(ROWS))
    with pytest.raises(StoreMismatchError, match="their ids, or the order, differ"):
        TwoStage(scan, tmp_path / "renamed")
    assert renamed.num_rows == ROWS
    other = make_store(tmp_path / "other", odd_rows(), fingerprints={"model": "another"})
    with pytest.raises(StoreMismatchError, match="fingerprints"):
        TwoStage(scan, other)
    split = [MODULES[0], MODULES[2], MODULES[1]]
    moved = make_store(tmp_path / "moved", odd_rows(), modules=split)
    with pytest.raises(StoreMismatchError, match="modules"):
        TwoStage(scan, moved)


def test_gathered_rows_are_the_mapped_ones(tmp_path: Path) -> None:
    store = finer_store(tmp_path / "finer")
    numbers = np.array([899, 0, 1, 2, 400, 399, 401, 0, 7])
    stored, scale, own = store.gather(numbers)
    whole = np.concatenate([shard.rows for shard in store.shards])
    scales = np.concatenate([shard.row_scale for shard in store.shards])
    np.testing.assert_array_equal(stored, whole[numbers])
    np.testing.assert_array_equal(scale, scales[numbers])
    assert own is None
    taken = store.take(numbers)
    np.testing.assert_array_equal(taken, np.stack([store.row(int(n)) for n in numbers]))
    assert share(taken).shape == (9, store.dim)
    assert store.take([]).shape == (0, store.dim)


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    store = finer_store(tmp_path / "finer")
    path = store.shards[1].path
    path.write_bytes(path.read_bytes()[:-1])
    store.take([3])
    refused(f"{path}: expected", store.take, [3, 500], error=StoreFormatError)
    path.unlink()
    refused(f"{path}: cannot be read", store.gather, [500], error=StoreFormatError)
    refused("rows: expected 0 to 899, got 900", store.gather, [3, 900], error=StoreError)
