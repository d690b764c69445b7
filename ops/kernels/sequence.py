"""The CUDA C++ kernels of csrc for `selective_scan`: mamba's layout, read as it is, with N state variables.

They stand in for the Triton kernels where the maps are 16-bit and their steps adjacent in memory. Both keep the same states. See
cuda.py for how kernels are compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import cuda
from .common import STEPS
from .reduce import carry_splits, sum_rows

STATES = range(4, 33)
"""Numbers of state variables that are served."""

_RESIDENT = {"sequence_forward": 12, "sequence_backward": 12, "sequence_spread": 16, "sequence_tiles": 12}
"""Warps of a kernel on a multiprocessor that registers have room for."""

_SPREAD_LANES, _TILES_LANES = 8, 16
"""Threads of a channel of 16 states: in sequence_spread four that scan and four that read ahead, in sequence_tiles one a tile."""

_SHORT = 1024
"""Steps of a sequence for which a second scan costs more than lanes that stay idle."""

_ENOUGH = 8
"""Warps of sequence_spread on a multiprocessor from which on it is faster than a second scan."""

_BLOCK_TIME = {24: 15.2, 16: 12.3, 8: 10.1}
"""Time of a block of sequence_tiles by its channels, in that which a multiprocessor takes to scan a channel twice, a thread each.
`tools/tune_sequence.py` times both."""

_LARGEST = 2**31  # strides and offsets inside one image travel as 32-bit integers


@dataclass
class Plan:
    """How the work of a kernel is cut up."""

    kernel: str
    channels: int
    """Of a block."""
    tiles_per_split: int
    """A sequence is split only where it must be to fill the device: it is then scanned twice."""
    lanes: int = 1
    """Threads of a channel."""

    @property
    def warps(self) -> int:
        return self.channels * self.lanes // 32


def backward_plan(n: int, batch: int, groups: int, channels: int, length: int, processors: int) -> Plan:
    """A thread a channel."""
    return thread_plan("sequence_backward", n, batch, groups, channels, length, processors)


def forward_plan(
    n: int, batch: int, groups: int, channels: int, length: int, processors: int, shared_memory: int = cuda.SHARED
) -> Plan:
    """A thread a channel; where that would scan a sequence twice, in splits, lanes that share a channel if they are faster."""
    threads = thread_plan("sequence_forward", n, batch, groups, channels, length, processors)
    if n != 16 or channels % 8 or threads.tiles_per_split >= -(-length // STEPS):
        return threads
    spread = spread_plan(batch, groups, channels, length, processors)
    if length <= _SHORT:
        return spread
    tiles, time = tiles_plan(batch, groups, channels, length, processors, shared_memory)
    if tiles is not None and time < batch * groups * channels / processors:
        return tiles
    return spread if batch * groups * channels * _SPREAD_LANES // 32 >= _ENOUGH * processors else threads


def tiles_plan(
    batch: int, groups: int, channels: int, length: int, processors: int, shared_memory: int
) -> tuple[Plan | None, float]:
    """Sixteen lanes a channel, a tile each, in blocks that are over first; and their time in the unit of `_BLOCK_TIME`.

    None if shared memory has no room for a block; a multiprocessor has one at a time.
    """

    def time(plan: Plan) -> float:
        blocks = channels // plan.channels * groups * batch
        return -(-blocks // processors) * _BLOCK_TIME[plan.channels]

    blocks = [block for block in _BLOCK_TIME if channels % block == 0]
    plans = [Plan("sequence_tiles", block, -(-length // STEPS), _TILES_LANES) for block in blocks]
    plans = [plan for plan in plans if _shared_bytes(16, plan) <= shared_memory]
    best = min(plans, key=time, default=None)
    return best, 0.0 if best is None else time(best)


def spread_plan(batch: int, groups: int, channels: int, length: int, processors: int) -> Plan:
    """Four lanes a channel, in blocks that leave the fewest warps to the busiest multiprocessor, of those the largest."""

    def most(block: int) -> int:
        return -(-(channels // block * groups * batch) // processors) * block

    block = min((block for block in (32, 24, 16, 8) if channels % block == 0), key=most)
    return Plan("sequence_spread", block, -(-length // STEPS), _SPREAD_LANES)


def thread_plan(kernel: str, n: int, batch: int, groups: int, channels: int, length: int, processors: int) -> Plan:
    """Blocks as large as can be, for they share B and C, with as few idle lanes as can be; as many splits as run at once."""
    plan = Plan(kernel, min((128, 64, 32), key=lambda block: -channels % block), tiles_per_split=0)
    warps, tiles = -(-channels // 32) * groups * batch, -(-length // STEPS)
    splits = max(_blocks_at_once(n, plan) * plan.warps * processors // warps, 1)
    return replace(plan, tiles_per_split=max(-(-tiles // splits), 2))


def _blocks_at_once(n: int, plan: Plan) -> int:
    """Blocks of a plan that registers and shared memory of a multiprocessor have room for."""
    return max(min(_RESIDENT[plan.kernel] // plan.warps, cuda.blocks_that_fit(_shared_bytes(n, plan))), 1)


def suits(tensors: tuple[Tensor | None, ...], A: Tensor, parameters: tuple[Tensor | None, ...]) -> bool:
    """Whether the kernels serve a scan of `tensors`, u, delta, B, C and z (or None)."""
    present = [t for t in tensors if t is not None]
    return (
        A.shape[1] in STATES
        and present[0].dtype in (torch.float16, torch.bfloat16)
        and all(t.dtype == present[0].dtype and t.stride(-1) == 1 for t in present)
        and all(t.dtype == torch.float32 for t in (A, *parameters) if t is not None)
        and all(t.stride(0) < _LARGEST and 2 * max(t.shape[-2], 16) * t.stride(-2) < _LARGEST for t in present)
        and all(t.shape[1] == 1 or t.stride(1) < _LARGEST for t in present)
        and 2 * present[0].shape[1] * present[0].shape[2] < _LARGEST
        and cuda.enabled(A.device)
    )


@dataclass
class Sequence:
    """The operands of one scan: maps (batch, dim, length), B and C (batch, groups, N, length)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool

    def __post_init__(self) -> None:
        self.A, self.D, self.bias = (None if t is None else t.contiguous() for t in (self.A, self.D, self.bias))
        self.batch, dim, self.length = self.u.shape
        self.groups, self.n = self.B.shape[1], self.A.shape[1]
        self.channels = dim // self.groups
        self.tiles = -(-self.length // STEPS)
        self.sizes = (self.batch, self.groups, self.channels, self.length, cuda.processors(self.u.device))

    def forward(self, y: Tensor, states: Tensor, last: Tensor) -> None:
        """Write y (batch, length, dim) and, if they have room, the states before every tile (launch.states_shape) and the last."""
        plan = forward_plan(self.n, *self.sizes, cuda.shared_memory(self.u.device))
        keep = int(states.numel() > 0)
        if (splits := self._splits(plan)) > 1:
            ends, totals = self._ends(splits), self._totals(splits)
            self._launch(plan, [y, ends, last, totals], [], SUMMARY=1, LAST=0, KEEP=0)
            if not keep:
                states = self._ends(splits)  # room for those before every split
            stride = (plan.tiles_per_split if keep else 1) * states.stride(2)
            carry_splits(ends, totals, self._decays(), states, states.stride(1), stride, reverse=False)
        self._launch(plan, [y, states, last, states], [], SUMMARY=0, LAST=int(last.numel() > 0), KEEP=keep)

    def backward(self, dy: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """From dy (batch, length, dim), channels adjacent, and the forward's states to every gradient.

        Returns:
            du, ddelta, dz (batch, length, dim), dA, dB, dC, dD, dbias; that of an operand that is None is empty.
        """
        u, plan = self.u, backward_plan(self.n, *self.sizes)
        blocks, splits = self._blocks(plan), self._splits(plan)
        dy = dy if 2 * max(dy.stride()) < _LARGEST else dy.contiguous()
        du, ddelta, dz = (u.new_empty((0,) if m is None else dy.shape) for m in (u, self.delta, self.z))
        parts = u.new_empty((blocks, 2, *self.B.shape), dtype=torch.float32)
        widths = [0 if p is None else p.numel() for p in (self.A, self.D, self.bias)]
        sums = u.new_empty((self.batch * splits, sum(widths)), dtype=torch.float32)
        carry, totals = self._ends(splits), self._totals(splits)
        tensors = [dy, states, du, ddelta, dz, parts, *sums.split(widths, dim=1)]
        sizes = [dy.stride(0), dy.stride(1), self.batch, sums.stride(0)]
        words = self.channels % 2 == dy.stride(0) % 2 == dy.stride(1) % 2 == dy.data_ptr() % 4 == 0
        copied = int(words and _copies_fit(self.n, plan, cuda.shared_memory(u.device)))
        if splits > 1:
            ends = self._ends(splits)
            self._launch(plan, [*tensors, ends, totals], sizes, SUMMARY=1, COPIED=copied)
            carry_splits(ends, totals, self._decays(), carry, carry.stride(1), carry.stride(2), reverse=True)
        self._launch(plan, [*tensors, carry, totals], sizes, SUMMARY=0, COPIED=copied)
        dB, dC = (g.view(self.B.shape) for g in sum_rows(parts.flatten(1), 2 * (self.B.numel(),), u.dtype))
        dA, dD, dbias = sum_rows(sums, tuple(widths))
        return du, ddelta, dz, dA.view(self.A.shape), dB, dC, dD, dbias

    def _blocks(self, plan: Plan) -> int:
        return -(-self.channels // plan.channels)

    def _splits(self, plan: Plan) -> int:
        return -(-self.tiles // plan.tiles_per_split)

    def _ends(self, splits: int) -> Tensor:
        """Room for a state of every split (batch, groups, splits, N, channels)."""
        return self.u.new_empty((self.batch, self.groups, splits, self.n, self.channels), dtype=torch.float32)

    def _totals(self, splits: int) -> Tensor:
        """Room for the sum of delta of every split (batch, groups, splits, channels)."""
        return self.u.new_empty((self.batch, self.groups, splits, self.channels), dtype=torch.float32)

    def _decays(self) -> Tensor:
        """A as (groups, N, channels)."""
        return self.A.unflatten(0, (self.groups, -1)).mT

    def _launch(self, plan: Plan, tensors: list[Tensor], more: list[int], **flags: int) -> None:
        """Run a kernel, compiled for this case; an operand that is None is never read."""
        u, splits = self.u, self._splits(plan)
        macros = {
            **shape_macros(self.n, plan), "BF16": int(u.dtype == torch.bfloat16),
            "FULL": int(self.channels % plan.channels == 0), "HAS_D": int(self.D is not None),
            "HAS_Z": int(self.z is not None), "HAS_BIAS": int(self.bias is not None), "SOFTPLUS": int(self.softplus),
            **flags,
        }  # fmt: skip
        shared_bytes = _shared_bytes(self.n, plan, bool(flags["SUMMARY"]), bool(flags.get("COPIED")))
        options = tuple(f"-D{name}={value}" for name, value in (macros | {"SHARED_BYTES": shared_bytes}).items())
        compiled = cuda.compile_kernel(plan.kernel, options, u.device, shared_bytes)
        operands = [u, self.delta, self.z, self.B, self.C, self.A, self.D, self.bias]
        sizes = [self.length, self.channels, self.groups, self.tiles, plan.tiles_per_split, splits]
        strides = [s for m in (u, self.delta, self.z) for s in ((0, 0) if m is None else m.stride()[:2])]
        strides += [s for m in (self.B, self.C) for s in m.stride()[:3]]
        grid = (self._blocks(plan) * self.groups * splits * self.batch, 1, 1)
        pointers = [self.A if t is None else t for t in (*operands, *tensors)]
        with torch.cuda.device(u.device if u.is_cuda else -1):
            compiled(grid, (32 * plan.warps, 1, 1), [*pointers, *sizes, *strides, *more], shared_bytes)


def shape_macros(n: int, plan: Plan) -> dict[str, int]:
    """What a kernel of N states is compiled for by its plan."""
    return {"N": n, "LANES": plan.lanes, "WARPS": plan.warps, "BLOCKS": _blocks_at_once(n, plan)}


def _copies_fit(n: int, plan: Plan, shared_memory: int) -> bool:
    """Whether copies of dy, B and C leave room for a block of the backward, and for as many blocks."""
    shared_bytes = _shared_bytes(n, plan, copied=True)
    return shared_bytes <= shared_memory and cuda.blocks_that_fit(shared_bytes) >= _blocks_at_once(n, plan)


def _shared_bytes(n: int, plan: Plan, summary: bool = False, copied: bool = False) -> int:
    """Size of csrc's `Shared`, which asserts it."""
    full, channels = not summary, plan.channels
    if plan.kernel == "sequence_tiles":
        chunk, matrix_rows = _TILES_LANES * STEPS, -(-2 * n // plan.warps) * plan.warps
        matrices, copies = 16 * n * chunk, 2 * (chunk + 16) * (4 * n + 3 * channels)
        left = 2 * _TILES_LANES * (4 * (n * channels + 2) + 2 * (STEPS * channels + 2))
        return matrices + copies + left + 8 * (n + 1) * channels + 8 * (3 * _TILES_LANES * channels + matrix_rows) + 16
    matrices, parameters = 4 * n * (STEPS + (4 if plan.lanes > 1 else 0)), 4 * n * channels
    if plan.kernel == "sequence_backward":
        row = 2 * (STEPS + 8)
        copies = (2 + full) * row * channels + (2 * STEPS * channels + (1 + full) * n * row if copied else 2 * channels + row)
        walked = (2 + full) * parameters + (1 + full) * matrices
        sums = 4 * STEPS * channels + parameters + 8 * STEPS * n * plan.warps + 384
        return -(-copies // 16) * 16 + walked + full * sums
    if plan.kernel == "sequence_spread":
        return 2 * (2 * matrices + 4 * channels * (10 * STEPS + 40))
    return 2 * (matrices + parameters) + (1 + full) * 8 * STEPS * (channels + 1) + 8 * channels + 16
