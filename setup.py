"""Builds the C++ core and its binding with CMake; everything else stands in pyproject.toml.

LOGRA_NO_NATIVE=1 leaves the extension out: the package then runs in plain PyTorch.
LOGRA_BUILD_TYPE chooses CMake's build type (Release).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("LOGRA_NO_NATIVE", "0") in ("", "0")

NO_COMPILER = (
    "logra-kernels could not build its C++ kernels (see the messages above): install a C++17 "
    "compiler such as g++, or set LOGRA_NO_NATIVE=1 to install without them "
    "and run in plain PyTorch."
)


def find_tool(name: str) -> str:
    """The program on PATH, or beside this Python (an environment that is not activated)."""
    folders = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    )
    return shutil.which(name, path=folders) or name


class CMakeBuild(build_ext):
    """Builds an extension as a target of CMakeLists.txt, with Ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and put the extension where setuptools looks for it."""
        import pybind11

        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        cmake = find_tool("cmake")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            # The cache of an earlier build may name the ninja of an environment that pip deleted.
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('LOGRA_BUILD_TYPE', 'Release')}",
            "-DLOGRA_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
        ]
        for command in (configure, [cmake, "--build", str(build), "--target", "_C"]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError):
                sys.exit(NO_COMPILER)


if NATIVE:
    setup(
        ext_modules=[Extension("logra_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild}
    )
else:
    setup()
