"""Shared by all tests: import paths, quiet threads, the parity table at the end of the run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """Print how far each model is from the published one."""
    import parity

    lines = parity.table()
    if lines:
        terminalreporter.section("parity with the published models (error relative to the largest value)")
        for line in lines:
            terminalreporter.write_line(line)
