"""Shared by all tests: import paths, quiet threads, the parity table at the end of the run."""

import json
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--parity-json", type=Path, help="also write how far each model is from the published one to this file")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter, config):
    """Print how far each model is from the published one."""
    import parity

    if config.getoption("--parity-json"):
        config.getoption("--parity-json").write_text(json.dumps(parity.worst_logits()))

    lines = parity.table()
    if lines:
        terminalreporter.section("parity with the published models (error relative to the largest value)")
        for line in lines:
            terminalreporter.write_line(line)
