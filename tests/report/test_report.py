"""The page: what it must hold, what it must not let through."""

import copy
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from logra_kernels.report import (
    FORMAT,
    VERSION,
    read_results,
    render,
    write_report,
    write_results,
)
from logra_kernels.report.render import format_bytes, format_score, preview, shade

HOSTILE = "</span><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'single'"


def passage(rank: int, score: float, name: str, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "row": rank, "id": name, "score": score, "text": f"text {name}", **more}


@pytest.fixture
def results() -> dict[str, Any]:
    tokens = [["The ", 0.5], ["cat ", -0.25], ["sat", 0.05]]
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": "Why a cat?",
        "created": "2026-11-22T05:10:00+00:00",
        "model": {"path": "tiny", "dtype": "float32", "fingerprint": {"weights": "ab12cd34"}},
        "store": {
            "path": "store",
            "rows": 1234,
            "dim": 96,
            "bytes": 236_928,
            "dtype": "float16",
            "modules": ["layers.0.up", "layers.1.up"],
            "projection": {"kind": "normal", "rank": [4, 4], "seed": 7},
        },
        "curvature": {"kind": "raw", "damping_scale": 0.1},
        "notes": ["Scored as if trained on."],
        "queries": [
            {
                "id": "cats",
                "prompt": "What sat?",
                "text": "The cat sat.",
                "origin": "given",
                "expected": {"what": "cats", "ranks": {"l-relatif": 1, "gradient-dot": 9}},
                "modes": [
                    {
                        "mode": "l-relatif",
                        "top": [passage(1, 0.3, "a/1", title="Cats", tokens=tokens)],
                        "bottom": [passage(1, -0.2, "z/9")],
                    },
                    {
                        "mode": "gradient-dot",
                        "top": [passage(1, 812.0, "b/2"), passage(2, 700.0, "a/1")],
                        "bottom": [],
                    },
                ],
            }
        ],
    }


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_page_holds_query_rankings_facts_and_notes(results: dict[str, Any]) -> None:
    page = Page(render(results))
    assert page.open == []
    text = " ".join(page.text.split())
    for wanted in (
        "Why a cat?",
        "What sat?",
        "The cat sat.",
        "answer given",
        "l-RelatIF",
        "Gradient dot product",
        "Cats",
        "+0.300",
        "+812.0",
        "−0.200",
        "The 1 least influential",
        "l-RelatIF ranks it #1, Gradient dot product ranks it #9.",
        "a/1 · Gradient dot product: #2",
        "1,234",
        "236.9 KB",
        "2: layers.0.up … layers.1.up",
        "normal, rank 4 × 4, seed 7",
        "λ = 0.1 × mean eigenvalue, per module",
        "ab12cd34",
        "Scored as if trained on.",
        "2026-11-22 05:10",
    ):
        assert wanted in text, wanted


def test_page_asks_nothing_of_the_network(results: dict[str, Any]) -> None:
    html = render(results)
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_everything_from_the_results_is_escaped(results: dict[str, Any]) -> None:
    tags = [tag for tag, _ in Page(render(results)).tags]
    hostile = copy.deepcopy(results)

    def poison(value: Any, key: str | None = None) -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        kept = ("format", "created", "mode", "kind", "dtype")
        return HOSTILE if isinstance(value, str) and key not in kept else value

    html = render(poison(hostile))
    page = Page(html)
    # One more paragraph of ids may appear, but no element that the results brought along.
    assert {tag for tag, _ in page.tags} == set(tags)
    assert "<script" not in html
    assert "<img" not in html
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("alert(1)") >= 10


def test_shades_follow_sign_and_size() -> None:
    html = str(shade([("up", 1.0), ("half", 0.5), ("none", 0.0), ("down", -1.0), ("<b>", 0.25)]))
    assert '<span class="p8" title="+1.000">up</span>' in html
    assert '<span class="p4" title="+0.500">half</span>none' in html
    assert '<span class="n8" title="−1.000">down</span>' in html
    assert '<span class="p2" title="+0.250">&lt;b&gt;</span>' in html


def test_shown_contributions_keep_their_sum() -> None:
    # The first two tokens are parts of one character, the last shows nothing.
    html = str(shade([("", 0.2), ("é", 0.3), ("x", -1.0), ("", 0.5)]))
    assert re.findall(r'title="([^"]*)"', html) == ["+0.500", "−0.500"]


def test_all_zero_contributions_are_plain_text() -> None:
    assert str(shade([("a ", 0.0), ("b", 0.0)])) == "a b"


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (0.0, "+0.000"),
        (0.12345, "+0.123"),
        (-12.345, "−12.35"),
        (812.04, "+812.0"),
        (-123456.7, "−123,457"),
        (1.5e-7, "+1.50e−07"),
        (-2.5e9, "−2.50e+09"),
    ],
)
def test_scores_are_readable(score: float, text: str) -> None:
    assert format_score(score) == text


def test_sizes_and_previews_are_readable() -> None:
    assert format_bytes(999) == "999 B"
    assert format_bytes(22_560_000) == "22.6 MB"
    assert preview({"text": "Cats\n\nThey sit.", "title": "Cats"}, 40) == "They sit."
    assert preview({"text": "a b c d e f"}, 6) == "a b c…"


def test_results_survive_the_file(results: dict[str, Any], tmp_path: Path) -> None:
    write_results(results, tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == results
    write_report(results, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == render(results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]


def test_bad_results_files(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    refused("results: no file", read_results, path, error=FileNotFoundError)
    path.write_text("{", encoding="utf-8")
    refused("not JSON", read_results, path)
    path.write_text("[]", encoding="utf-8")
    refused(f"expected format '{FORMAT}', got None", read_results, path)
    path.write_text(json.dumps({"format": FORMAT, "version": 2}), encoding="utf-8")
    refused("expected version 1, got 2", read_results, path)
    del results["curvature"]
    refused("no key 'curvature', which a report needs", render, results)


FIRST = ("queries", 0, "modes", 0, "top", 0)
MALFORMED: list[tuple[tuple[Any, ...], Any, str]] = [
    (("queries",), 7, "queries: expected a list, got 7"),
    (("queries", 0), None, "queries[0]: expected an object, got None"),
    (("queries", 0, "modes"), ..., "no key 'queries[0].modes', which a report needs"),
    ((*FIRST, "score"), "1", "queries[0].modes[0].top[0].score: expected a number, got '1'"),
    ((*FIRST, "score"), float("nan"), "score: expected a number, got nan"),
    ((*FIRST, "tokens"), [["a"]], "tokens[0]: expected 2 entries, got 1"),
    (("store", "modules"), [], "store.modules: expected at least one, got none"),
    (("store", "projection"), "p", "store.projection: expected an object, got 'p'"),
    (("store", "rows"), True, "store.rows: expected an integer, got True"),
    (("model",), None, "model: expected an object, got None"),
    (("notes",), "n", "notes: expected a list, got 'n'"),
]


@pytest.mark.parametrize(("place", "value", "message"), MALFORMED)
def test_results_that_no_query_wrote(
    results: Any, tmp_path: Path, place: tuple[Any, ...], value: Any, message: str
) -> None:
    """A value replaced, or taken out (...)."""
    inner = results
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is ...:
        del inner[place[-1]]
    (tmp_path / "r.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"r\.json: (.*\.)?{re.escape(message)}"):
        read_results(tmp_path / "r.json")


def test_deep_results(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[" * 100_000, encoding="utf-8")
    refused("not JSON", read_results, tmp_path / "r.json")


def test_nothing_is_written_through_a_link(results: dict[str, Any], tmp_path: Path) -> None:
    """Neither through one in the page's place, nor through one in its temporary file's."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("r.html", "r.html.tmp", f"r.html.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_report(results, tmp_path / "r.html")
    (tmp_path / f"r.html.{os.getpid()}.tmp").unlink()
    write_report(results, tmp_path / "r.html")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "r.html").is_symlink()
