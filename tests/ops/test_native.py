"""The extension: how it is chosen, its instruction sets, what its objects show the linker."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tree import ROOT

from logra_kernels import _native

SHOW = (
    "import torch; from logra_kernels import _native, ops; "
    "print(_native.isa(), ops.scores(torch.ones(1, 3), torch.ones(2, 3)).tolist())"
)


def run(code: str = SHOW, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.usefixtures("native")
def test_isa_from_the_environment() -> None:
    least = _native.available_isas()[0]
    done = run(LOGRA_ISA=least)
    assert done.stdout == f"{least} [[3.0, 3.0]]\n", done.stderr
    best = run(LOGRA_ISA="")
    assert best.stdout.split()[0] == _native.available_isas()[-1]


@pytest.mark.usefixtures("native")
def test_an_unavailable_isa_is_refused_with_the_list() -> None:
    names = ", ".join(_native.available_isas())
    message = f"expected one of {names} on this machine, got 'avx1024'"
    with pytest.raises(ValueError, match="isa") as caught:
        _native.set_isa("avx1024")
    assert str(caught.value) == f"isa: {message}"
    done = run(LOGRA_ISA="avx1024")
    assert done.returncode != 0
    assert f"LOGRA_ISA: {message}" in done.stderr


@pytest.mark.usefixtures("native")
def test_isas_stand_in_order() -> None:
    wanted = ["baseline", "neon", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"]
    got = _native.available_isas()
    assert got == [name for name in wanted if name in got]
    if platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text():
        assert "avx2" in got


def test_the_reference_can_be_asked_for() -> None:
    done = run(LOGRA_BACKEND="reference")
    assert done.stdout == "None [[3.0, 3.0]]\n", done.stderr
    done = run(
        "from logra_kernels import _native; _native.set_isa('avx2')", LOGRA_BACKEND="reference"
    )
    assert "set_isa('avx2'): the C++ kernels are not loaded" in done.stderr


def test_an_unknown_backend_is_refused() -> None:
    done = run("import logra_kernels._native", LOGRA_BACKEND="fast")
    assert "LOGRA_BACKEND: expected auto, native or reference, got 'fast'" in done.stderr


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "logra_kernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def test_without_the_extension() -> None:
    """auto falls back with a warning that says what to do; native raises."""
    always = "import warnings; warnings.simplefilter('always')\n"
    warned = run(HIDE + always + SHOW, LOGRA_BACKEND="auto")
    assert warned.stdout == "None [[3.0, 3.0]]\n", warned.stderr
    assert "RuntimeWarning: logra_kernels was installed without its C++ kernels" in warned.stderr
    strict = run(HIDE + "import logra_kernels._native", LOGRA_BACKEND="native")
    assert "ImportError: LOGRA_BACKEND=native: the C++ extension logra_kernels._C" in strict.stderr


@pytest.mark.usefixtures("native")
def test_one_openmp_library_is_loaded() -> None:
    """The extension's threads are torch's: torch.set_num_threads() holds for both."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("no /proc/self/maps, or torch without OpenMP")
    libraries = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(libraries) == 1, libraries


@pytest.mark.skipif(
    platform.system() != "Linux" or not all(map(shutil.which, ("nm", "g++"))),
    reason="needs Linux, g++ and nm",
)
def test_objects_with_isa_flags_show_nothing_but_their_table(tmp_path: Path) -> None:
    """A weak symbol compiled for AVX-512 might be the one the linker keeps for every CPU."""
    flags: dict[str, list[str]] = {"isa_baseline": []}
    if platform.machine() == "x86_64":
        avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
        flags["isa_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
        flags["isa_avx512"] = avx512
        flags["isa_avx512_vnni"] = [*avx512, "-mavx512vnni"]
        flags["isa_avx512_bf16"] = [*avx512, "-mavx512bf16"]
        flags["isa_amx"] = [*avx512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
    elif platform.machine() == "aarch64":
        flags["isa_neon"] = []
    for name, isa_flags in flags.items():
        source, target = ROOT / "csrc/src/isa" / f"{name}.cpp", tmp_path / f"{name}.o"
        # -O0 keeps what optimisation would inline away
        includes = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/src'}"]
        command = ["g++", "-std=c++17", "-O0", "-w", *isa_flags, *includes]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        symbols = subprocess.run(
            ["nm", "-C", str(target)], capture_output=True, text=True, check=True
        )
        shown = [
            line.split(maxsplit=2)[1:]
            for line in symbols.stdout.splitlines()
            if line[:1] != " " and line.split()[1] not in "tdbr"
        ]
        assert len(shown) == 1, (name, shown)
        assert shown[0][0] in "DR", (name, shown)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_only_the_isa_files_have_isa_flags() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "native" not in text.replace("LOGRA_NO_NATIVE", "")
    for line in text.splitlines():
        if "-mavx" in line or "-mfma" in line or "-mamx" in line:
            assert "target_compile_options" not in line
