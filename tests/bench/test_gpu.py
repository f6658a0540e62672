"""bench.gpu, which runs on a GPU: its comparisons and its arithmetic, on the CPU."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from bench.gpu import check, report, speed
from bench.harness.results import ROOT
from tools.timing import Timer


class Clock(Timer):
    """Calls once; everything takes a millisecond."""

    def __init__(self) -> None:
        pass

    def median_s(self, call: Callable[[], Any]) -> float:
        call()
        return 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["check", "speed"])
def test_without_a_gpu_it_says_so(name: str) -> None:
    command = [sys.executable, "-m", f"bench.gpu.{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "torch finds no GPU here: nothing was done"


def test_a_wrong_result_fails(capsys: pytest.CaptureFixture[str]) -> None:
    exact = torch.ones(2, 3)
    check.near("near", exact * (1 + 1e-4), exact, 2e-4)
    for wrong in (exact * (1 + 3e-4), exact * torch.nan):
        with pytest.raises(AssertionError, match=r"far: .* times its bound"):
            check.near("far", wrong, exact, 2e-4)
    check.same("equal", (exact, exact), [exact, exact])

    def differs(device: str) -> None:
        check.same("scores", exact, exact * (1 + 2.0**-23))

    assert check.run_check("splits", differs, "cpu") == "AssertionError: scores: other bits"
    assert "FAILED" in capsys.readouterr().out


def test_rows_and_scores_of_two_devices_are_compared() -> None:
    assert check.run_check("end to end", check.end_to_end, "cpu") is None  # here both are the CPU


@pytest.mark.slow
def test_the_splits_call_the_kernels_rightly() -> None:
    """Under the interpreter, whose products' bits depend on where a row stands: nearly equal."""
    program = """
from unittest.mock import patch
import torch
from bench.gpu import check
seen = []
with patch.object(check, "same", lambda *given: seen.append(given)):
    check.splits("cpu", (torch.float16,), 90, 32, 20, 32)
for what, one, other in seen:
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (one, other))):
        assert torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-2), what
print(len(seen))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "11", done.stderr


def test_limits_count_both_ways_of_a_copy() -> None:
    limits = speed.Limits.measure(Clock(), "cpu", 1 << 20, 256)
    assert limits.copy_gb_per_s == pytest.approx(2 * (1 << 20) / 1e6)
    assert limits.product_gflop_per_s == pytest.approx(2 * 256**3 / 1e6)


def test_every_case_of_the_gpu_is_checked_and_timed() -> None:
    """Small, on the CPU: the bytes and FLOP of a case over the limits."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    records = list(speed.run("cpu", Clock(), speed.Limits(2.0, 4.0), True))
    assert {record["case"].split(":")[0] for record in records} >= {"scores", "logging"}
    for record in records:
        assert record["left_out"] == {}
        ours, *rivals = record["providers"]
        assert ours["provider"] == "logra"
        assert rivals
        assert ours["of_copy"] == ours["gb_per_s"] / 2
        assert ours["of_product"] == ours["gflop_per_s"] / 4


def test_a_scan_moves_its_rows_once() -> None:
    h100 = next(gpu for gpu in report.GPUS if gpu.name == "H100")
    problem = next(one for one in report.problems() if "Q=64" in one.name)
    found = report.bound(h100, problem)
    moved = 2 * 65536 * 16384 + 4 * 64 * 16384 + 4 * 65536 + 4 * 64 * 65536
    assert found["memory, µs"] == f"{moved / h100.memory * 1e6:.0f}"
    flop = 2 * 2 * 64 * 65536 * 16384  # two pieces of each query
    assert found["arithmetic, µs"] == f"{flop / h100.half / report.ARITHMETIC * 1e6:.0f}"
    assert found["bound by"] == "memory"
    assert found["registers"] > 0
