"""A source distribution holds what its build needs, and can be installed again and again."""

import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from tree import output

pytest.importorskip("setuptools", minversion="77")
BUILT_FROM = ("csrc", "python", "tools")


def run(*command: object, cwd: Path, **environment: str) -> str:
    return output(*command, cwd=cwd, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def unpacked(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=clone)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    (inside,) = (path for path in folder.iterdir() if path.is_dir())
    return inside


def test_it_holds_every_source_and_no_test(clone: Path, unpacked: Path) -> None:
    for top in (*BUILT_FROM, "logra_kernels"):
        here, there = (
            {
                str(path.relative_to(base))
                for path in (base / top).rglob("*.*")
                if "__pycache__" not in path.parts
            }
            for base in (clone, unpacked)
        )
        assert here == there
    assert (unpacked / "CMakeLists.txt").exists()
    assert not (unpacked / "tests").exists()


@pytest.mark.slow
def test_it_installs_twice(unpacked: Path, tmp_path: Path) -> None:
    """The second build finds the first one's cache, which names a ninja that has gone since.

    pip's own build environments are such places: each lies in a temporary folder.
    """
    for module in ("pybind11", "pip"):
        pytest.importorskip(module)
    ninja = shutil.which(
        "ninja", path=f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"
    )
    if ninja is None or shutil.which("c++") is None:
        pytest.skip("needs ninja and a C++ compiler")
    offline = ("--no-build-isolation", "--no-deps", "--no-index")
    install = (sys.executable, "-m", "pip", "install", *offline)
    # The numbers are the same without optimisation, and compiling takes a fraction of the time.
    quick = {"LOGRA_BUILD_TYPE": "Debug", "CXXFLAGS": "-O0"}
    passing = tmp_path / "passing"
    passing.mkdir()
    (passing / "ninja").symlink_to(ninja)
    path = f"{passing}{os.pathsep}{os.environ['PATH']}"
    run(*install, "--target", tmp_path / "first", ".", cwd=unpacked, PATH=path, **quick)
    (cache,) = unpacked.glob("build/*/CMakeCache.txt")
    assert f"={passing / 'ninja'}\n" in cache.read_text()
    shutil.rmtree(passing)
    second = tmp_path / "second"
    run(*install, "--target", second, ".", cwd=unpacked, **quick)

    version = re.search(
        r'^version = "(.*)"$', (unpacked / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert version is not None
    assert f"CMAKE_PROJECT_VERSION:STATIC={version[1]}\n" in cache.read_text()
    program = (
        "import torch, logra_kernels as logra; from logra_kernels import ops; "
        "print(logra.__file__, ops.scores(torch.ones(1, 3), torch.ones(1, 3)).item())"
    )
    said = run(
        sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(second), LOGRA_BACKEND="native"
    )
    assert said == f"{second / 'logra_kernels/__init__.py'} 3.0\n"
