"""Imports point one way: a walk over the package's sources, whatever is added to them."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from tree import output

import logra_kernels

ROOT = Path(logra_kernels.__file__).parents[1]
PACKAGE = "logra_kernels"

# A room may import itself and rooms of lower tiers; those of one tier may import one another where
# `circles` finds none. The package root, whose names are looked up when they are used, may import
# every room.
TIERS = {
    "_C": 0,
    "_checks": 0,
    "_native": 0,
    "defaults": 0,
    "progress": 0,
    "reference": 0,
    "store": 0,
    "triton": 0,
    "ops": 1,
    "rows": 2,
    "projection": 3,
    "capture": 3,
    "curvature": 3,
    "attribution": 4,
    "run": 5,
    "baselines": 6,
    "lm": 6,
    "evaluation": 6,
    "report": 6,
    "integrations": 6,
    "demo": 7,
    "cli": 7,
}
# The modules of the package root; whatever else is there is a room, a folder.
ROOT_MODULES = {"__init__", "_native", "_checks", "defaults", "rows", "progress"}
# Rooms that import nothing of the package but themselves, and of the world only this; the Triton
# kernels also the reference, by whose own lines they round queries.
CLOSED = {
    "reference": {"torch"},
    "store": {"numpy", "pyarrow", "safetensors"},
    "triton": {"torch", "triton", "reference"},
}
# What every installation has (markupsafe comes with jinja2). The rest may be missing, and is
# imported where it is used.
REQUIRED = {"torch", "numpy", "safetensors", "pyarrow", "yaml", "tqdm", "jinja2", "markupsafe"}


class Import(NamedTuple):
    """One imported module, as seen from one source file."""

    target: str
    line: int
    lazy: bool  # inside a function: runs when it is called
    for_types: bool  # under `if TYPE_CHECKING`: never runs


def room(module: str) -> str:
    """logra_kernels.store.reader -> store."""
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str, text: str, is_package: bool, modules: set[str]) -> Iterator[Import]:
    """Every import of a source, those under `if TYPE_CHECKING` too."""

    def walk(node: ast.AST, lazy: bool, for_types: bool) -> Iterator[Import]:
        for target in targets_of(node, module, is_package, modules):
            yield Import(target, getattr(node, "lineno", 0), lazy, for_types)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            negated = isinstance(node.test, ast.UnaryOp)
            for branch, types in ((node.body, not negated), (node.orelse, negated)):
                for statement in branch:
                    yield from walk(statement, lazy, for_types or types)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, lazy, for_types)

    yield from walk(ast.parse(text), False, False)


def targets_of(node: ast.AST, module: str, is_package: bool, modules: set[str]) -> Iterator[str]:
    """The modules that a node of `module` imports; none if it is no import."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = module.split(".")
        above = parts[: len(parts) - node.level + is_package] if node.level else []
        source = ".".join([*above, node.module] if node.module else above)
        for alias in node.names:
            name = f"{source}.{alias.name}"
            if source == PACKAGE and name not in modules:
                home = logra_kernels._HOMES.get(alias.name)
                name = f"{PACKAGE}.{home}" if home else PACKAGE
            yield name if name in modules else source


def problem_inside(module: str, target: str) -> str | None:
    """What is wrong with an import of the package's own, after the words that name it."""
    here, there = room(module), room(target)
    if target == f"{PACKAGE}._C" and module != f"{PACKAGE}._native":
        return ": only _native does"
    if here in CLOSED and there != here and there not in CLOSED[here]:
        return f": {here} imports nothing of the package but itself"
    if module != PACKAGE and TIERS.get(there, 0) > TIERS.get(here, 0):
        return ": the arrow points back"
    return None


def problem_outside(module: str, used: Import) -> str | None:
    """What is wrong with an import of something else, after the words that name it."""
    here, top = room(module), used.target.split(".")[0]
    if top in ("tests", "bench", "examples"):
        return ": the package stands without them"
    if top in sys.stdlib_module_names:
        return None
    if here in CLOSED and top not in CLOSED[here]:
        return f": {here} imports {', '.join(sorted(CLOSED[here]))} only"
    if top == "triton" and here != "triton":
        return ": only the triton package does"
    loaded = not used.lazy and not used.for_types
    if top not in REQUIRED | CLOSED.get(here, set()) and loaded:
        return " when it is loaded: it may not be installed"
    return None


def problems_of(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """Arrows that point back, in {module: (text, is a package)}."""
    found = [
        f"{module}: the room {room(module)} has no tier"
        for module in sources
        if module != PACKAGE and room(module) not in TIERS
    ]
    graph: dict[str, set[str]] = {module: set() for module in sources}
    rooms: dict[str, set[str]] = {room(module): set() for module in sources}
    for module, (text, is_package) in sources.items():
        here = room(module)
        for used in imports_of(module, text, is_package, set(sources)):
            own, there = used.target.split(".")[0] == PACKAGE, room(used.target)
            problem = problem_inside(module, used.target) if own else problem_outside(module, used)
            if problem:
                found.append(f"{module}:{used.line} imports {used.target}{problem}")
            if not own or (module == PACKAGE and used.for_types):
                continue  # the package's names for type checkers are no arrows
            if not used.lazy and used.target in sources and used.target != module:
                graph[module].add(used.target)
            if there in rooms and there != here and here:
                rooms[here].add(there)
    found += [f"a circle: {' -> '.join(circle)}" for circle in circles(graph)]
    return found or [f"a circle of rooms: {' -> '.join(circle)}" for circle in circles(rooms)]


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """A circle, if there is one, from its first module in order of names."""
    # A package's own modules may import from one another through full names; the package itself
    # lists them, which is no circle.
    arrows = {
        module: {used for used in uses if not module.startswith(used + ".")}
        for module, uses in graph.items()
    }
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        *circle, _ = error.args[1][::-1]  # from what imports to what is imported
        first = circle.index(min(circle))
        yield [*circle[first:], *circle[: first + 1]]


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


GUARD = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"


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
        ("curvature", "def f():\n  import logra_kernels.cli", "the arrow points back"),
        ("ops.new", f"{GUARD}  from logra_kernels import Attributor", "the arrow points back"),
        ("store.new", f"{GUARD}  from torch import Tensor", "store imports numpy, pyarrow"),
        ("ops.new", f"{GUARD}  pass\nelse:\n  import PIL", "it may not be installed"),
        ("lm", "import transformers", "when it is loaded: it may not be installed"),
        ("lm", "from bench import bench_scores", "the package stands without them"),
        ("brand_new", "import torch", "logra_kernels.brand_new: the room brand_new has no tier"),
    ],
)
def test_the_walk_finds_what_it_looks_for(module: str, text: str, message: str) -> None:
    names = ["ops.new", "store.new", "capture", "attribution", "_C", "cli", "ops", "store"]
    sources = {f"{PACKAGE}.{name}": ("", False) for name in names}
    (problem,) = problems_of(sources | {f"{PACKAGE}.{module}": (text, False)})
    assert message in problem


@pytest.mark.parametrize("last", ["from . import a", f"{GUARD}  from . import a"])
def test_the_walk_finds_circles(last: str) -> None:
    sources = {
        f"{PACKAGE}.lm": ("", True),
        f"{PACKAGE}.lm.a": ("from logra_kernels.lm import b", False),
        f"{PACKAGE}.lm.b": ("from logra_kernels.lm.c import d", False),
        f"{PACKAGE}.lm.c": (last, False),
    }
    circle = "a circle: " + " -> ".join(f"{PACKAGE}.lm.{name}" for name in "abca")
    assert problems_of(sources) == [circle]
    sources[f"{PACKAGE}.lm.c"] = ("def f():\n  from . import a", False)
    assert problems_of(sources) == []


def test_the_walk_finds_circles_of_rooms() -> None:
    sources = {
        f"{PACKAGE}.capture.a": ("from logra_kernels.projection import b", False),
        f"{PACKAGE}.projection.c": ("from logra_kernels.capture import d", False),
    }
    sources |= {f"{PACKAGE}.{name}": ("", False) for name in ("capture.d", "projection.b")}
    assert problems_of(sources) == ["a circle of rooms: capture -> projection -> capture"]


def test_the_walk_lets_good_imports_pass() -> None:
    text = (
        "import torch\nfrom logra_kernels import Store, ops\n"
        f"{GUARD}  import transformers\n  from logra_kernels.store import reader\n"
        "def f():\n  import transformers\n"
    )
    names = ["ops", "store", "cli"]
    sources = {f"{PACKAGE}.{name}": ("", True) for name in names}
    sources[PACKAGE] = (f"{GUARD}  from logra_kernels.run import Run\n", True)
    assert problems_of(sources | {f"{PACKAGE}.run": (text, False)}) == []


def test_the_package_root_holds_only_what_every_room_may_need() -> None:
    assert {path.stem for path in (ROOT / PACKAGE).glob("*.py")} == ROOT_MODULES


@pytest.mark.parametrize("code", ["import logra_kernels.store", "from logra_kernels import Store"])
def test_reading_a_store_needs_no_torch(code: str) -> None:
    forbidden = ("torch", "transformers", "triton")
    check = f"{code}\nimport sys\nassert not set({forbidden}) & set(sys.modules)"
    output(sys.executable, "-c", check)


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name="torch")

sys.meta_path.insert(0, NoTorch())
"""


@pytest.mark.parametrize(
    "code",
    [
        "from logra_kernels import Attributor",
        "import logra_kernels; logra_kernels.init",
        "import logra_kernels; logra_kernels.ops",
        "from logra_kernels.cli import main\n"
        "sys.exit(main(['log', '--model', 'm', '--data', 'd', '--out', 'o']))",
        "from logra_kernels.cli import main\n"
        "sys.exit(main(['query', '--model', 'm', '--store', 's', '--prompt', 'p']))",
    ],
)
def test_a_missing_torch_is_said_with_the_build_to_take(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (1, 2)
    last = done.stderr.splitlines()[-1]
    assert "torch is not installed; without it logra_kernels only reads" in last
    assert "pip install torch --index-url" in last


def test_every_public_name_is_there() -> None:
    assert set(logra_kernels.__all__) <= set(dir(logra_kernels))
    for name in logra_kernels._HOMES:
        assert getattr(logra_kernels, name) is not None
    with pytest.raises(AttributeError, match="module 'logra_kernels' has no attribute 'nonsense'"):
        _ = logra_kernels.nonsense  # type: ignore[attr-defined]


def test_type_checkers_see_the_names_that_are_there() -> None:
    """The imports under TYPE_CHECKING are those of the table, from the same modules."""
    seen = {}
    for node in ast.walk(ast.parse(Path(logra_kernels.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            home = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            for alias in node.names:
                assert alias.asname in (None, alias.name), "re-exported under its own name"
                if alias.name == "*":
                    public = importlib.import_module(f"{PACKAGE}.{home}").__all__
                    seen.update(dict.fromkeys(public, home))
                else:
                    seen[alias.name] = home or alias.name
    assert seen == logra_kernels._HOMES


# Without these libraries' types mypy takes three seconds instead of a minute.
MYPY_INI = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,numpy.*,pyarrow.*,safetensors.*,yaml.*,tqdm.*]
follow_imports = skip
"""
PROGRAM = """
import logra_kernels as logra
run = logra.init("a")
logra.watch(run, names=["mlp"])
logra.scores()
logra.initt("a")
run.watsch()
with run([1]) as batch: batch.get_logg()
logra.ops.scorez
store: int = logra.Store.open("a")
logra.Config(rank=8), logra.isa(), run.get_log(), batch.get_log()
logra.set_isa("avx2"); logra.eval()
"""


def test_a_type_checker_refuses_names_that_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(MYPY_INI)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "program.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    errors = re.findall(r"program\.py:(\d+): error: ([^;\n]*)", done.stdout)
    assert [(int(line), text.split("  [")[0]) for line, text in errors] == [
        (4, 'Unexpected keyword argument "names"'),
        (5, 'Missing positional arguments "queries", "rows" in call to "scores"'),
        (6, 'Module has no attribute "initt"'),
        (7, '"LogixRun" has no attribute "watsch"'),
        (8, '"LogixPass" has no attribute "get_logg"'),
        (9, 'Module has no attribute "scorez"'),
        (10, "Incompatible types in assignment (expression has type \"Store\", variable has type "
         "\"int\")"),
    ], done.stdout + done.stderr  # fmt: skip


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
