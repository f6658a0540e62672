"""The C++ core by itself: installed, found by find_package(logra), linked without Python."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from tree import ROOT, output

PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES CXX)
find_package(logra 0.1 REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE logra::logra)
"""

# Integers small enough to be exact in every type, so that the numbers can be compared as they are.
PROGRAM = r"""
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "logra/covariance_update.h"
#include "logra/gradients.h"
#include "logra/isa.h"
#include "logra/pack_rows.h"
#include "logra/project.h"
#include "logra/scores.h"
#include "logra/self_influence.h"
#include "logra/topk_scores.h"

using logra::Dtype;

template <class T>
void print(const char* name, const std::vector<T>& values) {
  std::printf("%s", name);
  for (T value : values) std::printf(" %g", static_cast<double>(value));
  std::printf("\n");
}

int main() {
  const std::vector<float> rows = {1, 2, 3, 4, 5, 6}, queries = {1, 0, -1, 2, 1, 0};
  const logra::Matrix r{rows.data(), Dtype::kFloat32, 2, 3, 3};
  const logra::Matrix q{queries.data(), Dtype::kFloat32, 2, 3, 3};
  for (const logra::Isa isa : logra::available_isas()) {
    logra::set_isa(logra::isa_name(isa));
    std::vector<float> out(4);
    logra::scores(q, r, nullptr, nullptr, out.data());
    print("scores", out);
    logra::project(r, q, out.data());
    print("project", out);
    std::vector<float> sigma(2);
    logra::self_influence(r, q, sigma.data());
    print("self_influence", sigma);
    std::vector<double> cov(9, 0.0);
    logra::covariance_update(cov.data(), r);
    print("covariance", cov);
    std::vector<float> gradient(9);
    logra::Examples examples;
    examples.num_examples = 1, examples.num_tokens = 2;
    const logra::Tokens tokens{rows.data(), Dtype::kFloat32, 3, 6, 3};
    logra::per_sample_gradients(examples, tokens, tokens, gradient.data());
    print("gradient", gradient);
    std::vector<float> top(2, 0), bottom(2, 0);
    std::vector<std::int64_t> top_ids(2, -1), bottom_ids(2, -1);
    logra::topk_scores(q, r, nullptr, nullptr, 1, 10, {top.data(), top_ids.data()},
                       {bottom.data(), bottom_ids.data()});
    print("top_ids", top_ids);
    std::vector<std::uint16_t> packed(6);
    std::vector<float> scale(2), back(6);
    const std::int64_t size = 3, exponent = 0;
    const logra::ModuleColumns columns{1, &size, &exponent};
    logra::pack_rows(r, columns, packed.data(), scale.data());
    const logra::Matrix p{packed.data(), Dtype::kFloat16, 2, 3, 3};
    logra::unpack_rows(p, scale.data(), columns, back.data());
    print("unpacked", back);
  }
  try {
    logra::scores(q, {rows.data(), Dtype::kFloat32, 3, 2, 2}, nullptr, nullptr, nullptr);
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
  }
}
"""

EXPECTED = [
    "scores -2 -2 4 13",
    "project -2 4 -2 13",
    "self_influence 20 173",
    "covariance 17 0 0 22 29 0 27 36 45",
    "gradient 17 22 27 22 29 36 27 36 45",
    "top_ids 10 11",
    "unpacked 1 2 3 4 5 6",
]


@pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "g++"))), reason="needs cmake, ninja and g++"
)
def test_a_program_links_the_installed_core(tmp_path: Path) -> None:
    build, prefix, consumer = tmp_path / "build", tmp_path / "prefix", tmp_path / "consumer"
    # -O1: the numbers are the same, in a third of the time
    output("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    output("cmake", "--build", build)
    output("cmake", "--install", build, "--prefix", prefix)
    headers = {p.name for p in (prefix / "include" / "logra").iterdir()}
    assert headers == {p.name for p in (ROOT / "csrc/include/logra").iterdir()}

    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(PROJECT)
    (consumer / "main.cpp").write_text(PROGRAM)
    out = consumer / "build"
    output("cmake", "-S", consumer, "-B", out, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    output("cmake", "--build", out)
    lines = output(out / "consumer").splitlines()
    assert lines[-1] == "rows: expected as many columns as queries"
    assert lines[:-1] == EXPECTED * ((len(lines) - 1) // len(EXPECTED))
    assert len(lines) > len(EXPECTED)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs x86-64 and g++"
)
def test_headers_stand_alone() -> None:
    """So that the order in which they are included does not matter."""
    headers = sorted(map(str, (ROOT / "csrc/src").rglob("*.h")))
    flags = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]
    includes = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/src'}"]
    assert headers
    output("g++", "-std=c++17", "-fsyntax-only", "-w", *flags, *includes, "-x", "c++", *headers)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(map(shutil.which, ("cmake", "ninja", "g++"))),
    reason="needs x86-64, cmake, ninja and g++",
)
def test_the_kernels_of_amx_over_emulated_tiles(tmp_path: Path) -> None:
    """csrc/tests: every instruction set's ops, then the tiles; nothing of it can be installed."""
    output(
        "cmake",
        *("-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"),
        *("-DLOGRA_TESTS=ON", "-DLOGRA_EMULATE_AMX=ON"),
    )
    output("cmake", "--build", tmp_path)
    core = output(tmp_path / "logra_core_test")
    tiles = subprocess.run(
        [tmp_path / "logra_tiles_test"], capture_output=True, text=True, check=False
    )
    if tiles.returncode == 77:
        pytest.skip(tiles.stdout.strip())
    assert tiles.returncode == 0, tiles.stdout + tiles.stderr
    assert "amx_emulated: ok" in core
    prefix = tmp_path / "prefix"
    install = ["cmake", "--install", str(tmp_path), "--prefix", str(prefix)]
    subprocess.run(install, capture_output=True, check=False)
    assert not prefix.exists()
