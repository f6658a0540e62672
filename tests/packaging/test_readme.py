"""The README's twenty lines, run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

from tree import ROOT, environment


def test_the_twenty_lines(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        [end, str(rank)] for end in ("top", "bottom") for rank in (1, 2, 3)
    ]
    assert lines[0][-1] == "17", "an example is most influential for itself"


def test_the_pages_it_names_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page for page in re.findall(r"\]\(([^)#]+)", text) if "://" not in page]
    assert pages
    assert [page for page in pages if not (ROOT / page).exists()] == []
