"""What is said twice in the repository's own files is the same in both places."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from tree import ROOT, output


def test_the_version_stands_in_one_place() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for name in ("CMakeLists.txt", "setup.py", "CITATION.cff", "mkdocs.yml"):
        assert version[1] not in (ROOT / name).read_text(), f"{name} repeats the version"


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text.replace("\\\n", ""), re.MULTILINE)
    assert phony is not None
    helped = re.findall(r'@echo "make ([a-z-]+) ', text)
    assert sorted(helped) == sorted(set(phony[1].split()) - {"help"})


@pytest.mark.slow
def test_make_builds_the_cuda_library_with_its_own_tools(clone: Path) -> None:
    """In a clone where nothing was built, with CMake and ninja from the virtual environment."""
    tools = Path(os.path.abspath(sys.executable)).parent
    pytest.importorskip("triton")
    if not (tools / "cmake").exists() or not (tools / "ninja").exists():
        pytest.skip("needs CMake and ninja beside Python: pip install 'logra-kernels[dev]'")
    if shutil.which("make") is None or shutil.which("c++") is None:
        pytest.skip("needs make and a C++ compiler")
    few = "-DLOGRA_CUDA_ARCHITECTURES=90 -DLOGRA_CUDA_MATCH=^unpack"
    # -o: the installation is taken as it is
    make = ("make", "cuda-library", "-o", "install", f"VENV={tools.parent}", f"CUDA_OPTIONS={few}")
    output(*make, cwd=clone, env=os.environ)
    assert (clone / "build/cuda/csrc/cuda/liblogra_cuda.so").exists()
    cache = (clone / "build/cuda/CMakeCache.txt").read_text()
    assert f"={tools / 'ninja'}\n" in cache
