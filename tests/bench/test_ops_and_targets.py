"""The ways of each op agree; the gate, the targets and the pictures say what was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import grid, plots, targets
from bench.harness import results
from bench.harness.cases import DTYPES, Case, Effort, check, measure, publish
from bench.ops import TABLES, gradients, rows, scans

ONE = torch.ones(4)
MIXED = ("fp32", "fp16", "bf16", "mixed")
HALVES = ("fp32", "fp16", "bf16")


def stored(kind: str) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 96), torch.randn(70, 96).to(DTYPES[kind])


CASES: list[Callable[[], Case]] = [
    *(lambda d=d, n=n: gradients.per_sample_gradients(3, 5, 8, d, n)
      for d in MIXED for n in ("full", "masked", "ragged")),
    *(lambda d=d, n=n: gradients.projected_gradients(3, 5, 24, 8, d, n)
      for d in MIXED for n in ("full", "masked", "ragged")),
    *(lambda d=d: gradients.project(7, 40, 8, d) for d in HALVES),
    *(lambda d=d: scans.scores(*stored(d), torch.rand(70) + 0.5, numpy_too=True) for d in HALVES),
    *(lambda d=d: scans.topk_scores(*stored(d), 5) for d in HALVES),
    *(lambda d=d: scans.self_influence(9, 12, d) for d in HALVES),
    *(lambda d=d: rows.covariance_update(9, 12, *d)
      for d in (("fp32", "fp32"), ("fp64", "fp32"), ("fp32", "fp16"), ("fp32", "bf16"))),
    *(lambda u=u: rows.pack_rows(5, 64, u) for u in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_ways_agree(number: int) -> None:
    torch.manual_seed(0)
    case = CASES[number]()
    errors, left_out = check(case)
    assert left_out == {}, case.title
    assert len(errors) >= 2
    assert {name.split()[0] for name in errors} <= {"logra", "torch", "numpy"}


def test_faiss_is_checked_too() -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    queries, fp16 = stored("fp16")
    case = scans.scores(queries, fp16, indexes=scans.faiss_indexes(fp16))
    assert check(case)[1] == {}
    case = scans.scores(queries, fp16, indexes=scans.faiss_indexes(fp16 + 1))
    assert list(check(case)[1]) == ["faiss flat, top 10", "faiss SQfp16, top 10"]


SLOW, FAST, WRONG = (lambda: torch.ones(1 << 21)[:4]), (lambda: ONE), (lambda: ONE * 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "status", "said"),
    [
        (SLOW, FAST, 1, "1 of 2 cells below 0.97"),
        (FAST, SLOW, 0, "0 of 2 cells below 0.97"),
        (WRONG, SLOW, 1, "logra: wrong by 1.0e+00"),
        (FAST, WRONG, 1, "torch: wrong by 1.0e+00"),
    ],
    ids=["loses", "wins", "ours is wrong", "nothing to compare with"],
)
def test_the_gate(
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def case(*calls: Callable[[], Tensor]) -> Case:
        return Case("scores", "ones", dict(zip(("logra", "torch"), calls, strict=True)), ONE, 1e-3)

    cells = [("scores", lambda: case(FAST, SLOW)), ("scores", lambda: case(ours, theirs))]
    monkeypatch.setattr(grid, "cells", lambda: iter(cells))
    for gate in (["--gate"], []):
        assert grid.main([*gate, "--quick", "--ops", "scores"]) == (status if gate else 0)
        out = capsys.readouterr().out
        assert said in out
        first = out.splitlines()[1]  # the worst stands first
        assert ("wrong" in first) == ("wrong" in said)


def test_the_grid_has_cells_of_every_op_and_refuses_others() -> None:
    found = [op for op, _ in grid.cells()]
    assert len(found) == 340
    assert min(found.count(op) for op in TABLES) >= 6
    with pytest.raises(SystemExit):
        grid.main(["--ops", "sorces"])


def test_targets_are_met_or_missed() -> None:
    assert targets.Target("a", 2.0, 2.0).verdict == "met"
    assert targets.Target("a", 2.0, 1.9).verdict == "missed"
    assert targets.Target("a", 1.1, 1.2, at_least=False).verdict == "missed"
    assert targets.Target("a", 2.0, None).verdict == "not measured"


def peers_record(part: str, case: str, **rates: float) -> None:
    """As bench.peers writes them; every call of 10 ms."""
    results.append(
        "peers",
        {
            "case": case,
            "params": {"part": part, "count": {name: rate / 100 for name, rate in rates.items()}},
            "providers": [{"provider": name, "median_ms": 10.0} for name in rates],
        },
    )


def test_targets_from_stored_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    rates = {"logra": 30.0, "LogIX": 10.0, "LogIX, repaired": 25.0}
    peers_record("logging", "logging rows: N=8", **rates)
    peers_record("logging", "logging rows: N=9", logra=25.0, LogIX=10.0, Bergson=20.0)
    ways = {"Bergson FAISS Flat": 5.0, "Bergson, index in memory": 40.0, "logra, top 10": 55.0}
    peers_record("influence", "influence: Q=1, N=9", logra=50.0, **ways)
    for num_queries, share in ((1, 0.8), (16, 0.5)):
        results.append("streaming", {"case": f"Q={num_queries}, N=9", "of_disk": share})
    found = {target.what: target for target in targets.stored()}
    assert found["logging a small LM, over LogIX"].got == 2.5  # the least of its cases
    assert found["logging a small LM, over LogIX"].verdict == "met"
    assert found["logging a small LM, over Bergson"].verdict == "missed"
    assert found["influence pairs/s, over Bergson out of core"].got == pytest.approx(11.0)
    assert found["l-RelatIF pairs/s, over LogIX"].verdict == "not measured"
    assert found["store of three times the page cache, Q=1, of the disk's rate"].got == 0.8


def test_every_target_can_be_measured() -> None:
    """On problems so small that the figures mean nothing."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = targets.Setting(
        *(40, 64, Effort(1, 1, 0.0), (1, 1, 8), (1, 2, 16, 300)), rank=8, width=32, tokens=(2, 8)
    )
    found = [targets.held_scan(small)]
    with torch.no_grad():
        for name in ("scan", "duties", "ops", "logging"):
            found += list(targets.GROUPS[name](small))
    assert len(found) == len({target.what for target in found})
    for target in found:
        if "AMX" in target.what and target.got is None:
            assert target.note == "no AMX here"
        else:
            assert target.got is not None
            assert 0 < target.got < float("inf"), target


@pytest.mark.parametrize("name", plots.PICTURES)
def test_pictures_of_stored_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    plots.main(["--out", str(tmp_path / "images")])
    assert f"{name}.png is left out: there are no results for it" in capsys.readouterr().out
    for num_queries in (1, 4):
        case = scans.scores(torch.randn(num_queries, 32), torch.randn(16, 32).half())
        publish(measure(case, Effort(2, 2)), store=True)
    passes: dict[str, Any] = {"logra": FAST, "floor": FAST}
    logging = Case("logging", "a model, fp32", passes, ONE, 1e-3, params={"model": "llama"})
    publish(measure(logging, Effort(2, 2)), store=True)
    peers_record("l-relatif", "l-RelatIF: Q=16, N=2000, D=4", logra=1e6, LogIX=1e3)
    score = {"bytes a row": 9, "LDS": 0.3, "low": 0.2, "high": 0.4}
    methods = [{"method": name, **score} for name in ("full EKFAC", "eigenbasis", *"abcdefgh")]
    results.append("accuracy", {"case": "a model", "methods": methods})
    plots.main(["--out", str(tmp_path / "images")])
    assert (tmp_path / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
