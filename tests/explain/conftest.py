"""What every test here gets: the golden files on the path, one thread, and by its fixture every kind of model."""

import sys
from pathlib import Path

import pytest
import torch
from small_models import MODELS

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
