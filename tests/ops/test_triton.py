"""Choosing the Triton backend, and its kernels under Triton's interpreter in a pytest process of their own."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from visionssm.ops import backends, cross_selective_scan
from visionssm.ops.testing import cross_selective_scan_inputs


def test_kernels_under_the_interpreter():
    """The interpreter is chosen when Triton is first imported, hence the new process."""
    pytest.importorskip("triton")
    kernels = Path(__file__).with_name("test_triton_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(kernels)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " skipped" not in run.stdout, run.stdout[-2000:]


def test_importing_visionssm_loads_no_kernel():
    code = "import sys, visionssm.ops; assert 'visionssm.ops.kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that tensors live on a CUDA device of a given capability."""

    def pretend(capability, hip=None):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "a mocked GPU")

    return pretend


class _OnGpu:
    """What the choice of a backend looks at."""

    def __init__(self, dtype=torch.float32):
        self.dtype, self.device, self.is_cuda = dtype, torch.device("cuda", 0), True


def test_a_capable_gpu_takes_triton(gpu):
    gpu((9, 0))
    assert backends.choose_backend(_OnGpu()) == "triton"


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "reason"),
    [
        ((7, 5), None, torch.float32, r"compute capability 8\.0 or more, and a mocked GPU has 7\.5"),
        ((9, 4), "6.2", torch.float32, "ROCm"),
        ((9, 0), None, torch.float64, r"not torch\.float64"),
    ],
)
def test_a_gpu_that_triton_cannot_serve(gpu, capability, hip, dtype, reason):
    gpu(capability, hip)
    backends._warn_slow.cache_clear()
    with pytest.raises(RuntimeError, match=reason):
        backends.choose_backend(_OnGpu(dtype), "triton")
    with pytest.warns(RuntimeWarning, match=reason):
        assert backends.choose_backend(_OnGpu(dtype)) == "chunked"
    with warnings.catch_warnings():  # once is loud enough
        warnings.simplefilter("error")
        assert backends.choose_backend(_OnGpu(dtype)) == "chunked"


def test_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = cross_selective_scan_inputs(1, (2, 2), 2, 1, ("h",), 1, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        cross_selective_scan(**inputs, paths=("h",), backend="triton")


def test_the_interpreter_takes_cpu_tensors_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.can_run_triton(torch.zeros(1)) is None
    assert "CPU tensors" in backends.can_run_triton(_OnGpu())
    assert backends.choose_backend(torch.zeros(1)) == "chunked"
