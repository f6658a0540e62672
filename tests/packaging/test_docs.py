"""The programs of the documentation, run as a reader would: page after page, in one folder."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# "store" opens what "your-own-model" wrote
PAGES = ("getting-started", "your-own-model", "store", "doctor")


def program_of(page: str) -> str:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def test_every_program_is_run_here() -> None:
    with_programs = {page.stem for page in (ROOT / "docs").glob("*.md") if program_of(page.stem)}
    assert with_programs == set(PAGES)


def test_the_programs_run(tmp_path: Path) -> None:
    for module in ("transformers", "tokenizers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    said = {}
    for page in PAGES:
        done = subprocess.run(
            [sys.executable, "-c", program_of(page)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT)])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{page}: {done.stderr[-4000:]}"
        said[page] = done.stdout
    best = said["getting-started"].splitlines()[0]
    assert best.startswith("top 1 "), "the first line is the most influential example"
    assert "got a mean" in said["your-own-model"], "the averaged loss was refused"
