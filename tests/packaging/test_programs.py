"""What a reader would run: the README's lines, the documentation's programs, the examples."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from tree import ROOT, output

from logra_kernels import Store

# "store" opens what "your-own-model" wrote
PAGES = ("getting-started", "your-own-model", "store", "doctor")


def program_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def test_the_twenty_lines(tmp_path: Path) -> None:
    printed = output(sys.executable, "-c", program_of(ROOT / "README.md"), cwd=tmp_path)
    lines = [line.split() for line in printed.splitlines()]
    assert [line[:2] for line in lines] == [
        [end, str(rank)] for end in ("top", "bottom") for rank in (1, 2, 3)
    ]
    assert lines[0][-1] == "17", "an example is most influential for itself"


def test_the_pages_it_names_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page for page in re.findall(r"\]\(([^)#]+)", text) if "://" not in page]
    assert pages
    assert [page for page in pages if not (ROOT / page).exists()] == []


def test_every_program_of_the_documentation_is_run_here() -> None:
    with_programs = {page.stem for page in (ROOT / "docs").glob("*.md") if program_of(page)}
    assert with_programs == set(PAGES)


def test_the_documentations_programs_run(tmp_path: Path) -> None:
    """Page after page, in one folder."""
    for module in ("transformers", "tokenizers"):
        pytest.importorskip(module)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT)])}
    said = {
        page: output(
            sys.executable, "-c", program_of(ROOT / f"docs/{page}.md"), cwd=tmp_path, env=env
        )
        for page in PAGES
    }
    best = said["getting-started"].splitlines()[0]
    assert best.startswith("top 1 "), "the first line is the most influential example"
    assert "got a mean" in said["your-own-model"], "the averaged loss was refused"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("examples")
    for file in (ROOT / "examples").iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


def test_listings_of_appendix_b(folder: Path) -> None:
    printed = output(sys.executable, "extraction.py", cwd=folder)
    assert "48 examples logged in logra/llm" in printed
    store = Store.open(folder / "logra" / "llm")
    assert len(store.modules) == 6
    assert all((m.ko, m.ki) == (16, 16) for m in store.modules)
    assert store.verify() == []
    assert store.load_curvature("raw")[1]["count"] == 48
    # a query that repeats a training sentence finds it first
    query, best = "the tired crew takes in the sails", "the tired crew takes in the sails before"
    lines = output(sys.executable, "influence.py", cwd=folder).splitlines()
    assert best in lines[lines.index(query) + 1]


def test_figure_3(folder: Path) -> None:
    text = output(sys.executable, "figure3.py", cwd=folder)
    assert text.startswith("[3, 48] scores")
    assert "a neighbour waters: a neighbour waters the roses before sunrise" in text
