"""Imports point one way: a walk over the package's sources, whatever is added to them."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import logra_kernels

ROOT = Path(logra_kernels.__file__).parents[1]
PACKAGE = "logra_kernels"

# A module may import its own tier and lower ones. A module that is not named here is as high as
# what it imports, and at least of tier 3: so the rooms of tier 3 do not come to need the tools.
TIERS = {
    "reference": 0,
    "store": 0,
    "triton": 0,
    "_checks": 0,
    "progress": 0,
    "_native": 1,
    "ops": 2,
    "projection": 3,
    "capture": 3,
    "curvature": 3,
    "attribution": 3,
    "run": 3,
    "lm": 4,
    "integrations": 4,
    "report": 4,
    "demo": 5,
    "cli": 5,
    "__main__": 5,
}
AT_LEAST = 3
# Rooms that import nothing of the package but themselves, and of the world only this.
CLOSED = {
    "reference": {"torch"},
    "store": {"numpy", "pyarrow", "safetensors"},
    "triton": {"torch", "triton"},
}
# What every installation has (markupsafe comes with jinja2). The rest may be missing, and is
# imported where it is used.
REQUIRED = {"torch", "numpy", "safetensors", "pyarrow", "yaml", "tqdm", "jinja2", "markupsafe"}


class Import:
    """One imported module, as seen from one source file."""

    def __init__(self, target: str, line: int, lazy: bool) -> None:
        self.target = target
        self.line = line
        self.lazy = lazy  # inside a function: runs when it is called


def room(module: str) -> str:
    """logra_kernels.store.reader -> store."""
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str, text: str, is_package: bool, modules: set[str]) -> Iterator[Import]:
    """Every import of a source, those under `if TYPE_CHECKING` left out."""

    def resolve(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, node.module] if node.module else base)

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            source = resolve(node)
            for alias in node.names:
                name = f"{source}.{alias.name}"
                if source == PACKAGE and name not in modules:
                    home = logra_kernels._HOMES.get(alias.name)
                    name = f"{PACKAGE}.{home}" if home else PACKAGE
                yield Import(name if name in modules else source, node.lineno, lazy)
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, lazy or inside)

    yield from walk(ast.parse(text), False)


def problems_of(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """Arrows that point back, in {module: (text, is a package)}."""
    found = []
    graph: dict[str, set[str]] = {}
    imports = {
        module: list(imports_of(module, text, is_package, set(sources)))
        for module, (text, is_package) in sources.items()
    }
    tiers = tiers_of(imports)
    for module in sources:
        here = room(module)
        graph[module] = set()
        for used in imports[module]:
            where = f"{module}:{used.line} imports {used.target}"
            top = used.target.split(".")[0]
            if top == PACKAGE:
                there = room(used.target)
                if used.target == f"{PACKAGE}._C" and module != f"{PACKAGE}._native":
                    found.append(f"{where}: only _native does")
                elif here in CLOSED and there != here:
                    found.append(f"{where}: {here} imports nothing of the package but itself")
                elif module != PACKAGE and tiers.get(there, 0) > tiers[here]:
                    found.append(f"{where}: the arrow points back")
                if not used.lazy and used.target in sources and used.target != module:
                    graph[module].add(used.target)
            elif top in ("tests", "bench", "examples"):
                found.append(f"{where}: the package stands without them")
            elif top not in sys.stdlib_module_names:
                if here in CLOSED and top not in CLOSED[here]:
                    found.append(f"{where}: {here} imports {', '.join(sorted(CLOSED[here]))} only")
                elif top == "triton" and here != "triton":
                    found.append(f"{where}: only the triton package does")
                elif top not in REQUIRED | CLOSED.get(here, set()) and not used.lazy:
                    found.append(f"{where} when it is loaded: it may not be installed")
    return found + [f"a circle: {' -> '.join(circle)}" for circle in circles(graph)]


def tiers_of(imports: dict[str, list[Import]]) -> dict[str, int]:
    """Room -> its tier: as written above, or the highest of what the room imports."""
    tiers = {room(module): TIERS.get(room(module), AT_LEAST) for module in imports}
    for _ in range(max(TIERS.values())):  # a tier rises at most that often
        for module, used in imports.items():
            if room(module) not in TIERS:
                ours = [one for one in used if one.target.split(".")[0] == PACKAGE]
                heights = [tiers.get(room(one.target), 0) for one in ours]
                tiers[room(module)] = max([tiers[room(module)], *heights])
    return tiers


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """A circle for each module from which a depth-first search comes back to its own path."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> Iterator[list[str]]:
        if module in path:
            yield [*path[path.index(module) :], module]
        elif module not in done:
            for used in sorted(graph[module]):
                # A package's own modules may import from one another through full names; the
                # package itself lists them, which is no circle.
                if not module.startswith(used + "."):
                    yield from visit(used, [*path, module])
            done.add(module)

    for module in sorted(graph):
        yield from visit(module, [])


def package_sources() -> dict[str, tuple[str, bool]]:
    sources = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        sources[name] = (path.read_text(), is_package)
    return sources


def test_no_arrow_points_back() -> None:
    sources = package_sources()
    assert {f"{PACKAGE}.store.writer", f"{PACKAGE}.ops", f"{PACKAGE}.reference"} <= set(sources)
    assert problems_of(sources) == []


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("store.new", "import torch", "imports torch: store imports numpy, pyarrow, safe"),
        ("store.new", "def f():\n  from torch import Tensor", "store imports numpy, pyarrow"),
        ("store.new", "from logra_kernels import ops", "store imports nothing of the package"),
        ("store.new", "from ..ops import scores", "imports logra_kernels.ops: store imports"),
        ("reference.new", "import numpy", "reference imports torch only"),
        ("ops.new", "from logra_kernels import capture", "the arrow points back"),
        ("ops.new", "from logra_kernels import Attributor", "imports logra_kernels.attribution"),
        ("ops.new", "from logra_kernels import _C", "only _native does"),
        ("ops.new", "import triton", "only the triton package does"),
        ("curvature", "import logra_kernels.cli", "the arrow points back"),
        ("curvature", "from logra_kernels import tool", "the arrow points back"),
        ("brand_new", "import transformers", "when it is loaded: it may not be installed"),
        ("brand_new", "from bench import bench_scores", "the package stands without them"),
    ],
)
def test_the_walk_finds_what_it_looks_for(module: str, text: str, message: str) -> None:
    names = ["ops.new", "store.new", "capture", "attribution", "_C", "cli", "ops", "store"]
    sources = {f"{PACKAGE}.{name}": ("", False) for name in names}
    sources[f"{PACKAGE}.tool"] = ("from logra_kernels import cli", False)
    (problem,) = problems_of(sources | {f"{PACKAGE}.{module}": (text, False)})
    assert message in problem


def test_the_walk_finds_circles() -> None:
    sources = {
        f"{PACKAGE}.a": ("from logra_kernels import b", False),
        f"{PACKAGE}.b": ("from logra_kernels.c import d", False),
        f"{PACKAGE}.c": ("from . import a", False),
    }
    circle = "a circle: " + " -> ".join(f"{PACKAGE}.{name}" for name in "abca")
    assert problems_of(sources) == [circle]
    sources[f"{PACKAGE}.c"] = ("def f():\n  from . import a", False)
    assert problems_of(sources) == []


def test_the_walk_lets_good_imports_pass() -> None:
    text = (
        "from typing import TYPE_CHECKING\nimport torch\nfrom logra_kernels import Store, ops\n"
        "if TYPE_CHECKING:\n  from logra_kernels.cli import main\n"
        "def f():\n  import transformers\n"
    )
    names = ["ops", "store", "cli"]
    sources = {f"{PACKAGE}.{name}": ("", True) for name in names}
    assert problems_of(sources | {f"{PACKAGE}.run": (text, False)}) == []


@pytest.mark.parametrize("code", ["import logra_kernels.store", "from logra_kernels import Store"])
def test_reading_a_store_needs_no_torch(code: str) -> None:
    forbidden = ("torch", "transformers", "triton")
    check = f"{code}\nimport sys\nassert not set({forbidden}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_every_public_name_is_there() -> None:
    assert set(logra_kernels.__all__) <= set(dir(logra_kernels))
    for name in logra_kernels.__all__:
        assert getattr(logra_kernels, name) is not None
    with pytest.raises(AttributeError, match="module 'logra_kernels' has no attribute 'nonsense'"):
        _ = logra_kernels.nonsense


# #include lines: the core knows neither Python nor torch, the binding knows no torch.
@pytest.mark.parametrize(
    ("folder", "foreign"),
    [
        ("csrc", r"pybind11|Python\.h|torch|ATen|c10|numpy"),
        ("python", r"torch|ATen|c10"),
    ],
)
def test_the_core_includes_nothing_foreign(folder: str, foreign: str) -> None:
    pattern = re.compile(rf'^\s*#\s*include\s*[<"](?:{foreign})', re.MULTILINE)
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".cpp", ".hpp")]
    if not files:
        pytest.skip(f"{folder}/ is not part of this installation")
    assert [str(path) for path in files if pattern.search(path.read_text())] == []
