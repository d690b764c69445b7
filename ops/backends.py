"""Which code computes an operator: `reference`, `chunked` or `triton`.

`choose_backend` is the one place that decides. Each `can_run_*` answers with the reason why not, so that a backend asked for by
name can say it, and `backend_report` can list it. They look at the map `x` and at the call's other tensors, `operands` by name.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

BACKENDS = ("reference", "chunked", "triton")

MAX_STATES = 64
"""State variables N that the Triton kernels are tested for."""

MAX_RANK = 256
"""Largest rank R of a low-rank step for which the tiles of the Triton kernels fit the shared memory of every GPU, 99 KiB."""


def can_run_reference(x: Tensor, **operands: Tensor | None) -> str | None:
    """None if the reference can run on `x`, else why not. It always can."""
    return None


def can_run_chunked(x: Tensor, **operands: Tensor | None) -> str | None:
    """None if the chunked backend (plain PyTorch, any device) can run on `x`, else why not."""
    return None


def can_run_triton(x: Tensor, **operands: Tensor | None) -> str | None:
    """None if the Triton kernels can run on `x` and `operands`, of which `A` is (..., N) and `dt_weight` (..., R), else why not."""
    taken = (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in taken:
        return f"the Triton kernels take float16, bfloat16 and float32, not {x.dtype}"
    for name, tensor in operands.items():  # a float64 parameter asks for states in float64
        if tensor is not None and tensor.dtype not in taken:
            return f"the Triton kernels take float16, bfloat16 and float32, and {name} is {tensor.dtype}"
    A = operands.get("A")
    if A is not None and A.shape[-1] > MAX_STATES:
        return f"A has {A.shape[-1]} state variables, and the Triton kernels take up to {MAX_STATES}"
    weight = operands.get("dt_weight")
    if weight is not None and weight.shape[-1] > MAX_RANK:
        return f"dt_weight has rank {weight.shape[-1]}, and the Triton kernels take up to {MAX_RANK}, or a full step"
    return _device_refusal(x.device.type, x.device.index)


@torch.compiler.assume_constant_result
def _device_refusal(kind: str, index: int | None) -> str | None:
    """Why Triton cannot serve a device, or None. Under TRITON_INTERPRET=1 it serves the CPU instead: it interprets the kernels."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y"):
        return None if kind == "cpu" else f"TRITON_INTERPRET is set, and Triton's interpreter takes CPU tensors, not {kind}"
    if kind != "cuda":
        return f"the Triton kernels need a CUDA GPU (or TRITON_INTERPRET=1 on a CPU), and this is {kind!r}"
    if torch.version.hip is not None:
        return "the Triton kernels are not tested on ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"the Triton kernels need compute capability 8.0 or more, and {torch.cuda.get_device_name(index)} has {major}.{minor}"
        )
    return None


def backend_report(x: Tensor) -> dict[str, str | None]:
    """Every backend, with the reason why it cannot run on `x` or None where it can."""
    return {"reference": can_run_reference(x), "chunked": can_run_chunked(x), "triton": can_run_triton(x)}


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(f"visionssm: a GPU tensor takes the slow chunked backend because {reason}", RuntimeWarning, stacklevel=5)


@torch.compiler.assume_constant_result  # said while compiling, which would break off at a warning
def _tell_slow(reason: str) -> None:
    _warn_slow(reason)


def choose_backend(x: Tensor, name: str | None = None, **operands: Tensor | None) -> str:
    """The backend for an operator on `x` and `operands`: `name` if given and able, else the best that can run.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend asked for by name cannot run here; the message says why.
    """
    able = {"reference": can_run_reference, "chunked": can_run_chunked, "triton": can_run_triton}
    if name is not None:
        if name not in BACKENDS:
            near = difflib.get_close_matches(str(name), BACKENDS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"backend: unknown backend {name!r}{hint} (known: {', '.join(BACKENDS)}, or None for the best that can run)"
            )
        reason = able[name](x, **operands)
        if reason is not None:
            raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")
        return name
    if x.is_cuda:
        reason = can_run_triton(x, **operands)
        if reason is None:
            return "triton"
        _tell_slow(reason)
    return "chunked"
