"""The parts of bench.gpu.speed, which runs on a GPU, on the CPU with a made-up clock."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from bench.gpu import speed
from bench.gpu.report import GPUS, problems
from tools.timing import Timer

ROOT = Path(__file__).parents[2]


class Clock(Timer):
    """Calls once; everything takes a millisecond."""

    def __init__(self) -> None:
        self.calls = 0

    def median_s(self, call: Callable[[], Any]) -> float:
        self.calls += 1
        call()
        return 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "bench.gpu.speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "gpu_bench: torch finds no GPU here; nothing was measured"


def test_limits_count_both_ways_of_a_copy() -> None:
    limits = speed.measure_limits(Clock(), "cpu", 1 << 20)
    assert limits.copy_bytes_per_s == 2 * (1 << 20) / 1e-3
    assert limits.matrix_flop_per_s == 2 * 256**3 / 1e-3


def test_logging_runs_every_provider() -> None:
    rows = list(speed.logging(Clock(), "cpu", True))
    assert [one.provider for one in rows] == [
        "logra",
        "forward + activation gradients",
        "full backward",
    ]
    assert rows[0].note == "1.000 of the floor, 32000 tokens/s"


def test_torchs_ways_are_the_reference() -> None:
    """What a user of torch would write gives what the op is defined to give."""
    from logra_kernels import reference

    queries, rows, scale = torch.randn(3, 16), torch.randn(40, 16), torch.rand(40)
    x, proj, mask = torch.randn(2, 5, 16), torch.randn(4, 16), torch.rand(2, 5) < 0.7
    cases: dict[str, tuple[list[Any], torch.Tensor]] = {
        "scores": ([queries, rows, scale], reference.scores(queries, rows, scale)),
        "topk_scores": (
            [queries, rows, 4, scale],
            reference.topk_scores(queries, rows, 4, scale)[0],
        ),
        "self_influence": ([rows, queries], reference.self_influence(rows, queries)),
        "projected_gradients": (
            [x, x, proj, proj, mask],
            reference.projected_gradients(x, x, proj, proj, mask),
        ),
    }
    for name, (arguments, wanted) in cases.items():
        way = speed.plain_torch(name, arguments)
        assert way is not None
        assert speed.checked(way(), wanted, "") < 1e-5, name
    wrong = cases["scores"][1] * 1.1
    assert speed.checked(wrong, cases["scores"][1], "") > speed.TOLERANCE


def test_an_op_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(queries: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if rows.device.type == "meta":
            real_scores(queries, rows, scale)
            return rows
        return torch.zeros(queries.shape[0], rows.shape[0])

    real_scores = next(call for _, call in problems()).func  # type: ignore[attr-defined]
    meta = partial(torch.empty, device="meta")
    call = partial(scores, meta(1, 64), meta(100, 64, dtype=torch.half), meta(100))
    monkeypatch.setattr(speed, "problems", lambda: iter([("one", call)]))
    limits = speed.Limits(1e12, 1e15)
    with pytest.raises(AssertionError, match="one: off by"):
        list(speed.ops(Clock(), "cpu", limits, None))


def test_gpus_are_found_by_name() -> None:
    assert speed.known("NVIDIA H100 80GB HBM3") is next(g for g in GPUS if g.name == "H100")
    assert speed.known("NVIDIA GeForce RTX 4090") is None
