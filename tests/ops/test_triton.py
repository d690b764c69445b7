"""Choosing the Triton backend, and its kernels under Triton's interpreter in a pytest process of their own."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from visionssm.ops import backends, cross_selective_scan
from visionssm.ops.testing import cross_selective_scan_inputs


@pytest.mark.parametrize(
    "kernels", ["test_triton_kernels.py", "test_csrc_kernels.py", "test_csrc_variants.py", "test_csrc_sequence.py"]
)
def test_kernels_under_the_interpreter(kernels):
    """The interpreter is chosen when Triton is first imported, hence the new process. CUDA C++ is emulated beside it."""
    pytest.importorskip("triton")
    if kernels.startswith("test_csrc") and shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(kernels))]
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


def test_shared_memory_is_what_the_kernels_ask_for():
    """cuda.py states the size of csrc's `Shared`, which asserts it when compiled; a block of the smallest GPUs may have 99 KiB."""
    from types import SimpleNamespace

    pytest.importorskip("triton")
    from visionssm.ops.kernels import cuda

    for kernel, rank, channels in itertools.product(cuda.VARIANTS, range(1, cuda.MAX_RANK + 1), (8, 64, 96, 128, 160, 768)):
        scan = SimpleNamespace(rank=rank, channels=channels, k=4, x=torch.empty(2, 1, 9, channels))
        case = cuda._Case(kernel, scan, scaled=True)
        assert case.resident >= 1
        assert case.shared_bytes <= 99 * 1024, (kernel, rank, case.variant)


def test_shared_memory_of_a_sequence():
    """The same for sequence.py, of which as many blocks share a multiprocessor as the splits reckon with."""
    pytest.importorskip("triton")
    from visionssm.ops.kernels import cuda, sequence

    for n in sequence.STATES:
        for batch, channels in ((128, 384), (128, 40), (8, 384), (1, 384), (1, 96), (1, 1)):
            sizes = (batch, 1, channels, 6085, 132)
            for chosen in (sequence.forward_plan(n, *sizes), sequence.backward_plan(n, *sizes)):
                blocks = sequence.shape_macros(n, chosen)["BLOCKS"]
                assert blocks * (sequence._shared_bytes(n, chosen) + 1024) <= cuda.SHARED, (n, chosen)
                assert blocks * chosen.warps >= (11 if n <= 16 else 6), (n, chosen)


@pytest.mark.parametrize("kernel", ["step_gradient_kernel", "weight_gradient_kernel"])
def test_shared_memory_of_the_largest_rank(kernel):
    """Compiled for the smallest GPUs, of which a block may have 99 KiB."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from visionssm.ops.kernels import projection

    function, rank = getattr(projection, kernel), backends.MAX_RANK
    sizes = {"K": 4, "R": rank, "BR": rank, "BP": 64, "BC": 64, "TF32": True, "SPLIT": True}
    sizes = {name: value for name, value in sizes.items() if name in function.arg_names}
    pointers = {name: "*bf16" if name in ("dt_ptr", "ddt_ptr") else "*fp32" for name in function.arg_names if name.endswith("_ptr")}
    signature = {name: pointers.get(name, "constexpr" if name in sizes else "i32") for name in function.arg_names}
    target = GPUTarget("cuda", 86, 32)
    compiled = compile(ASTSource(function, signature, sizes), target=target, options={"num_warps": 4})
    assert compiled.metadata.shared <= 99 * 1024


def test_no_nvrtc_is_told_once(monkeypatch):
    pytest.importorskip("triton")
    from visionssm.ops.kernels import cuda

    def compile_kernel(*args):
        raise OSError("no libnvrtc")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", compile_kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.delenv("VISIONSSM_CSRC", raising=False)
    cuda._nvrtc_works.cache_clear()
    with pytest.warns(RuntimeWarning, match="NVRTC cannot compile.*Triton kernels serve.*no libnvrtc"):
        assert not cuda.enabled(torch.device("cuda", 0))
    assert not cuda.enabled(torch.device("cuda", 0))
    cuda._nvrtc_works.cache_clear()


def test_a_kernel_that_does_not_compile_is_told_once(monkeypatch):
    pytest.importorskip("triton")
    from visionssm.ops.kernels import cuda

    tried = []

    def compile_kernel(source, kernel, nvcc_options):
        tried.append(nvcc_options)
        raise RuntimeError("Kernel compilation failed: no such intrinsic")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", compile_kernel)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    case = ("scan_forward", ("-DRANK=-1",), torch.device("cuda", 0), 0)
    with (
        pytest.raises(cuda.NotCompiledError),
        pytest.warns(RuntimeWarning, match=r"(?s)cannot compile scan_forward .*Triton kernels serve.*no such intrinsic"),
    ):
        cuda.compile_kernel(*case)
    with pytest.raises(cuda.NotCompiledError):
        cuda.compile_kernel(*case)
    assert tried == [["-DRANK=-1"]]


def test_every_thread_has_a_context_before_it_launches(monkeypatch):
    pytest.importorskip("triton")
    from visionssm.ops.kernels import cuda

    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append((threading.get_ident(), device)))
    monkeypatch.setattr(cuda, "_compiled", lambda *case: print)
    monkeypatch.setattr(cuda, "_thread", threading.local())
    first, second = (torch.device("cuda", i) for i in range(2))

    def launch_all():
        for device in (first, second, first):
            cuda.compile_kernel("scan_forward", (), device, 0)

    thread = threading.Thread(target=launch_all)
    thread.start()
    thread.join()
    launch_all()
    assert [device for _, device in asked] == 2 * [first, second]
    assert len({ident for ident, _ in asked}) == 2


def test_the_kernels_can_be_turned_off(monkeypatch):
    pytest.importorskip("triton")
    from visionssm.ops.kernels import cuda

    monkeypatch.setenv("VISIONSSM_CSRC", "0")
    assert not cuda.enabled(torch.device("cuda", 0))


@pytest.mark.parametrize("tuner", ["tune_scan", "tune_sequence"])
def test_a_tuner_keeps_its_last_results_where_there_is_no_gpu(tuner, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / f"{tuner}.csv"
    out.write_text("an earlier run")
    command = [sys.executable, str(Path(__file__).parents[2] / "tools" / f"{tuner}.py"), "--out", str(out)]
    run = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == f"{tuner}: torch sees no CUDA device\n"
    assert out.read_text() == "an earlier run"
