"""docs/explain.md: its example runs, its tables are those that the tools make of the measured files."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from visionssm import explain
from visionssm.explain.attention import INCLUDES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE, re.DOTALL)[1].strip().splitlines()


def test_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(example, {})


def test_words_of_include():
    assert tuple(re.findall(r'^\| `"([\w+]+)"` \|', PAGE, flags=re.MULTILINE)) == INCLUDES


def test_pictures_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / path).stat().st_size < 300_000


@pytest.mark.parametrize(
    ("name", "script", "file"),
    [("evaluation", "evaluate_explain", "explain_evaluation.csv"), ("cost", "benchmark_explain", "explain_cost_cpu.csv")],
)
def test_tables_are_the_measured_ones(name, script, file):
    lines = tool(script).table(ROOT / "benchmarks" / file)
    assert len(lines) > 4
    assert section(name) == lines


def test_every_method_is_known():
    for name in re.findall(r"explain\.(\w+)\(", PAGE):
        assert name in explain.__all__, name
