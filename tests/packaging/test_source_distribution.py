"""A source distribution holds what its build needs, and can be installed again and again.

So can the wheel that is built from it, in an environment of its own.
"""

import os
import re
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from tree import output

pytest.importorskip("setuptools", minversion="77")
BUILT_FROM = ("csrc", "python", "tools")
OFFLINE = ("--no-build-isolation", "--no-deps", "--no-index")
# The numbers are the same without optimisation, and compiling takes a fraction of the time.
QUICK = {"LOGRA_BUILD_TYPE": "Debug", "CXXFLAGS": "-O0"}
PROGRAM = (
    "import torch, logra_kernels as logra; from logra_kernels import ops; "
    "print(logra.__file__, ops.scores(torch.ones(1, 3), torch.ones(1, 3)).item())"
)


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


@pytest.fixture
def ninja() -> str:
    """The program that builds; skips where something is missing for that."""
    for module in ("pybind11", "pip"):
        pytest.importorskip(module)
    found = shutil.which(
        "ninja", path=f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"
    )
    if found is None or shutil.which("c++") is None:
        pytest.skip("needs ninja and a C++ compiler")
    return found


@pytest.mark.slow
def test_it_installs_twice(unpacked: Path, tmp_path: Path, ninja: str) -> None:
    """The second build finds the first one's cache, which names a ninja that has gone since.

    pip's own build environments are such places: each lies in a temporary folder.
    """
    install = (sys.executable, "-m", "pip", "install", *OFFLINE)
    passing = tmp_path / "passing"
    passing.mkdir()
    (passing / "ninja").symlink_to(ninja)
    path = f"{passing}{os.pathsep}{os.environ['PATH']}"
    run(*install, "--target", tmp_path / "first", ".", cwd=unpacked, PATH=path, **QUICK)
    (cache,) = unpacked.glob("build/*/CMakeCache.txt")
    assert f"={passing / 'ninja'}\n" in cache.read_text()
    shutil.rmtree(passing)
    second = tmp_path / "second"
    run(*install, "--target", second, ".", cwd=unpacked, **QUICK)

    version = re.search(
        r'^version = "(.*)"$', (unpacked / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert version is not None
    assert f"CMAKE_PROJECT_VERSION:STATIC={version[1]}\n" in cache.read_text()
    said = run(
        sys.executable, "-c", PROGRAM, cwd=tmp_path, PYTHONPATH=str(second), LOGRA_BACKEND="native"
    )
    assert said == f"{second / 'logra_kernels/__init__.py'} 3.0\n"


@pytest.mark.slow
@pytest.mark.usefixtures("ninja")
def test_a_wheel_of_it_installs_in_a_clean_environment(unpacked: Path, tmp_path: Path) -> None:
    """An environment with nothing but the wheel, which finds torch and the rest beside it."""
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", tmp_path, ".", cwd=unpacked, **QUICK)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"logra_kernels"}
    sources = {
        str(path.relative_to(unpacked))
        for path in (unpacked / "logra_kernels").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    (extension,) = names - sources - {name for name in names if ".dist-info/" in name}
    assert re.fullmatch(r"logra_kernels/_C\..*\.so", extension)
    assert sources <= names

    clean = tmp_path / "clean"
    venv.create(clean, with_pip=True, symlinks=True)
    python = clean / "bin/python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # A path that is only searched, not a site: the editable installation in it is not seen.
    beside = {"PYTHONPATH": sysconfig.get_path("purelib"), "LOGRA_BACKEND": "native"}
    said = run(python, "-c", PROGRAM, cwd=tmp_path, **beside)
    assert re.fullmatch(f"{re.escape(str(clean))}/lib/.*/logra_kernels/__init__.py 3.0\n", said)
    assert "verify" in run(clean / "bin/logra", "--help", cwd=tmp_path, **beside)
