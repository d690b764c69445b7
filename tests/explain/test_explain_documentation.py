"""docs/explain.md: its example runs, its tables are those that the tools make of the measured files."""

import importlib
import re
from pathlib import Path

import pytest

from visionssm import explain
from visionssm.explain.attention import INCLUDES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return {name: importlib.import_module(name) for name in ("benchmark_explain", "document_sections", "evaluate_explain")}


def test_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(example, {})


def test_words_of_include():
    assert tuple(re.findall(r'^\| `"([\w+]+)"` \|', PAGE, flags=re.MULTILINE)) == INCLUDES


def test_pictures_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / path).stat().st_size < 300_000


def test_sections_are_the_measured_ones(tools):
    """Whoever measures again fills the page again, and no other figure gets between the marks."""
    measured = {**tools["evaluate_explain"].sections(), **tools["benchmark_explain"].sections()}
    marked = dict(re.findall(r"<!-- (\S+) -->\n(.*?)<!-- /\1 -->", PAGE, flags=re.DOTALL))
    assert marked.keys() == measured.keys()
    assert len(measured["evaluation"]) > 4
    assert {name: text.splitlines() for name, text in marked.items()} == measured


def test_a_device_is_measured_once(tools):
    """The tables name models and sizes, so that a second row of one could not be told from the first."""
    for device in ("cpu", "cuda"):
        rows = tools["benchmark_explain"].read(ROOT / "benchmarks" / f"explain_cost_{device}.csv")
        assert len({(row["model"], row["size"], row["include"]) for row in rows}) == len(rows) > 0


def test_sections_are_replaced(tools, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- /one -->\n<!-- two -->\n<!-- /two -->\n")
    tools["document_sections"].replace_sections(page, {"one": [], "two": [r"\1", "|"]})
    assert page.read_text() == "a\n<!-- one -->\n<!-- /one -->\n<!-- two -->\n\\1\n|\n<!-- /two -->\n"
    with pytest.raises(KeyError, match="no section three"):
        tools["document_sections"].replace_sections(page, {"three": []})


def test_every_method_is_known():
    for name in re.findall(r"explain\.(\w+)\(", PAGE):
        assert name in explain.__all__, name
