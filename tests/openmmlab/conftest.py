"""These tests need mmdet and mmseg. Without them `make test` skips all by one line; `make test-openmmlab` lets none skip."""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "pycocotools")
MISSING = [name for name in PACKAGES if find_spec(name) is None]
REQUIRED = os.environ.get("VISIONSSM_REQUIRE_OPENMMLAB") == "1"

if MISSING and not REQUIRED:
    collect_ignore_glob = ["test_[!_]*.py"]
else:
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.registry import DefaultScope
    from mmengine.visualization import Visualizer


def forget_instances():
    """mmengine names its global objects by config and second, or not at all: two runs in one process would share them."""
    for manager in (DefaultScope, MessageHub, MMLogger, Visualizer, *Visualizer.__subclasses__()):
        for logger in manager._instance_dict.values():
            for handler in getattr(logger, "handlers", ()):
                handler.close()
        manager._instance_dict.clear()


@pytest.fixture(autouse=True)
def fresh_mmengine():
    """A function that makes mmengine forget its global objects, as happens after every test."""
    yield forget_instances
    if not MISSING:
        forget_instances()


@pytest.fixture
def missing():
    """Names of the packages that are not installed."""
    return MISSING


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where everything is installed on purpose, a skip is a failure, but for want of GPUs."""
    outcome = yield
    report = outcome.get_result()
    if REQUIRED and report.skipped and not item.get_closest_marker("gpu"):
        report.outcome, report.longrepr = "failed", f"skipped although nothing may be: {report.longrepr}"


@pytest.fixture(scope="session")
def digit_scenes(tmp_path_factory):
    """The folder of the demos' data."""
    folder = tmp_path_factory.mktemp("digit-scenes")
    tool = Path(__file__).parents[2] / "tools" / "draw_digit_scenes.py"
    arguments, sys.argv = sys.argv, [str(tool), str(folder)]
    try:
        runpy.run_path(str(tool), run_name="__main__")
    finally:
        sys.argv = arguments
    return folder
