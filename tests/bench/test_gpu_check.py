"""bench.gpu.check, which runs on a GPU, runs under Triton's interpreter as far as it can."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from collections.abc import Iterator

import torch

from bench.gpu.check import Comparison, Data, compare, end_to_end, run_check

ROOT = Path(__file__).parents[2]


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu.check", *arguments],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_small_checks_pass_under_the_interpreter() -> None:
    done = program("--device", "cpu", "--quick", "--only", "covariance", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("covariance")
    assert done.stdout.splitlines()[-1].endswith("good")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = program()
    assert done.returncode == 1
    assert done.stderr.strip() == "gpu_check: torch finds no GPU here; nothing was checked"


def test_a_wrong_result_fails() -> None:
    def wrong(data: Data, quick: bool) -> Iterator[Comparison]:
        exact = torch.ones(3, dtype=torch.float64)
        yield compare("near", exact.float(), exact, exact, 1)
        yield compare("far", exact.float() + 1e-4, exact, exact, 1)

    def nothing(data: Data, quick: bool) -> Iterator[Comparison]:
        yield from ()

    def nan(data: Data, quick: bool) -> Iterator[Comparison]:
        exact = torch.ones(3, dtype=torch.float64)
        yield compare("nan", torch.full((3,), torch.nan), exact, exact, 1)

    data = Data("cpu")
    said = run_check("wrong", wrong, data, True)
    assert said.comparisons == 2
    assert said.failed is not None
    assert said.failed.startswith("far: ")
    assert run_check("nothing", nothing, data, True).failed == "nothing was compared"
    assert run_check("nan", nan, data, True).failed == "nan: inf times its bound"


def test_rows_and_scores_of_two_devices_are_compared() -> None:
    outcome = run_check("end to end", end_to_end, Data("cpu"), True)
    assert outcome.failed is None
    assert outcome.comparisons == 5
    assert outcome.worst == 0.0  # here both are the CPU
