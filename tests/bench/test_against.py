"""The comparison of two copies of the package: what is slower stands first, other bits are said."""

import pytest

from bench import against


def test_the_slowest_stand_first() -> None:
    cells = [
        {"cell": "scores: a", "ratio": 0.5, "bits": "same"},
        {"cell": "scores: b", "ratio": 1.5, "bits": "other"},
        {"cell": "project: c", "ratio": 1.0, "bits": "same"},
    ]
    lines = against.report(cells, worst=2).splitlines()
    assert lines[1].split() == ["scores:", "b", "1.5", "other"]
    assert "project: c" in lines[2]
    assert lines[3] == "all: 3 cells, ratio median 1.000, from 0.500 to 1.500"
    assert lines[-1] == "1 cells with other bits: scores: b"


class Answers:
    """A copy whose calls take so many seconds."""

    def __init__(self, seconds: float, wrong: str | None = None) -> None:
        self.seconds, self.wrong = seconds, wrong
        self.loops: list[int] = []

    def ask(self, what: str, number: int) -> object:
        if what == "make":
            return "toy: ones", self.wrong, "digest", 3
        self.loops.append(number)
        return self.seconds


def test_copies_that_differ_are_timed_again() -> None:
    slow, fast, same = Answers(0.3), Answers(0.1), Answers(0.1)
    found = against.compare([slow, fast], 0, rounds=2)  # type: ignore[list-item]
    assert found["ratio"] == pytest.approx(3)
    assert slow.loops == fast.loops == [3] * 6
    fast.loops.clear()
    found = against.compare([same, fast], 0, rounds=2)  # type: ignore[list-item]
    assert found["ratio"] == pytest.approx(1)
    assert same.loops == fast.loops == [3] * 2
    with pytest.raises(RuntimeError, match="toy: ones: wrong by 1"):
        against.compare([same, Answers(0.1, "wrong by 1")], 0, rounds=2)  # type: ignore[list-item]


@pytest.mark.parametrize("op", ["pack_rows", "attribution", "logging"])
def test_this_copy_against_itself(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    if op == "logging":
        pytest.importorskip("transformers")
    against.main([str(against.ROOT), "--ops", op, "--every", "2", "--rounds", "1"])
    out = capsys.readouterr().out
    assert f"{op}: " in out
    assert "0 cells with other bits" in out
    with pytest.raises(SystemExit, match="PATH: expected a folder with logra_kernels"):
        against.main(["/nowhere"])
