"""The C++ core's own test, on CPUs that this machine is not, through qemu's user-mode emulation."""

import os
import shutil
from pathlib import Path

import pytest
from tree import ROOT, output

ARM = "aarch64-linux-gnu"
# What the emulated CPU has to offer, least first: core_test prints a line for each.
CPUS = {
    "Nehalem": ("x86_64", "g++", ["qemu-x86_64", "-cpu", "Nehalem"], ["baseline"]),
    "Haswell": ("x86_64", "g++", ["qemu-x86_64", "-cpu", "Haswell"], ["baseline", "avx2"]),
    "aarch64": (
        "aarch64",
        f"{ARM}-g++",
        ["qemu-aarch64", "-L", f"/usr/{ARM}"],
        ["baseline", "neon"],
    ),
}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("core")


@pytest.mark.parametrize("cpu", CPUS)
def test_core_on(cpu: str, builds: Path) -> None:
    processor, compiler, emulator, isas = CPUS[cpu]
    missing = [tool for tool in ("cmake", "ninja", compiler, emulator[0]) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    if processor == "x86_64" and os.uname().machine != processor:
        pytest.skip(f"g++ here compiles for {os.uname().machine}")
    build = builds / processor
    if not build.exists():
        options = [f"-DCMAKE_SYSTEM_PROCESSOR={processor}", "-DCMAKE_SYSTEM_NAME=Linux"]
        options += [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
        output("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DLOGRA_TESTS=ON", *options)
        output("cmake", "--build", build, "--target", "logra_core_test")
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    out = output(*emulator, build / "logra_core_test", env=env)
    assert out.splitlines() == [f"{isa}: ok" for isa in isas]
