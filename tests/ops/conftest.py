"""What every operator test gets: the golden files on the path, one thread, and memory that is never accidentally right."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it when algorithms must be deterministic
sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The tensors here are tiny: threads that wait for each other on a busy machine cost a hundred times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill torch.empty with NaN, so that an operator that leaves an output unwritten fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "chunked"], scope="session")
def backend(request):
    """Every backend that runs on a CPU."""
    return request.param
