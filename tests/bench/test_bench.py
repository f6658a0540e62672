"""The benches: what is wrong is not timed, what loses is said, what is stored can be read."""

import argparse
import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bench.__main__ as parts
from bench import grid, plots, targets
from bench.harness import limits, results
from bench.harness.cases import Case, Held, check, every_isa, run_case, time_providers
from bench.harness.limits import Limits
from bench.ops import (
    covariance_update,
    pack_rows,
    per_sample_gradients,
    project,
    projected_gradients,
    scores,
    self_influence,
    topk_scores,
)
from logra_kernels import ops

LIMITS = Limits(40.0, 250.0, 100.0, 400.0, None)
ONE = torch.ones(4)


def case(**providers: Callable[[], Any]) -> Case:
    return Case(
        "toy",
        "ones",
        dict(providers),
        ONE,
        rtol=1e-3,
        our_rtol=1e-6,
        num_bytes=16.0,
        flops=4.0,
        params={"N": 4},
    )


def arguments(**changed: Any) -> argparse.Namespace:
    given = {"quick": True, "threads": None, "rounds": 2, "isas": False, "json": True}
    return argparse.Namespace(**{**given, **changed})


def slowly(seconds: float) -> Tensor:
    time.sleep(seconds)
    return ONE


class Counted:
    def __init__(self, result: Any) -> None:
        self.result, self.calls = result, 0

    def __call__(self) -> Any:
        self.calls += 1
        return self.result


@pytest.mark.parametrize(
    "wrong",
    [ONE * 1.01, ONE * torch.nan, ONE * torch.inf, torch.ones(5), torch.ones(4, 1)],
    ids=["off", "nan", "inf", "longer", "other shape"],
)
def test_a_wrong_provider_is_reported_and_not_timed(
    wrong: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = Counted(wrong), Counted(ONE)
    rows = run_case(case(logra=good, bad=bad), LIMITS, arguments(), tmp_path)
    assert bad.calls == 1  # the check
    assert good.calls > 3
    assert [row.provider for row in rows] == ["logra"]
    assert rows[0].x_best is None
    assert "bad                          not timed: wrong by" in capsys.readouterr().out
    (record,) = results.read("toy", tmp_path)
    assert list(record["left_out"]) == ["bad"]


def test_ours_is_held_to_its_own_tolerance() -> None:
    nearly = ONE * (1 + 1e-4)
    good, errors, left_out = check(case(logra=lambda: nearly, torch=lambda: nearly))
    assert list(good) == ["torch"]
    assert errors["torch"] == pytest.approx(1e-4, rel=1e-2)
    assert left_out == {"logra": "wrong by 1.0e-04, 1e-06 allowed"}


def test_a_provider_with_another_result_has_a_check_of_its_own() -> None:
    one = case(logra=lambda: ONE, top=lambda: torch.ones(2))
    one.errors = {"top": lambda got: float((got - 1).abs().max())}
    assert list(check(one)[0]) == ["logra", "top"]
    one.providers["top"] = lambda: torch.zeros(2)
    assert list(check(one)[0]) == ["logra"]


def test_what_solves_another_problem_is_no_rival(tmp_path: Path) -> None:
    one = case(logra=lambda: ONE, torch=lambda: slowly(0.01), floor=lambda: ONE)
    one.apart = frozenset({"floor"})
    rows = {row.provider: row for row in run_case(one, LIMITS, arguments(), tmp_path)}
    assert rows["logra"].x_best is not None
    assert rows["logra"].x_best > 10  # against torch, which sleeps
    assert set(rows) == {"logra", "torch", "floor"}


def test_every_provider_is_sampled() -> None:
    short = Counted(None)
    calls: dict[str, Callable[[], Any]] = {"short": short, "long": lambda: time.sleep(0.02)}
    times = time_providers(calls, 3, 6, budget_s=0.01)
    assert 3 <= len(times["short"]) <= 6
    assert 2 <= len(times["long"]) <= 3  # beyond its budget: the least, or two if far beyond
    assert short.calls > 100  # repeated until a sample takes 5 ms


@pytest.mark.usefixtures("native")
def test_instruction_sets_are_put_back() -> None:
    before = ops.isa()
    seen: list[str | None] = []

    def call() -> Tensor:
        seen.append(ops.isa())
        return ONE

    providers = every_isa({"logra": call})
    assert [one.isa for one in providers.values() if isinstance(one, Held)] == (
        ops.available_isas()
    )
    check(case(**providers))
    assert seen == ops.available_isas()
    assert ops.isa() == before
    with pytest.raises(ZeroDivisionError):
        check(case(a=Held(lambda: 1 // 0, ops.available_isas()[0])))
    assert ops.isa() == before


def test_json_lines_carry_the_machine(tmp_path: Path) -> None:
    run_case(case(logra=lambda: ONE, torch=lambda: ONE), LIMITS, arguments(), tmp_path)
    run_case(case(logra=lambda: ONE), LIMITS, arguments(), tmp_path)
    text = (tmp_path / "toy.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 2
    for line in lines:
        machine = line["machine"]
        assert machine["threads"] == torch.get_num_threads()
        assert machine["torch"] == torch.__version__
        assert {"cpu", "flags", "cpus", "memory_gib", "kernel", "compiler", "commit"} <= set(
            machine
        )
        assert line["date"].endswith("+00:00")
        assert line["params"] == {"N": 4}
        assert line["limits"]["read_gb_per_s"] > 0  # measured in turns with the providers
        assert line["limits"]["sgemm_gflop_per_s"] == 100.0
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[2]) not in text
    (newest,) = results.latest("toy", tmp_path)
    assert (results.median_ms(newest, "logra") or 0) > 0
    assert results.median_ms(newest, "torch") is None  # of the second run, which had none
    assert results.read("nothing", tmp_path) == []


def test_results_are_json_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.append("bad", {"case": "x", "value": float("nan")}, tmp_path)
    assert not (tmp_path / "bad.jsonl").exists()
    results.append("bad", {"case": "x"}, tmp_path)
    with open(tmp_path / "bad.jsonl", "a") as file:
        file.write("{half a li\n")
    with pytest.raises(ValueError, match=r"bad.jsonl:2: not JSON"):
        results.read("bad", tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"case": "x"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: expected an object with date and machine"):
        results.read("bad", tmp_path)


def test_stored_results_can_be_read() -> None:
    for path in sorted(results.RESULTS.glob("*.jsonl")):
        assert results.read(path.stem), path.name


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "measure", lambda rounds=7: LIMITS)


SLOW, FAST, WRONG = (lambda: slowly(0.004)), (lambda: ONE), (lambda: ONE * 2)


@pytest.mark.usefixtures("quick_limits")
@pytest.mark.parametrize(
    ("ours", "theirs", "gate", "status", "said"),
    [
        (SLOW, FAST, ["--gate"], 1, "1 of 2 cells below 0.97"),
        (SLOW, FAST, [], 0, "1 of 2 cells below 0.97"),
        (FAST, SLOW, ["--gate"], 0, "0 of 2 cells below 0.97"),
        (WRONG, SLOW, ["--gate"], 1, "logra: wrong by 1.0e+00"),
        (FAST, WRONG, ["--gate"], 1, "torch: wrong by 1.0e+00"),
    ],
    ids=["loses", "loses, no gate", "wins", "ours is wrong", "nothing to compare with"],
)
def test_the_gate(
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    gate: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    builds = [
        ("toy", lambda: case(logra=FAST, torch=SLOW)),
        ("toy", lambda: case(logra=ours, torch=theirs)),
    ]
    args = grid.parse([*gate, "--json", "--rounds", "5", "--budget", "0.01"])
    assert grid.run(builds, args, tmp_path) == status
    out = capsys.readouterr().out
    assert said in out
    table = [line for line in out.splitlines() if "toy: ones" in line and "median" not in line]
    assert table[0].startswith("!") == (said[0] != "0")  # the worst first
    (record,) = results.read("grid", tmp_path)
    assert [cell["title"] for cell in record["cells"]] == ["ones", "ones"]


def test_both_sides_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(command: list[str], env: dict[str, str], cwd: Path) -> Any:
        seen.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(ops, "available_isas", lambda: ["baseline", "avx2"])
    assert grid.main(["--hold", "avx2", "--gate", "--ops", "scores"]) == 3
    assert seen["command"][1:] == [
        *("-m", "bench.grid", "--hold", "avx2", "--gate", "--ops", "scores", "--held", "avx2")
    ]
    assert seen["env"]["LOGRA_ISA"] == "avx2"
    assert seen["env"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert seen["env"]["ATEN_CPU_CAPABILITY"] == "avx2"
    seen.clear()
    assert grid.main(["--hold", "avx512"]) == 0  # this machine has none: it is said, not failed
    assert not seen


def test_the_grid_has_cells_of_every_op_and_refuses_others() -> None:
    numbers = dict.fromkeys(grid.OPS, 0)
    for op, _ in grid.cells():
        numbers[op] += 1
    assert min(numbers.values()) >= 6
    with pytest.raises(SystemExit):
        grid.parse(["--ops", "sorces"])
    with pytest.raises(SystemExit):
        grid.parse(["--part", "3/2"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "mixed"])
@pytest.mark.parametrize("lengths", ["full", "masked", "ragged"])
def test_the_ways_agree_on_gradients(dtype: str, lengths: str) -> None:
    torch.manual_seed(0)
    for one in (
        per_sample_gradients.case(3, 5, 8, dtype, lengths),
        projected_gradients.case(3, 5, 24, 8, dtype, lengths),
    ):
        good, _, left_out = check(one)
        assert left_out == {}
        assert {name.split()[0] for name in good} == {"logra", "torch"}


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_the_ways_agree_on_scans(kind: str) -> None:
    torch.manual_seed(0)
    rows, queries = torch.randn(70, 96).to(getattr(torch, kind)), torch.randn(3, 96)
    for one in (
        scores.case(queries, rows, torch.rand(70) + 0.5, numpy_too=True),
        topk_scores.case(queries, rows, 5),
    ):
        good, _, left_out = check(one)
        assert left_out == {}
        assert len(good) >= 2


def test_faiss_is_checked_too() -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    rows, queries = torch.randn(70, 96).half(), torch.randn(3, 96)
    one = scores.case(queries, rows, index=scores.Faiss(rows))
    assert check(one)[2] == {}
    one = scores.case(queries, rows, index=scores.Faiss(rows + 1))
    assert list(check(one)[2]) == ["faiss flat, top 10", "faiss SQfp16, top 10"]


def test_the_ways_agree_on_the_rest() -> None:
    torch.manual_seed(0)
    cases = [project.case(7, 40, 8, dtype) for dtype in ("fp32", "fp16", "bf16")]
    cases += [covariance_update.case(9, 12, dtype) for dtype in ("fp32", "fp64")]
    cases += [covariance_update.case(9, 12, "fp32", rows) for rows in ("fp16", "bf16")]
    cases += [self_influence.case(9, 12, dtype) for dtype in ("fp32", "fp16", "bf16")]
    cases += [pack_rows.case(5, 64, unpack) for unpack in (False, True)]
    for one in cases:
        good, _, left_out = check(one)
        assert left_out == {}, one.title
        assert len(good) >= 2


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 5000])
def test_every_number_is_read(count: int) -> None:
    data = torch.arange(count, dtype=torch.float32) % 7
    for isa in ops.available_isas():
        before = ops.isa()
        ops.set_isa(isa)
        try:
            assert ops.limits.read_all(data) == data.double().sum()  # all exact
            assert 0.9e6 <= ops.limits.multiply(1e6) / torch.get_num_threads() <= 1e6
        finally:
            ops.set_isa(str(before))


def test_a_part_that_fails_or_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[argparse.Namespace] = []
    monkeypatch.setattr(parts, "run_cases", lambda cases, args: ran.append(args))
    monkeypatch.setattr(
        parts,
        "PARTS",
        (
            parts.Part("good", "", "bench.ops.project"),
            parts.Part("lost", "", "bench.no_such_module"),
            parts.Part("peers", "", "bench.peers", parts.FULL),
            parts.Part("bad", "", "bench.peers.setting", parts.FULL),
        ),
    )
    commands: list[list[str]] = []

    def failing(command: list[str], cwd: Path) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", failing)
    monkeypatch.setattr(parts, "PEERS_PYTHON", Path("/nowhere/python"))
    assert parts.main(["--quick", "--threads", "2"]) == 0
    assert [(args.quick, args.threads) for args in ran] == [(True, 2)]
    assert "lost is left out: there is no bench.no_such_module" in capsys.readouterr().out
    assert parts.main(["--full", "--json"]) == 1
    out = capsys.readouterr().out
    assert "peers is left out: the peers are not installed" in out
    assert out.endswith("failed: bad\n")
    assert [command[1:] for command in commands] == [["-m", "bench.peers.setting", "--json"]]
    with pytest.raises(SystemExit):
        parts.main(["godo"])
    assert "no part godo" in capsys.readouterr().err


def test_targets_are_met_or_missed() -> None:
    assert targets.Target("a", 2.0, 2.0).verdict == "met"
    assert targets.Target("a", 2.0, 1.9).verdict == "missed"
    assert targets.Target("a", 1.1, 1.2, at_least=False).verdict == "missed"
    assert targets.Target("a", 2.0, None).verdict == "not measured"


def peers_record(folder: Path, part: str, case: str, **rates: float) -> None:
    """As bench.peers writes them; every call of 10 ms."""
    results.append(
        "peers",
        {
            "case": case,
            "params": {"part": part, "count": {name: rate / 100 for name, rate in rates.items()}},
            "providers": [{"provider": name, "median_ms": 10.0} for name in rates],
        },
        folder,
    )


def test_targets_from_stored_results(tmp_path: Path) -> None:
    rates = {"logra": 30.0, "LogIX": 10.0, "LogIX, repaired": 25.0}
    peers_record(tmp_path, "logging", "logging rows: N=8", **rates)
    peers_record(tmp_path, "logging", "logging rows: N=9", logra=25.0, LogIX=10.0, Bergson=20.0)
    ways = {"Bergson FAISS Flat": 5.0, "Bergson, index in memory": 40.0, "logra, top 10": 55.0}
    peers_record(tmp_path, "influence", "influence: Q=1, N=9", logra=50.0, **ways)
    found = {target.what: target for target in targets.stored(tmp_path)}
    assert found["logging a small LM, over LogIX"].got == 2.5  # the least of its cases
    assert found["logging a small LM, over LogIX"].verdict == "met"
    assert found["logging a small LM, over Bergson"].verdict == "missed"
    assert found["influence pairs/s, over Bergson out of core"].got == pytest.approx(11.0)
    assert found["l-RelatIF pairs/s, over LogIX"].verdict == "not measured"


@pytest.mark.parametrize("name", plots.PICTURES)
def test_pictures_of_stored_results(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    plots.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "images")])
    assert f"{name}.png is left out: there are no results for it" in capsys.readouterr().out
    rows = torch.randn(16, 32).half()
    for num_queries in (1, 4):
        one = scores.case(torch.randn(num_queries, 32), rows, numpy_too=True)
        run_case(one, LIMITS, arguments(), tmp_path)
    logging = case(logra=FAST, floor=FAST)
    logging.op = "logging"
    run_case(logging, LIMITS, arguments(), tmp_path)
    peers_record(tmp_path, "l-relatif", "l-RelatIF: Q=16, N=2000, D=4", logra=1e6, LogIX=1e3)
    plots.main(["--results", str(tmp_path), "--out", str(tmp_path / "images")])
    picture = (tmp_path / "images" / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 5_000 < len(picture) < plots.MOST_BYTES
    assert f"{name}.png: {len(picture):,} bytes\n" in capsys.readouterr().out


def test_every_target_can_be_measured() -> None:
    """On problems so small that the figures mean nothing."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = targets.Setting(
        num_rows=40,
        dim=64,
        rounds=1,
        budget_s=0.0,
        logging=(1, 1, 8),
        rank=8,
        width=32,
        tokens=(2, 8),
    )
    found = [targets.held_scan(small)]
    with torch.no_grad():
        for name in ("scan", "duties", "ops", "logging"):
            found += list(targets.GROUPS[name](small, LIMITS))
    assert len(found) == len({target.what for target in found})
    for target in found:
        assert target.got is None or 0 < target.got < float("inf"), target
        assert (target.got is None) == ("AMX" in target.what), target  # LIMITS has none
        assert target.what in targets.line(target)
