"""Which backend is chosen, and what is said when it is not the best."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from visionssm.ops import backends


def on_gpu(dtype):
    """What the choice looks at of a GPU tensor, on a machine that may have no GPU."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


def test_default_on_a_cpu():
    assert backends.choose_backend(torch.ones(1)) == "chunked"


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_by_name(name):
    assert backends.choose_backend(torch.ones(1), name) == name
    assert backends.choose_backend(on_gpu(torch.float64), name) == name


def test_best_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "can_run_triton", lambda x: None)
    assert backends.choose_backend(on_gpu(torch.bfloat16)) == "triton"
    assert backends.choose_backend(on_gpu(torch.bfloat16), "triton") == "triton"


def test_a_slow_fallback_on_a_gpu_warns_once():
    backends._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"takes the slow chunked backend because .*torch\.float64"):
        assert backends.choose_backend(on_gpu(torch.float64)) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend(on_gpu(torch.float64)) == "chunked"


def test_report_gives_a_reason_for_every_backend_that_cannot_run():
    report = backends.backend_report(torch.ones(1, dtype=torch.float64))
    assert tuple(report) == backends.BACKENDS
    assert report["reference"] is None
    assert report["chunked"] is None
    assert "float64" in report["triton"]
