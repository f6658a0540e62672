"""The examples run as a reader would run them: in their folder, one after the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from logra_kernels import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("examples")
    for file in (ROOT / "examples").iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


def run(folder: Path, name: str) -> str:
    # the package is found whether it is installed or not
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, name],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_listings_of_appendix_b(folder: Path) -> None:
    assert "48 examples logged in logra/llm" in run(folder, "extraction.py")
    store = Store.open(folder / "logra" / "llm")
    assert len(store.modules) == 6
    assert all((m.ko, m.ki) == (16, 16) for m in store.modules)
    assert store.verify() == []
    assert store.load_curvature("raw")[1]["count"] == 48
    text = run(folder, "influence.py")
    # a query that repeats a training sentence finds it first
    query, best = "the tired crew takes in the sails", "the tired crew takes in the sails before"
    lines = text.splitlines()
    assert best in lines[lines.index(query) + 1]


def test_figure_3(folder: Path) -> None:
    text = run(folder, "figure3.py")
    assert text.startswith("stat: 'kfac' (Kronecker-factored curvature) is not available")
    assert "[3, 48] scores" in text
    assert "a neighbour waters: a neighbour waters the roses before sunrise" in text
