"""The search and the rewriting of the table, with a measure that needs no GPU."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from logra_kernels.triton import heuristics, launch
from tools import tune

PROBLEMS = list(tune.problems_to_measure())
SCANS = [p for p in PROBLEMS if p.op == "scores"]
TABLE = json.loads(heuristics.PATH.read_text())


class Fake:
    """A measure that knows the best tiles, refuses some, and stops after so many calls."""

    def __init__(self, best: dict[str, int], stop_after: int = 10**9) -> None:
        self.best, self.left = best, stop_after
        self.calls: list[str] = []

    def __call__(self, problem: tune.Problem, config: tune.Config) -> float | str:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.calls.append(problem.name)
        if config["num_warps"] == 8 and config["num_stages"] == 4:
            return "_scores_kernel: spills: 3, 16 bytes of stack"
        return 1.0 + sum(abs(config[name] - value) for name, value in self.best.items()) / 64


def silent(text: str) -> None:
    pass


def test_the_table_is_good() -> None:
    assert heuristics.problems(TABLE) == []
    assert heuristics.dumps(TABLE) == heuristics.PATH.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scores"), "scores: no rules"),
        (lambda t: t.update(other={}), "other: not an op"),
        (lambda t: t["scores"].pop("default"), "scores: no rules for the default"),
        (lambda t: t["scores"]["default"].pop(0), None),
        (lambda t: t["scores"]["default"].pop(1), "no rule for every size of half"),
        (lambda t: t["project"]["default"].pop(0), "no rule for half"),
        (
            lambda t: t["scores"]["default"][0]["config"].update(DIM=32),
            "DIM of half would depend on a size that a split into calls changes",
        ),
        (lambda t: t["scores"]["default"][1].update(up_to={"rows": 3}), "its rules know the sizes"),
        (lambda t: t["project"]["default"][0]["config"].update(RANK=48), "RANK: expected a power"),
        (lambda t: t["project"]["default"][0]["config"].pop("RANK"), "in config, got"),
        (lambda t: t["project"]["default"][0].update(types="int8"), "expected types of"),
        (
            lambda t: t["projected_gradients"]["default"][0]["config"].update(CHUNK=32),
            "expected a multiple of BLOCK",
        ),
    ],
)
def test_a_bad_table_is_noticed(change: Any, message: str | None) -> None:
    table = copy.deepcopy(TABLE)
    change(table)
    found = heuristics.problems(table)
    assert (not found) if message is None else any(message in problem for problem in found), found


def test_rules_are_found_by_architecture_types_and_sizes() -> None:
    few = heuristics.choose("scores", "half", "sm_90", queries=16)
    assert few == heuristics.choose("scores", "half", "sm_90", queries=1)
    assert few["QUERIES"] == 16
    assert heuristics.choose("scores", "half", "sm_90", queries=17)["QUERIES"] > 16
    unknown = heuristics.choose("projected_gradients", "half", "sm_86", rank=64)
    assert unknown == TABLE["projected_gradients"]["default"][0]["config"]
    known = heuristics.choose("projected_gradients", "half", "sm_90", rank=64)
    assert known == TABLE["projected_gradients"]["sm_90"][0]["config"]
    assert heuristics.choose("projected_gradients", "full", "sm_103", rank=64) == (
        heuristics.choose("projected_gradients", "full", "sm_100", rank=64)
    )
    assert heuristics.choose("projected_gradients", "full", "sm_120", rank=64) == (
        heuristics.choose("projected_gradients", "full", "sm_80", rank=64)
    )
    known["BLOCK"] = 0  # the caller has a copy
    assert heuristics.choose("projected_gradients", "half", "sm_90", rank=64)["BLOCK"]


def test_the_fastest_is_written_and_the_rest_stays(tmp_path: Path) -> None:
    fake = Fake({"ROWS": 128, "QUERIES": 32, "DIM": 32, "num_warps": 8, "num_stages": 2})
    results = tune.search(SCANS, fake, tmp_path / "state.json", silent)
    table = tune.rewritten(TABLE, "sm_90", SCANS, results)
    rules = table["scores"]["sm_90"]
    want = {"ROWS": 128, "QUERIES": 32, "DIM": 32, "num_warps": 8, "num_stages": 2}
    assert [rule.get("up_to") for rule in rules if rule["types"] == "half"] == [
        {"queries": 16},
        None,
    ]
    assert rules[0]["config"] == want | {"QUERIES": 16}
    assert rules[1]["config"] == want
    assert {rule["types"] for rule in rules} == set(heuristics.TYPES)
    assert table["scores"]["default"] == TABLE["scores"]["default"]
    assert {op: rules for op, rules in table.items() if op != "scores"} == {
        op: rules for op, rules in TABLE.items() if op != "scores"
    }
    assert heuristics.problems(table) == []


def test_few_and_many_queries_get_one_order_of_summation() -> None:
    """Up to 16 queries are faster with DIM 64, more queries with DIM 32 and by a larger factor."""
    few, many = (p for p in SCANS if p.types == "half")

    def config(dim: int, queries: int) -> str:
        tiles = {"ROWS": 128, "QUERIES": queries, "DIM": dim}
        return json.dumps(tiles | {"num_warps": 4, "num_stages": 3})

    results: tune.Results = {
        few.name: {config(64, 16): 1.0, config(32, 16): 1.1, config(128, 16): "spills"},
        many.name: {config(64, 64): 3.0, config(32, 64): 2.0, config(128, 64): 1.0},
    }
    table = tune.rewritten(TABLE, "sm_90", [few, many], results)
    half = [rule for rule in table["scores"]["sm_90"] if rule["types"] == "half"]
    assert [rule["config"]["DIM"] for rule in half] == [32, 32]
    # Types that were not measured keep their rules.
    assert {r["types"] for r in table["scores"]["sm_90"]} == set(heuristics.TYPES)


def test_nothing_usable_leaves_the_rules(tmp_path: Path) -> None:
    results = tune.search(
        SCANS[:2], lambda problem, config: "does not compile: X", tmp_path / "s", silent
    )
    assert tune.rewritten(TABLE, "sm_90", SCANS[:2], results) == TABLE


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    said: list[str] = []
    first = Fake({"DIM": 64}, stop_after=25)
    with pytest.raises(KeyboardInterrupt):
        tune.search(SCANS, first, state, said.append)
    second = Fake({"DIM": 64})
    results = tune.search(SCANS, second, state, said.append)
    total = sum(len(list(tune.candidates(problem))) for problem in SCANS)
    assert len(first.calls) == 25
    assert len(first.calls) + len(second.calls) == total == len(said)
    assert said[0].startswith(f"[1/{total}, 0 s] scores, half, queries <= 16 {{")
    assert said[0].endswith(" ms")
    assert results == json.loads(state.read_text())


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_every_problem_launches_what_it_tunes(problem: tune.Problem) -> None:
    """On tensors without memory: the kernel of the op is there, with the tiles that are tried."""
    ours, _ = problem.make("meta")
    tried = next(iter(tune.candidates(problem)))

    def launched() -> list[dict[str, int]]:
        with launch.recording("sm_90") as launches:
            ours()
        name = tune.KERNELS[problem.op]
        return [one.config for one in launches if one.kernel.__name__ == name]

    with launch.trying(problem.op, tried):
        assert {config["num_warps"] for config in launched()} == {tried["num_warps"]}
    if problem.types is not None:
        (rule,) = (
            rule
            for rule in TABLE[problem.op].get("sm_90", TABLE[problem.op]["default"])
            if rule["types"] == problem.types and rule.get("up_to", {}) == problem.up_to
        )
        assert launched()[0]["num_stages"] == rule["config"]["num_stages"]


def test_candidates() -> None:
    for problem in PROBLEMS:
        configs = list(tune.candidates(problem))
        assert len({json.dumps(config) for config in configs}) == len(configs) > 3
        wanted = {*heuristics.TILES[problem.op], *heuristics.OPTIONS}
        assert all(set(config) == wanted for config in configs)
    assert all(c["QUERIES"] == 16 for c in tune.candidates(SCANS[0]))


def test_a_wrong_result_is_refused() -> None:
    want = [torch.ones(3)]
    assert not tune.wrong([torch.ones(3) + 1e-4], want, rounded=False)
    assert tune.wrong([torch.ones(3) + 5e-3], want, rounded=False).startswith("wrong: off by 0.005")
    assert not tune.wrong([torch.ones(3) + 5e-3], want, rounded=True)
    assert tune.wrong([torch.full((3,), torch.nan)], want, rounded=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "tune: needs a GPU that torch can use, found none\n"
