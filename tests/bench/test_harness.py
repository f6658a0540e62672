"""The harness: what is wrong is not timed, what loses is said, what is stored can be read."""

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
from bench.harness import results
from bench.harness.cases import Case, Effort, check, measure, publish, time_in_turns
from bench.harness.tables import table
from logra_kernels import ops

ONE = torch.ones(4)
QUICK = Effort(2, 2)


def case(**providers: Callable[[], Any]) -> Case:
    return Case("toy", "ones", dict(providers), ONE, rtol=1e-3, our_rtol=1e-6, params={"N": 4})


def slowly(seconds: float = 0.01) -> Tensor:
    time.sleep(seconds)
    return ONE


class Counted:
    def __init__(self, result: Any = None) -> None:
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
    wrong: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = Counted(wrong), Counted(ONE)
    record = measure(case(logra=good, bad=bad), QUICK)
    assert bad.calls == 1  # the check
    assert good.calls > 3
    assert list(results.medians_ms(record)) == ["logra"]
    assert record["providers"][0]["x_best"] is None
    publish(record, store=False)
    assert "bad is not timed: wrong by" in capsys.readouterr().out


def test_ours_is_held_to_its_own_tolerance_and_other_results_to_their_own_check() -> None:
    nearly = ONE * (1 + 1e-4)
    one = case(logra=lambda: nearly, torch=lambda: nearly, top=lambda: torch.ones(2))
    one.errors = {"top": lambda got: float((got - 1).abs().max())}
    errors, left_out = check(one)
    assert errors == {"torch": pytest.approx(1e-4, rel=1e-2), "top": 0}
    assert left_out == {"logra": "wrong by 1.0e-04, 1e-06 allowed"}
    one.providers["top"] = lambda: torch.zeros(2)
    assert list(check(one)[0]) == ["torch"]


def test_what_solves_another_problem_is_no_rival() -> None:
    one = case(logra=lambda: ONE, torch=slowly, floor=lambda: ONE)
    one.apart = frozenset({"floor"})
    record = measure(one, QUICK)
    ratios = {row["provider"]: row["x_best"] for row in record["providers"]}
    assert record["best"] == "torch"
    assert ratios["logra"] > 10  # against torch, which sleeps
    assert set(ratios) == {"logra", "torch", "floor"}


def test_every_provider_is_sampled_and_what_comes_before_is_not_timed() -> None:
    short, before = Counted(), Counted()
    calls: dict[str, Callable[[], Any]] = {"short": short, "long": lambda: time.sleep(0.02)}
    times = time_in_turns(calls, Effort(3, 6, 0.01))
    assert 3 <= len(times["short"]) <= 6
    assert 2 <= len(times["long"]) <= 3  # beyond its budget: the least, or two if far beyond
    assert short.calls > 100  # repeated until a sample takes 5 ms

    def evict() -> None:
        time.sleep(0.01)
        before()

    short.calls = 0
    times = time_in_turns({"short": short}, Effort(3, 3), evict)
    assert before.calls == short.calls == 5  # one call a sample, and two to see how long it takes
    assert max(times["short"]) < 0.005


def test_json_lines_carry_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    publish(measure(case(logra=lambda: ONE, torch=lambda: ONE), QUICK), store=True)
    publish(measure(case(logra=lambda: ONE), QUICK), store=True)
    text = (tmp_path / "toy.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["machine"]["threads"] == torch.get_num_threads()
        assert {"cpu", "flags", "memory_gib", "kernel", "commit"} <= set(line["machine"])
        assert line["date"].endswith("+00:00")
        assert line["params"] == {"N": 4}
        assert line["limits"]["read_gb_per_s"] > 0  # measured in turns with the providers
    for secret in (socket.gethostname(), str(Path.home()), str(results.ROOT)):
        assert secret not in text
    (newest,) = results.latest("toy")
    assert list(results.medians_ms(newest)) == ["logra"]  # of the second run
    assert results.read("nothing") == []


def test_results_are_json_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.append("bad", {"case": "x", "value": float("nan")})
    assert not (tmp_path / "bad.jsonl").exists()
    results.append("bad", {"case": "x"})
    for line, said in (("{half a li", "2: not JSON"), ("{}", "2: expected an object with date")):
        (tmp_path / "bad.jsonl").write_text(f'{{"date": "", "machine": ""}}\n{line}\n')
        with pytest.raises(ValueError, match=f"bad.jsonl:{said}"):
            results.read("bad")


def test_stored_results_can_be_read() -> None:
    for path in sorted(results.RESULTS.glob("*.jsonl")):
        assert results.read(path.stem), path.name


def test_a_table_has_a_column_for_each_key_with_a_value() -> None:
    rows = [{"name": "a", "ms": 1234.5, "none": None}, {"name": "long", "error": 2e-7}]
    assert table(rows).splitlines() == [
        "name     ms  error",
        "a     1,234",
        "long         2e-07",
    ]


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
    ran: list[tuple[Any, ...]] = []
    monkeypatch.setattr(parts, "run_cases", lambda cases, args: ran.append((args.threads,)))
    monkeypatch.setattr(parts, "CASES", {"good": lambda quick: iter(()), "lost": lambda quick: 0})
    modules = {"peers": ("bench.peers", ()), "bad": ("bench.bad", ("threads", "json"))}
    monkeypatch.setattr(parts, "MODULES", modules)
    monkeypatch.setattr(parts, "NEEDS", {"lost": "no_such_library"})
    monkeypatch.setattr(parts, "PEERS_PYTHON", Path("/nowhere/python"))
    assert parts.main(["--quick", "--threads", "2"]) == 0
    assert ran == [(2,)]
    assert "lost is left out: no_such_library is not installed" in capsys.readouterr().out

    class Ended:
        returncode = 1

    def failing(command: list[str], cwd: Path) -> Ended:
        ran.append(tuple(command[1:]))
        return Ended()

    monkeypatch.setattr(subprocess, "run", failing)
    assert parts.main(["--full", "--json", "--threads", "2", "--rounds", "9"]) == 1
    assert ran[-1] == ("-m", "bench.bad", "--threads", "2", "--json")  # no option that it lacks
    out = capsys.readouterr().out
    assert "peers is left out: the peers are not installed" in out
    assert out.endswith("failed: bad\n")
    with pytest.raises(SystemExit):
        parts.main(["godo"])
    assert "no part godo" in capsys.readouterr().err
