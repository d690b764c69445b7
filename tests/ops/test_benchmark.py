"""tools/benchmark_ops.py: a run that may not report leaves what an older one reported."""

import importlib
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("OMP_PROC_BIND", "false")  # which the tool would set for every process after it
    return importlib.import_module("benchmark_ops")


def test_red_tests_of_the_kernels_report_nothing(tool, monkeypatch, tmp_path):
    older = tmp_path / "ops.csv"
    older.write_text("an older run\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 1))
    with pytest.raises(SystemExit, match="the tests of the kernels are red; no time is worth reporting"):
        tool.report(tool.cuda_rows(["mamba"]), older)
    assert older.read_text() == "an older run\n"


def test_an_operator_that_is_off_reports_nothing(tool, monkeypatch, tmp_path):
    def off(*args, **options):
        gradients = measured(*args, **options)
        if options.get("backend") != "reference":
            gradients["dA"] = gradients["dA"] * 1.001
        return gradients

    measured = tool.outputs_and_gradients
    monkeypatch.setattr(tool, "outputs_and_gradients", off)
    monkeypatch.setitem(tool.CPU_SHAPES, "cross", [((4, 4), 8, 1, 2, tool.CROSS)])
    with pytest.raises(SystemExit, match=r"dA is off by 1\.0e-03"):
        tool.report(tool.cpu_rows(["cross"]), tmp_path / "ops.csv")
    assert not list(tmp_path.iterdir())


def test_rows_are_written_as_they_come(tool, tmp_path):
    where = {"device": "a", "torch": "2", "triton": "3", "date": "2026-01-01"}
    row = tool.Row("cross", "1x2", "float32", "forward", "chunked", *map(float, range(7)), **where)

    def rows():
        yield row
        assert len((tmp_path / "ops.csv").read_text().splitlines()) == 2
        yield row

    assert tool.report(rows(), tmp_path / "ops.csv") == [row, row]
    assert len((tmp_path / "ops.csv").read_text().splitlines()) == 3
