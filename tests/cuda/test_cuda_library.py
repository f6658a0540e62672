"""liblogra_cuda builds without a GPU, says so when it is used, and launches its kernels rightly."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent
# One generation of GPUs, and enough variants of each kernel to take every branch of every launcher.
SOME = (
    r"^(scores|candidates|self_influence)\.rows=f16|^split_queries\.rows=f16|^merge|^state|"
    r"^(gradients|coordinates)\.x=f16,dy=f16,project_in=1,project_out=1|"
    r"^gradients\.x=f32,dy=f16,project_in=0,project_out=1|^reduce|"
    r"^(project|covariance)\.\w+=f16|pack_rows"
)
needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or shutil.which("c++") is None
    or sys.platform != "linux",
    reason="needs triton and a C++ compiler, on Linux",
)
pytestmark = [needs_tools, pytest.mark.slow]


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, its description, and a driver without a GPU."""
    folder = tmp_path_factory.mktemp("cuda")
    chosen = "-DLOGRA_CUDA=ON", "-DLOGRA_CUDA_ARCHITECTURES=90", f"-DLOGRA_CUDA_MATCH={SOME}"
    tools = Path(sys.executable).parent
    path = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    python = f"-DPython_EXECUTABLE={sys.executable}"
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", python, *chosen, **path)
    run("cmake", "--build", folder, "--target", "logra_cuda", **path)
    fake = SOURCES / "fake_driver.c"
    driver = folder / "fake" / "libcuda.so.1"
    driver.parent.mkdir()
    run("cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", driver, fake)
    return folder


def test_launches_compute_what_the_reference_does(build: Path) -> None:
    said = run(
        *(sys.executable, SOURCES / "check_library.py"),
        *(build / "csrc/cuda/liblogra_cuda.so", build / "csrc/cuda/cubins/kernels.json"),
        build / "fake/libcuda.so.1",
        TRITON_INTERPRET="1",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    assert said.count(": good") == 8
    assert ", 0 not" in said  # every variant was launched


def test_a_c_program_is_told_that_there_is_no_gpu(build: Path) -> None:
    program = build / "use_library"
    folder = build / "csrc/cuda"
    strict = "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"
    run(
        *("cc", *strict, "-I", ROOT / "csrc/include"),
        *(SOURCES / "use_library.c", "-o", program, f"-L{folder}", "-llogra_cuda"),
        f"-Wl,-rpath,{folder}",
    )
    status, nothing = run(program).splitlines()
    assert nothing == "0"
    if status.startswith("0"):
        return  # this machine has a GPU and a context
    assert status.startswith("1 libcuda.so.1, which NVIDIA's driver installs, cannot be opened: ")


def test_a_driver_without_a_gpu_is_no_gpu(build: Path) -> None:
    program = (
        "import ctypes, sys; d = ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL); "
        "d.fake_set(None, 90, 1, 0); c = ctypes.CDLL(sys.argv[1]); "
        "c.logra_cuda_last_error.restype = ctypes.c_char_p; "
        "print(c.logra_cuda_available(), c.logra_cuda_last_error().decode()); "
        "d.fake_set(None, 90, 1, 1); print(c.logra_cuda_available())"
    )
    library, driver = build / "csrc/cuda/liblogra_cuda.so", build / "fake/libcuda.so.1"
    said = run(sys.executable, "-c", program, library, driver).splitlines()
    assert said == ["1 NVIDIA's driver is installed, but finds no GPU", "0"]


def test_the_library_links_the_driver_only_when_it_runs(build: Path) -> None:
    needed = run("readelf", "-d", build / "csrc/cuda/liblogra_cuda.so")
    assert "libcuda" not in needed
    assert "libpython" not in needed
    exported = run("nm", "-D", "--defined-only", build / "csrc/cuda/liblogra_cuda.so")
    names = [line.split()[-1] for line in exported.splitlines()]
    assert [name for name in names if not name.startswith("logra_cuda_")] == []


def test_no_kernel_spills(build: Path) -> None:
    kernels = json.loads((build / "csrc/cuda/cubins/kernels.json").read_text())
    assert len(kernels) > 20
    assert [k["variant"] for k in kernels if k["spilled_bytes"]] == []
