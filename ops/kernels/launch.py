"""From tensors to kernel launches: strides, tiles, splits, and the sums that follow."""

from __future__ import annotations

import functools
import math
from contextlib import suppress
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..paths import parse_path, path_length  # noqa: TID252
from . import cuda, sequence
from .backward import scan_backward_kernel
from .common import STEPS
from .forward import scan_forward_kernel
from .projection import projection_gradients_kernel, step_gradient_kernel, weight_gradient_kernel
from .reduce import carry_splits, sum_parts_kernel, transpose_kernel

_BLOCK = 1024


def states_shape(batch: int, k: int, length: int, channels: int, state: int) -> tuple[int, ...]:
    """Shape of what `forward` keeps for `backward`: the states before every tile of `STEPS` steps of paths of `length` steps."""
    return (batch, k, (length + STEPS - 1) // STEPS, state, channels)


def forward(
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    paths: tuple[str, ...],
    dt_softplus: bool,
    merge: bool,
    return_last_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See library.py."""
    scan = _Scan.of_map(x, x_dbl, A, D, dt_weight, dt_bias, paths, dt_softplus)
    batch, _, height, width, channels = x.shape
    if scan.suits_cuda() and not return_last_state:
        with suppress(cuda.NotCompiledError):
            states = scan.new_states()
            y = cuda.scan_forward(scan, states, merge).unflatten(2, (height, width))
            return (y.squeeze(1) if merge else y), states.new_empty(0), states
    merge_parts = merge and scan.k > 1
    parts = x.new_empty((batch, scan.k, height, width, channels), dtype=torch.float32 if merge_parts else x.dtype)
    states, last_state = scan.forward(parts.flatten(2, 3), return_last_state)
    if merge_parts:
        return _sum_parts(parts, x.dtype), last_state, states
    return (parts.squeeze(1) if merge else parts), last_state, states


def backward(
    dy: Tensor,
    states: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    paths: tuple[str, ...],
    dt_softplus: bool,
    merge: bool,
) -> tuple[Tensor, ...]:
    """See library.py."""
    scan = _Scan.of_map(x, x_dbl, A, D, dt_weight, dt_bias, paths, dt_softplus)
    batch, xs, height, width, channels = x.shape
    if scan.suits_cuda():
        with suppress(cuda.NotCompiledError):
            dx, rows, dA, *gradients = cuda.scan_backward(scan, _flat(dy.unsqueeze(1) if merge else dy), states)
            gradients = (x.new_empty(0) if t is None else g for t, g in zip((D, dt_weight, dt_bias), gradients, strict=True))
            return dx.view(x.shape), rows.view(x_dbl.shape), dA.view(A.shape), *gradients
    sum_paths = xs == 1 and scan.k > 1
    dx = x.new_empty((batch, scan.k, height, width, channels), dtype=torch.float32 if sum_paths else x.dtype)
    dy = _flat(dy.unsqueeze(1) if merge else dy)
    rank = scan.rank
    dx_dbl = x_dbl.new_empty(x_dbl.shape)
    ddt = dx_dbl[..., :rank].flatten(1, 2).transpose(1, 2)
    parts = x_dbl.new_empty((triton.cdiv(channels, scan.block(backward=True)), *x_dbl.shape[:-1], 2 * scan.n), dtype=torch.float32)
    dB, dC = parts.flatten(2, 3).transpose(2, 3).split(scan.n, dim=-1)
    sums = scan.backward(dy, states, dx.flatten(2, 3), None, ddt, dB, dC)
    dx_dbl[..., rank:] = parts.sum(0)
    return (_sum_parts(dx, x.dtype).unsqueeze(1) if sum_paths else dx, dx_dbl, *sums)


def sequence_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See library.py; y is a view of a channels-last map, which is how the kernel works and what an output projection wants."""
    if sequence.suits((u, delta, B, C, z), A, (D, delta_bias)):
        with suppress(cuda.NotCompiledError):
            scan = sequence.Sequence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
            y = u.new_empty((scan.batch, scan.length, u.shape[1]))
            shape = states_shape(scan.batch, scan.groups, scan.length, scan.channels, scan.n) if keep_states else (0,)
            states = u.new_empty(shape, dtype=torch.float32)
            last_state = u.new_empty((scan.batch, *A.shape) if return_last_state else (0,), dtype=torch.float32)
            scan.forward(y, states, last_state)
            return y.mT, last_state, states
    u, delta, z = _channels_last(u, delta, z)
    scan = _Scan.of_sequence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    y = u.new_empty(u.shape)  # not as u lies: library.py promises channels-last
    states, last_state = scan.forward(_grouped(y, scan.k), return_last_state)
    last_state = last_state.flatten(1, 2) if return_last_state else last_state
    return y.mT, last_state, states if keep_states else states.new_empty(0)


def sequence_backward(
    dy: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """See library.py."""
    if sequence.suits((u, delta, B, C, z), A, (D, delta_bias)):
        with suppress(cuda.NotCompiledError):
            scan = sequence.Sequence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
            du, ddelta, dz, dA, dB, dC, dD, dbias = scan.backward(*_channels_last(dy), states)
            return du.mT, ddelta.mT, dA, dB, dC, dD, dz if z is None else dz.mT, dbias
    dy, u, delta, z = _channels_last(dy, u, delta, z)
    scan = _Scan.of_sequence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    du, ddelta, dz = (None if m is None else m.new_empty(m.shape) for m in (u, delta, z))
    blocks = triton.cdiv(scan.channels, scan.block(backward=True))
    dB, dC = (u.new_empty((blocks, *m.shape), dtype=torch.float32) for m in (B, C))
    maps = (None if m is None else _grouped(m, scan.k) for m in (dy, du, dz, ddelta))
    dy, *views = maps
    dA, dD, _, dbias = scan.backward(dy, states, *views, dB.mT, dC.mT)
    dz = u.new_empty(0) if dz is None else dz.mT
    return (du.mT, ddelta.mT, dA.flatten(0, 1), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.flatten(), dz, dbias.flatten())


@dataclass
class _Scan:
    """The operands of one scan as `(batch, 1 or K, positions, .)` views, with A as (K, N, C), and how it is cut up."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    A: Tensor
    D: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    size: tuple[int, int]
    paths: tuple[str, ...]
    softplus: bool
    packed: bool

    @classmethod
    def of_map(
        cls,
        x: Tensor,
        x_dbl: Tensor,
        A: Tensor,
        D: Tensor | None,
        dt_weight: Tensor | None,
        dt_bias: Tensor | None,
        paths: tuple[str, ...],
        softplus: bool,
    ) -> _Scan:
        """From the operands of `cross_selective_scan`."""
        n = A.shape[2]
        rank = x_dbl.shape[-1] - 2 * n
        height, width = x.shape[2:4]
        projection = _flat(x_dbl.permute(0, 3, 1, 2, 4))
        dt, B, C = projection.split([rank, n, n], dim=-1)
        parameters = (None if t is None else t.contiguous() for t in (A.transpose(1, 2), D, dt_weight, dt_bias))
        return cls(_flat(x), dt, B, C, None, *parameters, (height, width), paths, softplus, projection.stride(-1) == 1)

    @classmethod
    def of_sequence(
        cls,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        softplus: bool,
    ) -> _Scan:
        """From the operands of `selective_scan`, u, delta and z channels-last; a group of B and C is a path over a 1 x L map."""
        groups = B.shape[1]
        maps = (_grouped(m, groups) for m in (u, delta))
        A = A.unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
        D, bias = (None if t is None else t.unflatten(0, (groups, -1)).contiguous() for t in (D, delta_bias))
        gate = None if z is None else _grouped(z, groups)
        size = (1, u.shape[1])
        return cls(*maps, B.mT, C.mT, gate, A, D, None, bias, size, ("h",) * groups, softplus, False)

    @property
    def k(self) -> int:
        return len(self.paths)

    @property
    def n(self) -> int:
        return self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.dt.shape[-1]

    @property
    def channels(self) -> int:
        return self.x.shape[-1]

    def block(self, backward: bool) -> int:
        """Channels of a program: one or two for every lane of its one warp. The backward has no registers for two."""
        padding = triton.cdiv(self.channels, 64) * 64 - self.channels
        return 32 if backward or 4 * padding >= self.channels else 64

    def suits_cuda(self) -> bool:
        """Whether the CUDA C++ kernels serve this scan: they do not split a path."""
        programs = triton.cdiv(self.channels, 32) * self.k * self.x.shape[0]
        one_pass = self._splits(programs, triton.cdiv(self.length(), STEPS))[0] == 1
        return one_pass and not _wide(self.x, self.dt) and cuda.suits(self)

    def new_states(self) -> Tensor:
        """Room for the states before every tile."""
        shape = states_shape(self.x.shape[0], self.k, self.length(), self.channels, self.n)
        return self.x.new_empty(shape, dtype=torch.float32)

    def length(self) -> int:
        """Steps of the longest path, window padding included."""
        return _facts(self.paths, self.size)[1]

    def _splits(self, programs: int, tiles: int) -> tuple[int, int]:
        """Number of splits of every path, and tiles in each: enough programs to fill the device, no more."""
        wanted = max(1, 8 * cuda.processors(self.x.device) // programs)
        per_split = max(triton.cdiv(tiles, wanted), min(tiles, 4))
        return triton.cdiv(tiles, per_split), per_split

    def codes(self) -> tuple[int, ...]:
        """What the kernels know the paths by: `2 * kind + flip`, see common.py."""
        return _facts(self.paths, self.size)[0]

    def _common(self, tiles: int, block: int) -> tuple[dict[str, object], int]:
        """The arguments that both kernels take, and the number of programs."""
        height, width = self.size
        batch = self.x.shape[0]
        programs = triton.cdiv(self.channels, block) * self.k * batch
        splits, per_split = self._splits(programs, tiles)
        tensors = {"x": self.x, "dt": self.dt, "b": self.B, "c": self.C, "z": self.z}
        pointers = {f"{name}_ptr": t for name, t in tensors.items()}
        pointers |= {"A_ptr": self.A, "D_ptr": self.D, "weight_ptr": self.weight, "bias_ptr": self.bias}
        arguments = pointers | {key: value for name, t in tensors.items() for key, value in _strides(name, t).items()}
        arguments |= {
            "height": height, "width": width, "channels": self.channels, "tiles": tiles, "tiles_per_split": per_split,
            "splits": splits,
            "PATHS": self.codes(), "WINDOWS": max(self.codes()) >= 4, "N": self.n,
            "R": 0 if self.weight is None else self.rank,
            "RANK": self.rank, "PACKED": self.packed,
            "HAS_D": self.D is not None, "HAS_BIAS": self.bias is not None, "HAS_Z": self.z is not None,
            "SOFTPLUS": self.softplus, "SPLIT_DOT": self.dt.element_size() == 2,
            "BT": STEPS, "BC": block, "VEC": block // 32, "num_warps": 1,
        }  # fmt: skip
        return arguments, programs * splits

    def forward(self, y: Tensor, return_last_state: bool) -> tuple[Tensor, Tensor]:
        """Write y (batch, K, positions, C); returns the states at tile boundaries and the last state (or empty)."""
        x, k, n, channels = self.x, self.k, self.n, self.channels
        batch = x.shape[0]
        states = self.new_states()
        last_state = x.new_empty((batch, k, n, channels) if return_last_state else (0,), dtype=torch.float32)
        arguments, programs = self._common(states.shape[2], self.block(backward=False))
        arguments |= {"y_ptr": y, "WIDE": _wide(x, self.dt, self.B, self.C, self.z, y), **_strides("y", y)}
        with _device(x):
            splits = arguments["splits"]
            if splits > 1:
                ends, totals = self._ends_and_totals(splits)
                scan_forward_kernel[(programs,)](
                    **arguments, states_ptr=ends, last_ptr=ends, total_ptr=totals, SUMMARY=True, LAST=False
                )
                carry_splits(
                    ends, totals, self.A, states, states.stride(1), arguments["tiles_per_split"] * states.stride(2), reverse=False
                )
            scan_forward_kernel[(programs,)](
                **arguments, states_ptr=states, last_ptr=last_state, total_ptr=states, SUMMARY=False, LAST=return_last_state
            )
        return states, last_state.transpose(2, 3).contiguous() if return_last_state else last_state

    def backward(
        self, dy: Tensor, states: Tensor, dx: Tensor, dz: Tensor | None, ddt: Tensor, dB: Tensor, dC: Tensor
    ) -> tuple[Tensor, ...]:
        """Write the gradients of the maps; returns dA, dD, ddt_weight, ddt_bias.

        `dx`, `dz` and `ddt` are (batch, K, positions, .); `dB`, `dC` (channel blocks, batch, K, positions, N), to be summed.
        """
        x, k, n, channels = self.x, self.k, self.n, self.channels
        arguments, programs = self._common(states.shape[2], self.block(backward=True))
        splits = arguments["splits"]
        widths = (n, int(self.D is not None), int(self.bias is not None))
        dv = ddt if self.weight is None else x.new_empty(dx.shape, dtype=torch.float32)
        sums = x.new_empty((x.shape[0] * splits, k * channels * sum(widths)), dtype=torch.float32)
        dA, dD, dbias = sums.split([k * channels * w for w in widths], dim=1)
        arguments |= {
            "dy_ptr": dy, "states_ptr": states, "dx_ptr": dx, "dz_ptr": dz, "ddt_ptr": dv, "db_ptr": dB, "dc_ptr": dC,
            "dA_ptr": dA, "dD_ptr": dD, "dbias_ptr": dbias, "sums_part": sums.stride(0),
            "WIDE": _wide(x, self.dt, self.B, self.C, self.z, dy, dx, dv), **_strides("dy", dy), **_strides("dx", dx),
            "db_block": dB.stride(0), **_strides("ddt", dv), **_strides("db", dB[0], last="n"),
        }  # fmt: skip
        with _device(x):
            carry, totals = self._ends_and_totals(splits)
            if splits > 1:
                ends, _ = self._ends_and_totals(splits)
                scan_backward_kernel[(programs,)](**arguments, carry_ptr=ends, total_ptr=totals, SUMMARY=True)
                carry_splits(ends, totals, self.A, carry, carry.stride(1), carry.stride(2), reverse=True)
            # With several state variables the loop over them fits 168 registers, and 12 warps run on a multiprocessor instead of 8.
            registers = {"maxnreg": 168} if n > 1 else {}
            scan_backward_kernel[(programs,)](**arguments, carry_ptr=carry, total_ptr=totals, SUMMARY=False, **registers)
        dA, dD, dbias = sums.sum(0).split([k * channels * w for w in widths])
        dA = dA.view(k, n, channels).transpose(1, 2)
        dweight = None if self.weight is None else self._through_projection(dv, ddt)
        shapes = ((k, channels, n), (k, channels), (k, channels, self.rank), (k, channels))
        return tuple(  # in storage of their own, as an operator's outputs have to be
            x.new_empty(0) if t is None else g.reshape(shape).clone(memory_format=torch.contiguous_format).to(t.dtype)
            for t, g, shape in zip((self.A, self.D, self.weight, self.bias), (dA, dD, dweight, dbias), shapes, strict=True)
        )

    def _through_projection(self, dv: Tensor, ddt: Tensor) -> Tensor:
        """From the gradient of the full step (batch, K, positions, C): writes `ddt`, returns the weight's."""
        batch, k, positions, channels = dv.shape
        options = {"K": k, "R": self.rank, "BR": max(16, triton.next_power_of_2(self.rank)), "num_warps": 4}
        split = self.dt.element_size() == 2
        strides = (*_strides("dt", self.dt).values(), *_strides("ddt", ddt).values())
        block = max(16, triton.next_power_of_2(channels))
        with _device(dv):
            if options["BR"] * block <= 4096:
                chunks = min(triton.cdiv(8 * cuda.processors(dv.device), k), triton.cdiv(positions, 32) * batch)
                parts = dv.new_empty((chunks, *self.weight.shape), dtype=torch.float32)
                projection_gradients_kernel[(k * chunks,)](
                    dv, self.dt, self.weight, ddt, parts, batch, positions, channels, chunks, *strides,
                    SPLIT=split, BP=32, BC=block, **options,
                )  # fmt: skip
                return parts.sum(0)
            blocks = triton.cdiv(positions, 64)
            chunks = min(triton.cdiv(8 * cuda.processors(dv.device), k * triton.cdiv(channels, 64)), blocks * batch)
            parts = dv.new_empty((chunks, *self.weight.shape), dtype=torch.float32)
            step_gradient_kernel[(blocks * k * batch,)](
                dv, self.weight, ddt, positions, channels, *strides[4:], TF32=split, BP=64, BC=64, **options
            )
            weight_gradient_kernel[(triton.cdiv(channels, 64) * k * chunks,)](
                dv, self.dt, parts, batch, positions, channels, chunks, *strides[:4], SPLIT=split, BP=64, BC=64, **options
            )
        return parts.sum(0)

    def _ends_and_totals(self, splits: int) -> tuple[Tensor, Tensor]:
        """Room for the end of every split, (batch, K, splits, N, C), and for its sum of delta."""
        shape = (self.x.shape[0], self.k, splits)
        return tuple(self.x.new_empty((*shape, *rest, self.channels), dtype=torch.float32) for rest in ((self.n,), ()))


@functools.lru_cache(maxsize=1024)
def _facts(paths: tuple[str, ...], size: tuple[int, int]) -> tuple[tuple[int, ...], int]:
    """The codes of paths over a map, and the steps of the longest, window padding included."""
    specs = [parse_path(name) for name in paths]
    thin = min(size) == 1
    codes = tuple(2 * (s.window + 1 if s.window else int(s.column and not thin)) + s.flip for s in specs)
    return codes, max(path_length(name, *size) for name in paths)


def _grouped(m: Tensor, groups: int) -> Tensor:
    """(batch, length, dim) -> a view (batch, groups, length, dim / groups)."""
    return m.unflatten(2, (groups, -1)).transpose(1, 2)


def _channels_last(*maps: Tensor | None) -> list[Tensor | None]:
    """(batch, dim, length) each -> (batch, length, dim), channels adjacent: a view where they are, else copies by one kernel."""
    copied = [m for m in maps if m is not None and m.stride(1) != 1]
    transposed: list[Tensor] = []
    if copied:
        first = copied[0]
        batch, dim, length = first.shape
        if any(m.dtype != first.dtype for m in copied):
            return [None if m is None else m.mT.contiguous() for m in maps]
        out = first.new_empty((len(copied), batch, length, dim))
        sources = (copied * 4)[:4]
        with _device(first):
            transpose_kernel[(triton.cdiv(length, 64) * triton.cdiv(dim, 64) * batch, len(copied))](
                *sources, out, dim, length, *(s for m in sources for s in m.stride()), out.stride(0), batch, BLOCK=64, num_warps=4
            )
        transposed = list(out.unbind())
    return [None if m is None else m.mT if m.stride(1) == 1 else transposed.pop(0) for m in maps]


def _flat(maps: Tensor) -> Tensor:
    """(batch, 1 or K, H, W, M) -> (batch, 1 or K, H * W, M), copied only if rows and columns have no common stride."""
    height, width = maps.shape[2:4]
    if height > 1 and width > 1 and maps.stride(2) != width * maps.stride(3):
        maps = maps.contiguous()
    return maps.flatten(2, 3)


def _strides(name: str, t: Tensor | None, last: str | None = None) -> dict[str, int]:
    """Stride arguments of a (batch, 1 or K, positions, .) operand; one map for all paths has a path stride of 0."""
    last = last or ("n" if name in "bc" else "c")
    b, k, p, c = (0, 0, 0, 0) if t is None else t.stride()
    return {f"{name}_b": b, f"{name}_k": 0 if t is None or t.shape[1] == 1 else k, f"{name}_p": p, f"{name}_{last}": c}


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(outer, parts, ...) -> (outer, ...), summed in float32."""
    out = parts.new_empty((parts.shape[0], *parts.shape[2:]), dtype=dtype)
    inner = math.prod(parts.shape[2:])
    count = out.numel()
    with _device(parts):
        sum_parts_kernel[(triton.cdiv(count, _BLOCK),)](
            parts, out, count, parts.shape[1], inner, parts.shape[1] * inner, BLOCK=_BLOCK, num_warps=4
        )
    return out


def _wide(*maps: Tensor | None) -> bool:
    """Whether an offset inside one image of one path can exceed 32 bits."""
    present = (m for m in maps if m is not None)
    return any((m.shape[-2] - 1) * m.stride(-2) + (m.shape[-1] - 1) * m.stride(-1) >= 2**31 for m in present)


def _device(t: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(t.device if t.is_cuda else -1)
