"""Scores without stored rows: those of an Attributor over a float32 store of the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refusals import refuse
from summed_losses import COUNT, SAMPLES, Losses, log, watch
from torch import Tensor, nn

from logra_kernels import Attributor, Config, InfluenceResult, Run
from logra_kernels.attribution import influence_between
from logra_kernels.capture.short_examples import ShortExamples, ShortRows
from logra_kernels.curvature.whitening import Rotated
from logra_kernels.defaults import SCAN_MODES

IDS = [f"row{n}" for n in range(COUNT)]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.twice(torch.tanh(self.once(x)))))  # type: ignore[no-any-return]


class Logged:
    """A float32 store of a model's gradients, and three queries."""

    def __init__(
        self,
        folder: Path,
        name: str,
        kind: str,
        rank: int | None = None,
        dtype: str = "float32",
        on_nonfinite: str = "raise",
    ) -> None:
        self.model, self.loss, self.mask = SAMPLES[name]()
        self.run = Run("toy", Config(root_dir=str(folder), dtype=dtype, on_nonfinite=on_nonfinite))
        watch(self.run, self.model, name, rank, bias=True)
        statistic = {} if kind == "none" else {"statistic": kind}
        self.run.setup({"save": "grad", **statistic})
        log(self.run, self.model, self.loss, self.mask, batch=4)
        self.run.finalize()
        self.run.eval()
        self.kind = kind
        parts = []
        for n in (2, 5, 0):
            with self.run([f"q{n}"], None if self.mask is None else self.mask[[n]]):
                (0.5 * self.loss(self.model, [n])).backward()
            parts.append(self.run.last_rows()[1])
        self.queries = torch.cat(parts)

    def passes(self, batch: int = 4) -> None:
        log(self.run, self.model, self.loss, self.mask, batch)

    def attributor(self) -> Attributor:
        return self.run.attributor(precondition=self.kind != "none")


@pytest.fixture
def toy(tmp_path: Path) -> Logged:
    return Logged(tmp_path, "mlp", "ekfac")


def assert_same(found: InfluenceResult, want: InfluenceResult, rows_differ: bool = False) -> None:
    """Equal bits, or 1e-5 of a query's largest score where other batches rounded rows otherwise."""
    assert (found.mode, found.query_ids) == (want.mode, want.query_ids)
    assert list(found.row_ids) == list(want.row_ids)
    assert (found.dampings, found.zero_rows) == (want.dampings, want.zero_rows)
    for name in ("scores", "top_scores", "bottom_scores"):
        mine, theirs = getattr(found, name), getattr(want, name)
        assert (mine is None) == (theirs is None)
        if mine is not None and rows_differ:
            shown = [
                part
                for part in (want.scores, want.top_scores, want.bottom_scores)
                if part is not None
            ]
            allowed = 1e-5 * torch.cat(shown, dim=1).abs().amax(dim=1, keepdim=True)
            assert ((mine - theirs).abs() <= allowed).all()
        else:
            assert mine is None or torch.equal(mine, theirs)
    for name in ("top_rows", "bottom_rows"):
        mine, theirs = getattr(found, name), getattr(want, name)
        assert mine is None or torch.equal(mine, theirs)
    assert list(found.groups) == list(want.groups)
    for name, part in found.groups.items():
        assert_same(part, want.groups[name], rows_differ)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mlp", "raw"), ("mlp", "ec-shampoo"), ("mlp", "none"), ("cnn", "ekfac"),
        ("gpt", "ekfac"), ("gpt", "kfac"), ("gpt", "diagonal"),
    ],
)  # fmt: skip
def test_scores_are_those_of_a_store(name: str, kind: str, batch: int, tmp_path: Path) -> None:
    logged = Logged(tmp_path, name, kind)
    attributor = logged.attributor()
    for mode in SCAN_MODES:
        for top_k in (None, 3):
            with logged.run.streamed(
                logged.queries, mode, top_k=top_k, precondition=kind != "none"
            ) as streamed:
                logged.passes(batch)
            if top_k is None:
                want = attributor.scores(logged.queries, mode)
            else:
                want = attributor.top_k(logged.queries, top_k, mode)
            assert_same(streamed.result(), want, rows_differ=batch != 4)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("name", "limit", "used"),
    [("gpt", 5, 16), ("gpt", 9, 36), ("gpt", 1, 0), ("mlp", 4, 27), ("cnn", 30, 36)],
)
def test_norms_of_short_examples_come_from_their_tokens(
    name: str, limit: int, used: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-5 of a query's largest score: products of float32 in another order."""
    logged = Logged(tmp_path, name, "ekfac")
    monkeypatch.setattr(Rotated, "token_limit", limit)
    rows: list[int] = []
    of_tokens = Rotated.squares_of_tokens

    def counted(self: Rotated, *operands: Tensor) -> Tensor:
        rows.append(len(operands[2]) - 1)
        return of_tokens(self, *operands)

    monkeypatch.setattr(Rotated, "squares_of_tokens", counted)
    attributor = logged.attributor()
    for mode in ("l-relatif", "theta-relatif"):
        rows.clear()
        with logged.run.streamed(logged.queries, mode) as streamed:
            logged.passes(batch)
        assert_same(streamed.result(), attributor.scores(logged.queries, mode), rows_differ=True)
        assert sum(rows) == used
    with logged.run.streamed(logged.queries, "l-relatif", ids=["row8", "row3"]) as streamed:
        logged.passes(batch)
    found = streamed.result()
    want = attributor.scores(logged.queries, "l-relatif").scores[
        :, [IDS.index(n) for n in found.row_ids]
    ]
    assert torch.allclose(found.scores, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_a_module_that_is_called_twice_has_its_norms_from_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is a sum over calls. Packed examples are short or long each by itself."""
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(13, 6)
    run = Run("toy", Config(root_dir=str(tmp_path), dtype="float32"))
    run.watch(model, bias=True)
    run.setup({"save": "grad", "statistic": "ekfac"})

    def passed() -> None:
        with run(["a", "b", "c"], cu_seqlens=[0, 2, 9, 13]):
            model(x).square().sum().backward()

    passed()
    run.finalize()
    run.eval()
    monkeypatch.setattr(Rotated, "token_limit", 4)
    taken: list[tuple[str, list[int]]] = []
    of = ShortExamples.of

    def noted(self: ShortExamples, name: str, places: list[int]) -> ShortRows | None:
        found = of(self, name, places)
        taken.append((name, [] if found is None else found.rows))
        return found

    monkeypatch.setattr(ShortExamples, "of", noted)
    queries = torch.from_numpy(run.store.take([1, 2]))
    with run.streamed(queries, "l-relatif") as streamed:
        passed()
    assert taken == [("once", [0, 2]), ("twice", [])]
    want = run.attributor().scores(queries, "l-relatif")
    assert_same(streamed.result(), want, rows_differ=True)


def test_groups_and_names_of_queries(toy: Logged) -> None:
    groups = {"ends": ["first", "head"], "middle": "second"}
    names = ["a", "b", "c"]
    with toy.run.streamed(toy.queries, "l2", groups=groups, query_ids=names) as streamed:
        toy.passes()
    want = toy.attributor().scores(toy.queries, "l2", groups=groups, query_ids=names)
    assert_same(streamed.result(), want)


def test_the_modes_that_are_meant_and_prepared_queries(toy: Logged) -> None:
    attributor = toy.attributor()
    prepared = attributor.prepare(toy.queries, ["a", "b", "c"])
    with toy.run.streamed(prepared, top_k=2) as streamed:
        toy.passes()
    assert streamed.result().mode == "l-relatif"
    with toy.run.streamed(prepared) as streamed:
        toy.passes()
    assert_same(streamed.result(), attributor.scores(prepared))
    with (
        refuse("queries: were prepared for another curvature or damping"),
        toy.run.streamed(prepared, damping=1.0),
    ):
        pass


def test_another_damping(toy: Logged) -> None:
    with toy.run.streamed(toy.queries, damping_scale=0.5) as streamed:
        toy.passes()
    want = toy.run.attributor(damping_scale=0.5).scores(toy.queries)
    assert_same(streamed.result(), want)


def test_a_top_k_beyond_the_examples_is_all_of_them(toy: Logged) -> None:
    with toy.run.streamed(toy.queries, top_k=COUNT + 5) as streamed:
        toy.passes()
    assert_same(streamed.result(), toy.attributor().top_k(toy.queries, COUNT))


def test_nothing_is_kept(toy: Logged) -> None:
    before = {file: file.stat().st_mtime_ns for file in toy.run.path.rglob("*")}
    toy.run.setup({"save": "grad", "statistic": "ekfac"})
    with toy.run.streamed(toy.queries) as streamed:
        toy.passes()
    assert {file: file.stat().st_mtime_ns for file in toy.run.path.rglob("*")} == before
    held = [value for value in vars(streamed).values() if isinstance(value, Tensor)]
    assert not any(toy.queries.shape[1] in value.shape for value in held)
    with refuse("was finished; to log queries call eval() first", RuntimeError):
        toy.passes()  # setup is what it was before


def test_the_best_of_a_rough_ranking_are_scored_exactly(tmp_path: Path) -> None:
    """Random rows of rank 2 name candidates; whole gradients say how valuable those are."""
    rough = Logged(tmp_path / "rough", "mlp", "raw", rank=2, dtype="float16")
    exact = Logged(tmp_path / "exact", "mlp", "ekfac")
    ranked = rough.attributor().top_k(rough.queries, 2)
    candidates = {name for of_query in ranked.top_ids for name in of_query}
    assert 2 <= len(candidates) < COUNT
    with exact.run.streamed(exact.queries, "l-relatif", ids=candidates) as streamed:
        exact.passes()  # batches hold others too
    found = streamed.result()
    assert set(found.row_ids) == candidates
    every = exact.attributor().scores(exact.queries, "l-relatif")
    places = [IDS.index(name) for name in found.row_ids]
    assert torch.allclose(found.scores, every.scores[:, places], rtol=1e-6)
    with exact.run.streamed(exact.queries, ids=["row1", "row8", "row9"]) as streamed:
        exact.passes()
    with refuse("ids: 1 were not passed: row9"):
        streamed.result()


def test_what_streamed_refuses(toy: Logged) -> None:
    run, queries = toy.run, toy.queries
    with (
        refuse("top_k: expected a whole number of at least 1, got 0"),
        run.streamed(queries, top_k=0),
    ):
        pass
    with refuse("mode: expected one of"), run.streamed(queries, "best"):
        pass
    with refuse("queries: expected [Q, "), run.streamed(queries[:, 1:]):
        pass
    with (
        run.streamed(queries) as streamed,
        refuse("streamed: a pass is open, or passes of another kind", RuntimeError),
        run.streamed(queries),
    ):
        pass
    with refuse("no example was scored: pass some inside the `with`", RuntimeError):
        streamed.result()
    with run.streamed(queries), refuse("expected new ids, got 'row0', which was scored already"):
        toy.passes()
        toy.passes()
    with refuse("streamed: no model is watched", RuntimeError), Run("none").streamed(queries):
        pass


def test_examples_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    toy = Logged(tmp_path, "mlp", "kfac", on_nonfinite="skip")

    def spoiled(model: nn.Module, part: list[int]) -> Tensor:
        whole: Losses = toy.loss
        return whole(model, part) * (torch.nan if 4 in part else 1)

    with toy.run.streamed(toy.queries) as streamed, pytest.warns(UserWarning, match="left out"):
        log(toy.run, toy.model, spoiled, toy.mask, batch=1)  # type: ignore[arg-type]
    found = streamed.result()
    kept = [n for n in range(COUNT) if n != 4]
    assert list(found.row_ids) == [IDS[n] for n in kept]
    want = toy.attributor().scores(toy.queries).scores[:, kept]
    assert torch.allclose(found.scores, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


def test_rows_in_memory_may_be_none_and_have_one_name(toy: Logged) -> None:
    preconditioner = toy.run.preconditioner()
    none = influence_between(toy.queries, toy.queries[:0], preconditioner, "l-relatif")
    assert none.scores.shape == (3, 0)
    same = influence_between(toy.queries, toy.queries, preconditioner, row_ids=["a", "a", "a"])
    assert same.row_ids == ["a", "a", "a"]


# The curvature of rows that no store holds.


def unstored(folder: Path, name: str, kind: str) -> tuple[Run, list[int]]:
    """A run whose curvature is that of all examples, and the numbers of its passes."""
    model, loss, mask = SAMPLES[name]()
    run = Run("toy", Config(root_dir=str(folder), dtype="float32"))
    watch(run, model, name, None, bias=True)
    run.setup({"statistic": kind})
    numbers = []
    for number in run.curvature_passes():
        numbers.append(number)
        log(run, model, loss, mask, 4)
    run.finalize()
    return run, numbers


@pytest.mark.parametrize(
    ("name", "kind", "passes"),
    [
        ("mlp", "raw", 1), ("gpt", "kfac", 1), ("gpt", "ekfac", 2), ("cnn", "ekfac", 2),
        ("gpt", "ekfac-reduce", 2), ("mlp", "ec-shampoo", 2), ("mlp", "diagonal", 1),
    ],
)  # fmt: skip
def test_no_row_is_stored_from_the_first_pass_to_the_last(
    name: str, kind: str, passes: int, tmp_path: Path
) -> None:
    """Factors, corrected eigenvalues, scores: as with a store of all rows."""
    toy = Logged(tmp_path / "stored", name, kind)
    run, numbers = unstored(tmp_path / "unstored", name, kind)
    assert numbers == list(range(passes))
    assert run.store.num_rows == 0
    assert run.curvature.count == COUNT
    again = Run("toy", Config(root_dir=str(tmp_path / "unstored")))
    model, loss, mask = SAMPLES[name]()
    watch(again, model, name, None, bias=True)
    again.initialize_from_log()
    want = toy.attributor().scores(toy.queries, "l-relatif")
    for asked in (run, again):
        with asked.streamed(toy.queries, "l-relatif") as streamed:
            log(asked, asked._watched.model, loss, mask, 4)  # type: ignore[union-attr]
        found = streamed.result()
        assert found.dampings == pytest.approx(want.dampings, rel=1e-6)
        allowed = 1e-6 * want.scores.abs().amax(dim=1, keepdim=True)
        assert ((found.scores - want.scores).abs() <= allowed).all()


def test_what_passes_without_a_store_refuse(tmp_path: Path) -> None:
    model, loss, mask = SAMPLES["mlp"]()
    run = Run("toy", Config(root_dir=str(tmp_path)))
    watch(run, model, "mlp", None, bias=True)
    with refuse('curvature_passes: setup({"statistic": ...}) comes first', RuntimeError):
        next(run.curvature_passes())
    run.setup({"save": "grad", "statistic": "ekfac"})
    with refuse("curvature_passes: the rows that are saved make the curvature", RuntimeError):
        next(run.curvature_passes())
    run.setup({"statistic": "ekfac"})
    with refuse("or two passes without stored rows, inside `for _ in run.curv", RuntimeError):
        log(run, model, loss, mask, 4)
    with refuse("no example was passed inside `for _ in run.curv", RuntimeError):
        list(run.curvature_passes())
    for _ in run.curvature_passes():
        with (
            refuse("streamed: a pass is open, or passes of another kind", RuntimeError),
            run.streamed(torch.zeros(1, run.layout.dim)),
        ):
            pass
        log(run, model, loss, mask, 4)
    run.finalize()
    assert run.curvature.count == COUNT


# Tokens.

TOKEN_MODES = [mode for mode in SCAN_MODES if mode != "l2"]


def assert_sums(found: InfluenceResult, mask: Tensor) -> None:
    """A document's tokens add up to its score, and masked ones add nothing."""
    assert found.token_scores is not None
    assert len(found.token_scores) == len(found.row_ids)
    for n, (name, shares) in enumerate(zip(found.row_ids, found.token_scores, strict=True)):
        assert shares.shape == (3, mask.shape[1])
        assert shares.dtype == torch.float32
        want = found.scores[:, n]
        allowed = 1e-5 * shares.abs().sum(1)
        assert ((shares.sum(1) - want).abs() <= allowed).all()
        assert (shares[:, mask[IDS.index(name)] == 0] == 0).all()


@pytest.mark.parametrize("mode", TOKEN_MODES)
@pytest.mark.parametrize(("kind", "rank"), [("ekfac", None), ("raw", 3), ("none", 3)])
def test_the_tokens_of_a_document_sum_to_its_score(
    kind: str, rank: int | None, mode: str, tmp_path: Path
) -> None:
    toy = Logged(tmp_path, "gpt", kind, rank)
    assert toy.mask is not None
    with toy.run.streamed(
        toy.queries, mode, tokens=True, ids=["row7", "row2", "row3"], precondition=kind != "none"
    ) as streamed:
        toy.passes()
    found = streamed.result()
    want = toy.attributor().scores(toy.queries, mode).scores[:, [2, 3, 7]]
    assert torch.allclose(found.scores, want, rtol=1e-6)
    assert_sums(found, toy.mask)


@pytest.mark.parametrize("mode", ["dot", "l-relatif"])
def test_the_tokens_in_an_eigenbasis_of_chosen_coordinates(mode: str, tmp_path: Path) -> None:
    model, loss, mask = SAMPLES["gpt"]()
    assert mask is not None
    run = Run("toy", Config(root_dir=str(tmp_path)))
    watch(run, model, "gpt", None, bias=True)
    with run.pilot("eigen", coordinates=700):
        log(run, model, loss, mask, 4)
    run.setup({"save": "grad", "statistic": "diagonal"})
    log(run, model, loss, mask, 4)
    run.finalize()
    run.eval()
    with run(["a", "b", "c"], mask[:3]):
        loss(model, [0, 1, 2]).backward()
    with run.streamed(run.last_rows()[1], mode, tokens=True) as streamed:
        log(run, model, loss, mask, 4)
    found = streamed.result()
    assert list(found.row_ids) == IDS
    assert_sums(found, mask)


def test_tokens_of_gradients_of_any_size(tmp_path: Path) -> None:
    """Far beyond what float32 holds of their squares."""
    toy = Logged(tmp_path, "gpt", "kfac", rank=3)
    assert toy.mask is not None
    ordinary = with_tokens(toy, 1.0)
    for size in (1e-25, 1e25):
        found = with_tokens(toy, size)
        assert_sums(found, toy.mask)
        for mine, theirs in zip(found.token_scores or (), ordinary.token_scores or (), strict=True):
            assert torch.allclose(mine / size, theirs, rtol=1e-4, atol=1e-5)


def with_tokens(toy: Logged, size: float) -> InfluenceResult:
    """The scores of queries `size` times as large."""
    with toy.run.streamed(toy.queries * size, "l-relatif", tokens=True) as streamed:
        toy.passes()
    return streamed.result()


def test_modes_that_are_no_sums_have_no_tokens(toy: Logged) -> None:
    with (
        refuse("tokens: expected another mode than 'l2', which is no sum over them"),
        toy.run.streamed(toy.queries, "l2", tokens=True),
    ):
        pass
