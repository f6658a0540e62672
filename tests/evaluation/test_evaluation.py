"""Evaluation by retraining, on a model whose retraining is exact: least squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from logra_kernels.evaluation import (
    brittleness,
    half_subsets,
    lds,
    lds_difference,
    mislabelled_auc,
    recall_at,
    retrain,
    without_top,
)
from logra_kernels.evaluation.lds import ranks_of, spearman

N, Q, DIM = 60, 12, 4
_generator = np.random.default_rng(0)
X, QUERIES = _generator.normal(size=(N, DIM)), _generator.normal(size=(Q, DIM))
TRUE = _generator.normal(size=DIM)
Y = X @ TRUE + _generator.normal(size=N)
ANSWERS = QUERIES @ TRUE + _generator.normal(size=Q)
RIDGE = 1e-2


class LeastSquares:
    """Counts what it is asked to train, and can be stopped."""

    def __init__(self, noise: float = 0.0, stop_after: int | None = None) -> None:
        self.trained = 0
        self.noise = noise
        self.stop_after = stop_after

    def __call__(self, indices: list[np.ndarray], seeds: list[int]) -> np.ndarray:
        if self.stop_after is not None and self.trained >= self.stop_after:
            raise KeyboardInterrupt
        self.trained += len(indices)
        losses = []
        for chosen, seed in zip(indices, seeds, strict=True):
            x, y = X[chosen], Y[chosen]
            theta = np.linalg.solve(x.T @ x + RIDGE * np.eye(DIM), x.T @ y)
            theta += self.noise * np.random.default_rng(seed + 7 * len(x)).normal(size=DIM)
            losses.append((QUERIES @ theta - ANSWERS) ** 2 / 2)
        return np.stack(losses)


def influences() -> np.ndarray:
    """Eq. 3 for least squares, exact H: [Q, N]."""
    h = X.T @ X + RIDGE * np.eye(DIM)
    theta = np.linalg.solve(h, X.T @ Y)
    rows = X * (X @ theta - Y)[:, None]
    queries = QUERIES * (QUERIES @ theta - ANSWERS)[:, None]
    scores: np.ndarray = queries @ np.linalg.solve(h, rows.T)
    return scores


def test_influence_of_least_squares_ranks_its_retrained_models(tmp_path: Path) -> None:
    """Leaving half of 60 examples out is no small change, so the score is high and below 1."""
    subsets = half_subsets(N, 80)
    losses = retrain(LeastSquares(), subsets, 1, tmp_path)
    found = lds(influences(), subsets, losses)
    assert 0.7 < found.value < 1
    assert found.low < found.value < found.high
    assert found.ceiling is None
    assert lds(-influences(), subsets, losses).value == pytest.approx(-found.value)
    noise = np.random.default_rng(1).normal(size=(Q, N))
    chance = lds(noise, subsets, losses)
    assert chance.low < 0.1
    assert abs(chance.value) < 0.15
    assert str(found).startswith(f"LDS {found.value:.3f} [")


def test_seed_noise_gives_the_ceiling(tmp_path: Path) -> None:
    subsets = half_subsets(N, 40)
    quiet = retrain(LeastSquares(), subsets, 3, tmp_path, name="quiet")
    assert lds(influences(), subsets, quiet).ceiling == pytest.approx(1)
    loud = retrain(LeastSquares(noise=5.0), subsets, 3, tmp_path, name="loud")
    ceiling = lds(influences(), subsets, loud).ceiling
    assert ceiling is not None
    assert 0 <= ceiling < 0.9


def test_a_difference_is_paired(tmp_path: Path) -> None:
    """Its interval is narrower than one of independent methods would be; 0 for equal rankings."""
    subsets = half_subsets(N, 80)
    losses = retrain(LeastSquares(), subsets, 1, tmp_path)
    scores = influences()
    noisy = scores + 0.3 * scores.std() * np.random.default_rng(2).normal(size=(Q, N))
    better, worse = lds(scores, subsets, losses), lds(noisy, subsets, losses)
    found = lds_difference(scores, noisy, subsets, losses)
    assert found.value == pytest.approx(better.value - worse.value)
    assert 0 < found.low < found.value < found.high
    independent = np.hypot(better.high - better.low, worse.high - worse.low)
    assert found.high - found.low < independent
    back = lds_difference(noisy, scores, subsets, losses)
    assert [back.value, back.low, back.high] == pytest.approx(
        [-found.value, -found.high, -found.low]
    )
    same = lds_difference(scores, 3 * scores, subsets, losses)
    assert same.value == pytest.approx(0)
    assert same.low == pytest.approx(0)
    assert str(found).startswith(f"LDS {found.value:+.3f} [")
    with pytest.raises(ValueError, match=r"subsets: expected \[S, 5\] for scores \[12, 5\]"):
        lds_difference(scores, scores[:, :5], subsets, losses)


def test_a_model_is_trained_once(tmp_path: Path) -> None:
    """A killed evaluation goes on; more seeds and subsets cost what is new."""
    subsets = half_subsets(N, 6)
    with pytest.raises(KeyboardInterrupt):
        retrain(LeastSquares(stop_after=4), subsets, 2, tmp_path, batch=2)
    rest = LeastSquares()
    seen: list[tuple[int, int]] = []
    losses = retrain(
        rest, subsets, 2, tmp_path, batch=5, progress=lambda done, of: seen.append((done, of))
    )
    assert rest.trained == 8
    assert seen == [(4, 12), (9, 12), (12, 12)]
    assert np.array_equal(losses, retrain(LeastSquares(), subsets, 2, tmp_path / "anew"))
    more = LeastSquares()
    assert np.array_equal(retrain(more, subsets, [1, 0, 5], tmp_path)[:, :2], losses[:, ::-1])
    assert more.trained == 6
    assert not list(tmp_path.glob("*.tmp"))


def test_without_top_leaves_out_each_querys_best() -> None:
    ranking = np.array([[3, 1, 0], [2, 0, 1]])
    assert without_top(ranking, 4, 2).tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    assert without_top(ranking, 4, 0).all()
    for ranked, count, k, message in (
        (ranking, 4, 4, r"k: expected 0 to 3, the ranking's length, got 4"),
        (ranking, 3, 1, r"ranking: expected indices from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            without_top(ranked, count, k)


def test_ranks_share_ties() -> None:
    assert ranks_of(np.array([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[2.5, 0.0, 2.5, 1.0]]
    a = np.random.default_rng(0).integers(5, size=(20, 30)).astype(float)
    b = np.random.default_rng(1).integers(4, size=(20, 30)).astype(float)
    want = [np.corrcoef(x, y)[0, 1] for x, y in zip(ranks_of(a), ranks_of(b), strict=True)]
    assert np.allclose(spearman(a, b), want)
    assert np.isnan(spearman(np.ones((1, 4)), np.arange(4.0)[None])).all()


def test_auc_is_the_share_of_pairs_in_order() -> None:
    values, wrong = np.array([0.1, 0.5, 0.5, 0.9, 0.2]), np.array([0, 1, 0, 1, 0], bool)
    pairs = [(a > b) + (a == b) / 2 for a in values[wrong] for b in values[~wrong]]
    assert mislabelled_auc(values, wrong) == pytest.approx(np.mean(pairs))
    with pytest.raises(ValueError, match="expected some and not all of 5, got 0"):
        mislabelled_auc(values, np.zeros(5, bool))
    with pytest.raises(ValueError, match=r"flipped: expected \[5\]"):
        mislabelled_auc(values, wrong[:3])


def test_recall_counts_the_relevant_among_the_first() -> None:
    ranking = [["a", "b", "c", "d"], ["d", "c", "b", "a"]]
    assert recall_at(ranking, [{"a", "d"}, ["a"]], 2).tolist() == [0.5, 0.0]
    assert recall_at(ranking, [{"a", "b", "c"}, ["d"]], 1).tolist() == [1.0, 1.0]
    for relevant, k, message in (
        ([{"a"}], 1, "relevant: expected 2, one for each query, got 1"),
        ([{"a"}, set()], 1, "relevant: query 1 has none"),
        ([{"a"}, {"b"}], 0, "k: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            recall_at(ranking, relevant, k)


def test_bad_input_is_named(tmp_path: Path) -> None:
    subsets = half_subsets(N, 4)
    losses = np.zeros((4, 1, Q))
    with pytest.raises(ValueError, match=r"subsets: expected \[S, 60\] for scores"):
        lds(influences(), subsets[:, :5], losses)
    with pytest.raises(ValueError, match=r"losses: expected \[4, R, 12\], got \[4, 1, 3\]"):
        lds(influences(), subsets, losses[:, :, :3])
    with pytest.raises(ValueError, match="subsets: expected at least 3, got 2"):
        lds(influences(), subsets[:2], losses[:2])
    with pytest.raises(ValueError, match="expected at least 2 examples and 1 subset"):
        half_subsets(1, 3)
    with pytest.raises(ValueError, match=r"subsets: expected bool \[S, N\], got float64"):
        retrain(LeastSquares(), subsets.astype(float), 1, tmp_path)
    with pytest.raises(ValueError, match=r"train: expected finite losses \[1, Q\]"):
        retrain(lambda i, s: np.full((1, Q), np.nan), subsets, 1, tmp_path)
    assert not list(tmp_path.iterdir())


def test_brittleness_is_each_querys_own_rise() -> None:
    before = np.array([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])  # two models
    after = np.zeros((3, 1, 3))
    after[range(3), 0, range(3)] = [5.0, 1.0, 1.0]
    after[0, 0, 1] = 100.0  # another query's loss
    found = brittleness(before, after)
    assert found.per_query.tolist() == [3.0, -1.0, 1.0]
    assert found.value == pytest.approx(1.0)
    assert -1 <= found.low < 1 < found.high <= 3
    assert str(found).startswith("+1.000 [")
    with pytest.raises(ValueError, match=r"before: expected \[R, Q\], got \[3\]"):
        brittleness(before[0], after)
    with pytest.raises(ValueError, match=r"after: expected \[3, R, 3\], got \[2, 1, 3\]"):
        brittleness(before, after[:2])


def test_influence_finds_what_least_squares_is_brittle_to(tmp_path: Path) -> None:
    """The squared error rises most without the examples of the largest influence."""
    everything = np.ones((1, N), bool)
    before = retrain(LeastSquares(), everything, 1, tmp_path)[0]
    scores = influences()
    rises = [
        brittleness(
            before, retrain(LeastSquares(), without_top(order.argsort(axis=1), N, 6), 1, tmp_path)
        ).value
        for order in (-scores, np.random.default_rng(1).normal(size=(Q, N)), scores)
    ]
    assert rises[0] > max(rises[1], 0.01)
    assert rises[1] > rises[2]
