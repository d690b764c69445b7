"""The documents' tables are those of the files that commands wrote."""

import csv
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE = {"what": "bare step", "compiled": "default", "processes": "1", "images_per_s": "1000", "scaling": ""}
MACHINE = {"config": "c", "batch": "128", "device": "a GPU", "torch": "2.11.0", "date": "2026-01-01"}


@pytest.fixture
def copy(tmp_path):
    for folder in ("tools", "docs", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(("tool", "document"), [("benchmark_training", "training"), ("benchmark_dense", "dense")])
def test_documents_are_up_to_date(tool, document, copy):
    page = copy / "docs" / f"{document}.md"
    written = subprocess.run(
        [sys.executable, str(copy / "tools" / f"{tool}.py"), "--document"], capture_output=True, text=True, timeout=300
    )
    assert written.returncode == 0, written.stderr
    assert page.read_text() == (ROOT / "docs" / f"{document}.md").read_text()


def test_cifar10_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = runpy.run_path(str(ROOT / "tools" / "ship_weights.py"))
    with (ROOT / "benchmarks" / "cifar10_h200.csv").open(newline="") as file:
        lines = tool["document"](list(csv.DictReader(file)))
    assert "\n".join(lines) in (ROOT / "docs" / "training.md").read_text()


def test_a_loop_is_compared_with_the_bare_step_before_it_compiled_alike(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    table = runpy.run_path(str(ROOT / "tools" / "benchmark_training.py"))["table"]
    loop = {**BARE, "what": "loop, synthetic images", "images_per_s": "900"}
    others = [{**loop, "compiled": "reduce-overhead"}, {**loop, "processes": "2", "scaling": "0.97"}]
    rows = [{**MACHINE, **row} for row in (BARE, loop, *others)]
    lines = table(rows)
    assert [line.split("|")[5].strip() for line in lines[2:6]] == ["", "0.900", "", ""]
    assert lines[5].split("|")[6].strip() == "0.97"
