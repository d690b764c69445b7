"""The CUDA C++ kernels of ops/csrc compiled by g++ for a CPU, every CUDA thread a fiber: their tests need no GPU."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from visionssm.ops.kernels import cuda

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


@functools.cache
def _folder():
    return Path(tempfile.mkdtemp(prefix="emulated_kernels_"))


@functools.cache
def compile_kernel(kernel, options, device, shared_bytes):
    """Stands in for `cuda.compile_kernel`."""
    library = _folder() / f"{hashlib.sha1(repr((kernel, options)).encode()).hexdigest()}.so"
    source = library.with_suffix(".cu")
    source.write_text(cuda.source(kernel))
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", str(HERE / "main.cc"), "-o", str(library)]
    command += [*os.environ.get("EMULATOR_FLAGS", "").split(), f"-I{HERE}", f"-DKERNEL={kernel}", f'-DSOURCE="{source}"', *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    emulate = ctypes.CDLL(str(library)).emulate

    def launch(grid, block, arguments, shared_bytes):
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        assert emulate(grid[0], block[0], pointers) == 0, f"{kernel}: threads wait for each other for ever"

    return launch
