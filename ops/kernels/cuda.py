"""The CUDA C++ kernels in csrc/: compiled for one case by NVRTC at its first call, about a second, with no nvcc and no headers.

They stand in for the Triton scan kernels where they were measured to be faster: one state variable, a low-rank step, 16-bit maps,
enough images to fill the device in one pass. All else, what NVRTC fails on, and every machine without it takes the Triton kernels.
`VISIONSSM_CSRC=0` turns them off.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .common import STEPS
from .reduce import merge_parts, sum_rows

if TYPE_CHECKING:
    from .launch import _Scan

MAX_RANK = 64
"""Largest rank of the step: beyond it the weight does not fit shared memory."""

SHARED = 227 * 1024
"""Bytes of shared memory of a Hopper multiprocessor, 1024 of which go with every block; elsewhere fewer blocks run at once."""

_LARGEST = 2**30  # strides travel as 32-bit integers, and are doubled there; sums of them do not
_thread = threading.local()
_SOURCES = Path(__file__).parent.parent / "csrc"


def suits(scan: _Scan) -> bool:
    """Whether the kernels serve a scan."""
    parameters = [t for t in (scan.A, scan.D, scan.weight, scan.bias) if t is not None]
    return (
        scan.n == 1
        and scan.weight is not None
        and scan.rank <= MAX_RANK
        and scan.x.dtype == scan.dt.dtype
        and scan.x.dtype in (torch.float16, torch.bfloat16)
        and scan.packed
        and _in_chunks(scan.x)
        and max(scan.dt.stride()) < _LARGEST
        and scan.k * scan.x.shape[2] * scan.channels < _LARGEST  # an image of dy, unmerged
        and all(t.dtype == torch.float32 for t in parameters)
        and enabled(scan.x.device)
    )


def enabled(device: torch.device) -> bool:
    """Whether the kernels may be used on a device."""
    return device.type == "cuda" and os.environ.get("VISIONSSM_CSRC", "1") != "0" and _nvrtc_works(device)


def scan_forward(scan: _Scan, states: Tensor, merge: bool) -> Tensor:
    """Write the states before every tile; returns y (batch, 1 or K, positions, C), of one path if `merge` adds them up."""
    case = _Case("scan_forward", scan, scaled=merge and scan.k > 1)
    y, scales = case.parts(states)
    tensors = [scan.x, scan.dt, scan.A, scan.D, scan.weight, scan.bias, y, scales, states]
    case.launch(tensors, [states.shape[2], *case.images, *_strides(scan.x), *_strides(scan.dt)])
    return merge_parts(y, scales, scan.size, scan.codes(), scan.x.dtype) if case.scaled else y


def scan_backward(scan: _Scan, dy: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    """From dy (batch, 1 or K, positions, C) and the forward's states to every gradient.

    Returns:
        dx like x, the gradient of dt | B | C (batch, positions, K, R + 2), dA (K, C), dD (K, C), ddt_weight (K, C, R),
        ddt_bias (K, C).
    """
    k, rank, x = scan.k, scan.rank, scan.x
    case = _Case("scan_backward", scan, scaled=x.shape[1] < k)
    dy = dy if _in_chunks(dy) else dy.contiguous()
    dx, scales = case.parts(states)
    rows = x.new_empty((case.blocks, x.shape[0], x.shape[2], k, rank + 2), dtype=x.dtype if case.blocks == 1 else torch.float32)
    sums = x.new_empty((case.groups, k * scan.channels * (rank + 3)), dtype=torch.float32)
    widths = [k * scan.channels * width for width in (1, 1, rank, 1)]
    tensors = [dy, x, scan.dt, scan.A, scan.D, scan.weight, scan.bias, states, dx, scales, rows, *sums.split(widths, dim=1)]
    strides = [*_strides(dy), *_strides(x), *_strides(scan.dt)]
    case.launch(tensors, [states.shape[2], *case.images, *strides, sums.stride(0)])
    shapes = ((k, scan.channels, *rest) for rest in ((), (), (rank,), ()))
    gradients = (g.view(shape) for g, shape in zip(sum_rows(sums, tuple(widths)), shapes, strict=True))
    rows = rows[0] if case.blocks == 1 else rows.sum(0).to(x.dtype)
    return (merge_parts(dx, scales, scan.size, scan.codes(), x.dtype) if case.scaled else dx), rows, *gradients


@dataclass(frozen=True)
class Variant:
    """How a kernel is built and its work cut up."""

    channels: int
    """Of a block, 32 * each * warps."""
    resident: int
    """Warps on a multiprocessor: what registers and shared memory have room for."""
    each: int = 1
    """Channels of a thread, 1 or 2; the backward has registers for one alone."""
    apart: bool = False
    """Let a block meet once a tile rather than twice, for more shared memory; backward only."""


# By the largest rank that each serves. The fastest of what tools/tune_scan.py timed on an H200 at VMamba-T's four stages.
VARIANTS = {
    "scan_forward": {
        6: Variant(channels=32, resident=16),
        12: Variant(channels=192, resident=12, each=2),
        24: Variant(channels=128, resident=12, each=2),
        64: Variant(channels=128, resident=16),
    },
    "scan_backward": {
        6: Variant(channels=96, resident=12),
        12: Variant(channels=192, resident=12, apart=True),
        24: Variant(channels=128, resident=16),
        48: Variant(channels=128, resident=8),
        64: Variant(channels=96, resident=9),  # not timed
    },
}


def variant(kernel: str, scan: _Scan) -> Variant:
    """The variant of a kernel, `scan_forward` or `scan_backward`, for a scan: in smaller blocks if that leaves fewer lanes idle."""
    tuned = next(tuned for rank, tuned in VARIANTS[kernel].items() if scan.rank <= rank)
    blocks = (tuned.channels, *range(tuned.channels - 32 * tuned.each, 0, -32 * tuned.each))
    return replace(tuned, channels=min(blocks, key=lambda block: -scan.channels % block))


class _Case:
    """What a kernel is compiled for, and how its work is cut up: `groups` of images, each walked by one block."""

    def __init__(self, kernel: str, scan: _Scan, scaled: bool) -> None:
        self.kernel, self.scan, self.scaled = kernel, scan, scaled
        self.variant = variant(kernel, scan)
        self.threads = self.variant.channels // self.variant.each
        self.blocks = -(-scan.channels // self.variant.channels)
        batch = scan.x.shape[0]
        # All blocks run at once: the next image's reads then hide behind the last one's work.
        self.shared_bytes = self._shared_bytes(kernel == "scan_backward")
        self.resident = min(self.variant.resident * 32 // self.threads, blocks_that_fit(self.shared_bytes))
        per_block = -(-self.blocks * scan.k * batch // (self.resident * processors(scan.x.device)))
        self.images = (batch, per_block)
        self.groups = -(-batch // per_block)

    def parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Room for y or dx of every path (batch, K, positions, C), and for the scales of its tiles if it is scaled."""
        x, k = self.scan.x, self.scan.k
        maps = x.new_empty((x.shape[0], k, *x.shape[2:]), dtype=torch.float16 if self.scaled else x.dtype)
        shape = (*states.shape[:3], states.shape[4]) if self.scaled else (0,)
        return maps, x.new_empty(shape, dtype=torch.bfloat16)

    def launch(self, tensors: list[Tensor | None], sizes: list[int]) -> None:
        """Run a kernel, compiled for this case; an operand that is None is never read."""
        scan, codes, backward = self.scan, self.scan.codes(), self.kernel == "scan_backward"
        macros = {
            "PATHS": ",".join(map(str, codes)), "PATH_COUNT": scan.k, "WINDOWS": max(codes) >= 4, "RANK": scan.rank,
            "WARPS": self.threads // 32, "BLOCKS": self.resident, "BF16": scan.x.dtype == torch.bfloat16,
            "HAS_D": scan.D is not None, "HAS_BIAS": scan.bias is not None, "SOFTPLUS": scan.softplus,
            "SCALED": self.scaled, "BACKWARD": backward,
            "ROWS_F32": self.blocks > 1, "SHARED_BYTES": self.shared_bytes,
            "EACH": self.variant.each, "APART": self.variant.apart,
            "LAST": self._last_steps(), "WORDS": scan.rank % 2 == 0 and _in_words(scan.dt),
        }  # fmt: skip
        options = tuple(f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in macros.items())
        device = scan.x.device
        compiled = compile_kernel(self.kernel, options, device, self.shared_bytes)
        pointers = [scan.A if t is None else t for t in tensors]
        grid = (self.blocks * scan.k * self.groups, 1, 1)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            compiled(grid, (self.threads, 1, 1), [*pointers, *scan.size, scan.channels, *sizes], self.shared_bytes)

    def _shared_bytes(self, backward: bool) -> int:
        """Size of csrc's `Shared`, which asserts it."""
        ranks, warps, span = -(-self.scan.rank // 8) * 8, self.threads // 32, 32 * self.variant.each
        row, weight_row = (8 * (-(-numbers // 8) | 1) for numbers in (max(self.scan.rank + 2, ranks), ranks))
        step_row = -(-ranks // 16) * 16 + 8 if backward and ranks > span else span + 8
        places = 2 if self.variant.apart else 1
        own = 4 * STEPS * step_row + 8 * STEPS + (8 * STEPS if backward else 0)
        warp = places * own + 4 * span * (weight_row + 1) + (128 * ranks if backward else 0)
        maps = 2 * 2 * STEPS * self.variant.channels * (2 if backward else 1)
        return maps + warps * warp + 2 * 2 * STEPS * row + places * 4 * (4 * STEPS + 16)

    def _last_steps(self) -> int:
        """Steps that the last tile of the longest path has, to the next four; all where walking fewer would gain little."""
        last = -(-((self.scan.length() - 1) % STEPS + 1) // 4) * 4
        return last if last <= STEPS // 2 else STEPS


def source(kernel: str) -> str:
    """The text of a kernel: `scan_forward`, `scan_backward`, or `sequence_...` of either."""
    names = ("device.cuh", "map.cuh" if kernel.startswith("scan_") else "sequence.cuh", f"{kernel}.cu")
    return "".join((_SOURCES / name).read_text() for name in names)


class NotCompiledError(RuntimeError):
    """A kernel cannot be compiled for a case, which was told; the Triton kernels serve it instead."""


def compile_kernel(kernel: str, options: tuple[str, ...], device: torch.device, shared_bytes: int) -> Callable[..., None]:
    """A function of grid, block, arguments (scalars are 32-bit integers) and shared memory.

    Raises:
        NotCompiledError: there is none for this case and device.
    """
    _make_context(device)
    compiled = _compiled(kernel, options, device, shared_bytes)
    if compiled is None:
        raise NotCompiledError(kernel)
    return compiled


def _make_context(device: torch.device) -> None:
    """Give the thread the device's context, which a kernel is loaded into and launched from.

    One of autograd's has none until it calls the CUDA runtime, and a kernel of csrc may be the first thing it does.
    """
    if device not in vars(_thread).setdefault("devices", set()):
        torch.cuda.mem_get_info(device)
        _thread.devices.add(device)


@functools.cache
def _compiled(kernel: str, options: tuple[str, ...], device: torch.device, shared_bytes: int) -> Callable[..., None] | None:
    """Compile a kernel, once for each case and device; a failure is told, loudly, and not tried again."""
    try:
        with torch.cuda.device(device):
            compiled = torch.cuda._compile_kernel(source(kernel), kernel, nvcc_options=list(options))
            if shared_bytes >= 48 * 1024:
                compiled.set_shared_memory_config(shared_bytes)
    except RuntimeError as error:
        message = f"visionssm: cannot compile {kernel} for one case, for which the slower Triton kernels serve: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return compiled


@functools.cache
def _nvrtc_works(device: torch.device) -> bool:
    """Compile the smallest kernel there is; a failure is told once, loudly, and Triton serves."""
    try:
        with torch.cuda.device(device):
            torch.cuda._compile_kernel('extern "C" __global__ void nothing() {}', "nothing")
    except (AttributeError, OSError, RuntimeError) as error:
        message = f"visionssm: NVRTC cannot compile; the Triton kernels serve in place of the CUDA C++ ones: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


def blocks_that_fit(shared_bytes: int) -> int:
    """Blocks of a kernel that shared memory of a multiprocessor has room for."""
    return SHARED // (shared_bytes + 1024)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, which emulates one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else SHARED


def _in_chunks(m: Tensor) -> bool:
    """Whether a map can be copied eight channels, 16 bytes of 16-bit numbers, at a time."""
    whole = all(m.shape[i] == 1 or stride % 8 == 0 for i, stride in enumerate(m.stride()[:-1]))
    return whole and max(m.stride()) < _LARGEST and m.stride(-1) == 1 and m.shape[-1] % 8 == 0 and m.data_ptr() % 16 == 0


def _in_words(rows: Tensor) -> bool:
    """Whether every row of 16-bit numbers starts at a multiple of four bytes."""
    return all(stride % 2 == 0 for stride in rows.stride()[:-1]) and rows.data_ptr() % 4 == 0


def _strides(m: Tensor) -> tuple[int, int, int]:
    """Of images, paths and positions; one map for all paths has a path stride of 0."""
    return m.stride(0), 0 if m.shape[1] == 1 else m.stride(1), m.stride(2)
