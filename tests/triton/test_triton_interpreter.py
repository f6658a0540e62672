"""Run tests/triton/kernels under Triton's interpreter, which needs a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "kernels"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_the_reference_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def python(program: str) -> str:
    """The last line that a program prints which must fail, run without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_import_without_triton_says_what_to_install() -> None:
    said = python("import sys; sys.modules['triton'] = None; import logra_kernels.triton")
    assert said == (
        "ImportError: logra_kernels.triton needs the package triton, which is not installed: "
        "pip install 'logra-kernels[gpu]'. Everything on the CPU works without it."
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_cpu_tensor_is_refused_without_the_interpreter() -> None:
    said = python(
        "import torch; from logra_kernels.triton import project; project(*torch.ones(2, 3, 4))"
    )
    assert said == (
        "RuntimeError: x: the Triton kernels need a tensor on a GPU, got one on cpu; "
        "set TRITON_INTERPRET=1 before Python starts to interpret them on the CPU"
    )
