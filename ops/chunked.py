"""The CPU default: a multi-level scan in plain PyTorch, in image order, with its own backward; memory linear in L.

A path is cut into chunks of a few steps, and all chunks advance one step together, in three sweeps: the end state of every chunk
as if it started from zero; the states carried from chunk to chunk, which is the same scan over fewer, longer steps (a chunk decays
what comes before it by exp(A * sum of delta)); the scan itself, now from the right start. A scan of 3136 steps takes about 50
operations. Nothing is kept for the backward, which recomputes. Samples and states go through in groups whose workspaces fit a
cache.

The layout inside is (batch, P, Q, N, C), visited column by column: q is the outer loop, p the inner one. `v` is (H, W) of the map
as it lies in memory, `h` is (H * W, 1) of the same memory, and every other path is (L', 1) of a copy in path order. Flips go
backwards.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .paths import parse_path, path_table
from .reference import compute_dtype

_GROUP = 400_000  # elements of a workspace: a few of them fit the caches of two cores
_SERIAL = 16  # steps that are not worth another level
_CHUNK = 7  # preferred steps of a chunk: few enough for large operations, many enough for few levels
_LONGEST = 64  # steps of a chunk at most
_PLAIN_SOFTPLUS = 40.0  # up to |z| of this log1p(exp(z)) neither overflows nor meets denormals, which cost 50 times as much
_LOWEST_EXPONENT = -80.0  # a decay of less than exp of this is a denormal, or nothing, beside any state
_KEPT = 32  # workspaces that a thread keeps between calls (fresh memory costs as much as a pass over it)
_KEPT_SIZE = 1 << 21  # elements of a workspace that is kept


def states_shape(batch: int, k: int, length: int, channels: int, state: int) -> tuple[int, ...]:
    """Shape of what `forward` keeps for `backward`: nothing, whatever the sizes."""
    return (0,)


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
    """See library.py; keeps nothing for the backward."""
    call = _Call(x, x_dbl, A, D, dt_weight, dt_bias, paths, dt_softplus)
    y = _skip(call.x, call.D, len(paths), merge)
    last_state = y.new_empty((x.shape[0], *A.shape) if return_last_state else (0,))
    for samples, i in itertools.product(call.sample_groups, range(len(paths))):
        path = call.path(samples, i)
        y_map = (y if merge else y[:, i])[samples].flatten(1, 2)
        for states, work in call.workspaces(path, "forward"):
            work.scan(path, states)
            if return_last_state:
                last_state[samples, i, :, states] = work.last_state.mT
            if work.u.shape[2] == 1 and path.layout.table is None:
                y_map.addcmul_(work.u.squeeze(2), path.C[..., states])
            else:
                y_map += path.layout.put_back(_sum_states(work.u, path.C[..., states]))
    return y.to(x.dtype), last_state, y.new_empty(0)


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
    """See library.py; recomputes the states."""
    call = _Call(x, x_dbl, A, D, dt_weight, dt_bias, paths, dt_softplus)
    dy = dy.to(call.x.dtype)
    dx, dD = _skip_backward(call.x, call.D, dy, len(paths), merge)
    dx_dbl, dA = call.x.new_empty(x_dbl.shape), torch.zeros_like(call.A)
    dweight, dbias = (None if t is None else torch.zeros_like(t) for t in (call.weight, call.bias))
    rank, n = x_dbl.shape[-1] - 2 * A.shape[2], A.shape[2]
    for samples, i in itertools.product(call.sample_groups, range(len(paths))):
        path = call.path(samples, i)
        dy_steps = path.layout.read((dy if merge else dy[:, i])[samples].flatten(1, 2))
        ddt, dB, dC = dx_dbl[samples, :, :, i].flatten(1, 2).split([rank, n, n], dim=-1)
        totals = None
        for group, work in call.workspaces(path, "backward"):
            work.scan(path, group)
            dC[..., group] = path.layout.put_back(_dot(work.u, dy_steps, work.spare))
            torch.mul(dy_steps.unsqueeze(2), path.C[..., group, None], out=work.g)
            work.scan_back()
            dB[..., group] = path.layout.put_back(_dot(work.g, work.dx, work.spare))
            *parts, dA_part = work.gradients(path, group)
            dA[i, group] += dA_part
            if totals is None:
                totals = parts if group.stop == n else [part.clone() for part in parts]
            else:
                totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)]
        ddx, ddelta = totals
        dz = ddelta.addcmul_(ddx, path.x)
        if dt_softplus:
            dz.mul_(work.slope)
        path.layout.clear_tail(dz)
        path.layout.add(dx[samples, i if dx.shape[1] > 1 else 0].flatten(1, 2), ddx, work.delta)
        rows = dz.flatten(0, 1)
        if dbias is not None:
            dbias[i] += rows.sum(0)
        if dweight is not None:
            dweight[i].addmm_(rows.mT, path.dt.flatten(0, 1))
            dz = (rows @ call.weight[i, :, :rank]).unflatten(0, dz.shape[:2])
        ddt.copy_(path.layout.put_back(dz))
    if call.ones:
        dweight, dbias = dweight[..., :rank], dweight[..., rank]
    grads, inputs = (dx, dx_dbl, dA.mT, dD, dweight, dbias), (x, x_dbl, A, D, dt_weight, dt_bias)
    return tuple(x.new_empty(0) if t is None else g.to(t.dtype).contiguous() for g, t in zip(grads, inputs, strict=True))


# --- geometry ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Layout:
    """How the steps of one path lie in memory and how they are cut.

    The path visits (P, Q) column by column, from the last to the first position if `flip`. `factors` are the steps of a chunk,
    level by level. Where the path is no view of the map, `table` (P,) holds the raster position of each step, -1 for a padded one,
    and `inverse` (H * W,) the step of each position. Steps from `length` on are not of the path.
    """

    p: int
    q: int
    flip: bool
    factors: tuple[int, ...]
    length: int
    table: np.ndarray | None = None
    inverse: np.ndarray | None = None

    def read(self, flat: Tensor) -> Tensor:
        """(batch, H * W, M) -> (batch, P * Q, M), zeros at padded steps; no copy where the path is a view."""
        if self.table is None:
            return flat
        steps = flat.index_select(1, torch.from_numpy(self.table.clip(min=0)).to(flat.device))
        if len(self.table) > len(self.inverse):
            steps.masked_fill_(torch.from_numpy(self.table < 0).to(flat.device)[:, None], 0.0)
        return steps

    def put_back(self, steps: Tensor) -> Tensor:
        """(batch, P * Q, M) -> (batch, H * W, M), the inverse of `read`."""
        return steps if self.table is None else steps.index_select(1, torch.from_numpy(self.inverse.copy()).to(steps.device))

    def add(self, target: Tensor, m: Tensor, weights: Tensor) -> None:
        """Add m * weights to target (batch, H * W, C); m (batch, P * Q, C) may be overwritten."""
        if self.table is None:
            target.addcmul_(m, weights)
        else:
            target += self.put_back(m.mul_(weights))

    def clear_tail(self, steps: Tensor) -> None:
        """Zero what is not of the path."""
        if self.length < self.p * self.q:
            steps[:, self.length :] = 0.0


@functools.lru_cache(maxsize=512)
def _layout(name: str, height: int, width: int) -> _Layout:
    spec = parse_path(name)
    if not spec.window:
        p, q = (height, width) if spec.column and height > 1 else (height * width, 1)
        factors = _factors(p, q, _LONGEST)
        if factors is not None:
            return _Layout(p, q, spec.flip, factors, height * width)
    path = path_table(name.removesuffix("_flip"), height, width)
    p = next(p for p in itertools.count(len(path)) if _factors(p, 1, _CHUNK) is not None)
    table = np.full(p, -1, dtype=np.int64)
    table[: len(path)] = path
    visited = np.flatnonzero(table >= 0)
    inverse = np.empty(height * width, dtype=np.int64)
    inverse[table[visited]] = visited
    table.flags.writeable = inverse.flags.writeable = False
    return _Layout(p, 1, spec.flip, _factors(p, 1, _CHUNK), len(path), table, inverse)


def _factors(p: int, q: int, longest: int) -> tuple[int, ...] | None:
    """Steps per chunk, level by level, until few chunks are left; None if that takes a chunk of more than `longest` steps."""
    factors = []
    while p * q > _SERIAL:
        if p == 1:
            p, q = q, 1
        divisors = [t for t in range(2, min(p, longest) + 1) if p % t == 0]
        if not divisors:
            return None
        factors.append(min(divisors, key=lambda t: abs(math.log(t / _CHUNK))))
        p //= factors[-1]
    return tuple(factors)


# --- one call ---------------------------------------------------------------------------------------------------------


class _Call:
    """The inputs of one call in its compute dtype, and how its samples and states are grouped."""

    def __init__(
        self,
        x: Tensor,
        x_dbl: Tensor,
        A: Tensor,
        D: Tensor | None,
        dt_weight: Tensor | None,
        dt_bias: Tensor | None,
        paths: tuple[str, ...],
        dt_softplus: bool,
    ) -> None:
        x, x_dbl, A, self.D, self.weight, self.bias = compute_dtype(x, x_dbl, A, D, dt_weight, dt_bias)
        batch, _, height, width, channels = x.shape
        k, _, n = A.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        self.x, self.softplus = x, dt_softplus
        self.layouts = [_layout(name, height, width) for name in paths]
        self.A = A.mT.contiguous()  # (K, N, C)
        dt, B, C = x_dbl.split([x_dbl.shape[-1] - 2 * n, n, n], dim=-1)
        self.ones = self.weight is not None and self.bias is not None
        if self.ones:  # the bias rides on a column of ones, which is cheaper than a pass of its own
            dt, self.weight, self.bias = F.pad(dt, (0, 1), value=1.0), torch.cat([self.weight, self.bias.unsqueeze(2)], dim=2), None
        self.maps = [x.flatten(2, 3).unbind(1) if x.shape[1] > 1 else x.flatten(2, 3).unbind(1) * k]
        self.maps += [m.flatten(1, 2).unbind(2) for m in (dt, B, C)]  # of each path: (batch, H * W, .)
        self.max_A, self.max_z = self._bounds(x_dbl[..., : x_dbl.shape[-1] - 2 * n])

        longest = max(layout.p * layout.q for layout in self.layouts) * channels
        self.sample_groups = _groups(batch, _GROUP // (longest * n))
        self.state_groups = _groups(n, _GROUP // longest)
        size = self.sample_groups[0].stop * self.state_groups[0].stop * longest
        self.shelf = _shelf(size, x)

    def _bounds(self, dt: Tensor) -> tuple[float, float]:
        """Upper bounds of |A| and of |dt_weight dt + dt_bias|, from the small factors; infinite where reading them would stall."""
        if dt.device.type != "cpu":
            return math.inf, math.inf
        max_A = _largest(self.A)
        if self.weight is None:
            return max_A, math.inf
        rows = self.weight.abs()
        bias = rows[..., -1] if self.ones else 0.0
        return max_A, (rows.sum(2).sub_(bias).mul_(_largest(dt)) + bias).amax().item()

    def path(self, samples: slice, i: int) -> _Path:
        """Path `i` of a group of samples."""
        layout = self.layouts[i]
        whole = samples.stop - samples.start == self.x.shape[0]
        x, dt, B, C = (layout.read(m[i] if whole else m[i][samples]) for m in self.maps)
        if self.ones and layout.table is not None:
            dt[..., -1] = 1.0  # a padded step has a bias, too
        return _Path(layout, x, dt, B, C, self.A[i], *_of(i, self.weight, self.bias))

    def workspaces(self, path: _Path, use: str) -> Iterator[tuple[slice, _Workspace]]:
        """For each group of states, a workspace that holds delta, the decays and delta x of the path."""
        batch, _, channels = path.x.shape
        for states in self.state_groups:
            work = self.shelf.workspace(path.layout, batch, states.stop - states.start, channels, use, len(self.state_groups) > 1)
            if states.start == 0:
                lowest = -self.max_A * (1.0 + self._write_delta(path, work.delta, work.slope))
            work.write_decays(path.A[states], lowest)
            if states.start == 0:
                torch.mul(work.delta, path.x, out=work.dx)
            yield states, work

    def _write_delta(self, path: _Path, z: Tensor, slope: Tensor | None) -> float:
        """Write the steps (batch, P * Q, C), zero after the end of the path, and into `slope` the derivative of softplus there.

        Returns an upper bound of what softplus got.
        """
        if path.weight is not None:
            torch.mm(path.dt.flatten(0, 1), path.weight.mT, out=z.flatten(0, 1))
        elif path.bias is not None:
            torch.add(path.dt, path.bias, out=z)
        else:
            z.copy_(path.dt)
        largest = self.max_z
        if largest > _PLAIN_SOFTPLUS and z.device.type == "cpu":
            largest = _largest(z)
        if self.softplus:
            if slope is not None:
                torch.sigmoid(z, out=slope)
            if largest <= _PLAIN_SOFTPLUS:
                z.exp_().log1p_()
            else:
                z.copy_(F.softplus(z))
        path.layout.clear_tail(z)
        return largest


class _Path(NamedTuple):
    """One path of a group of samples, in the order of its layout: x (batch, P * Q, C), dt (., R), B and C (., N); A (N, C)."""

    layout: _Layout
    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    weight: Tensor | None
    bias: Tensor | None


def _groups(total: int, most: int) -> list[slice]:
    """`total` in slices of at most `most`, at least 1, as equal as can be."""
    size = -(-total // -(-total // max(1, most)))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _skip(x: Tensor, D: Tensor | None, k: int, merge: bool) -> Tensor:
    """D x, the start of the output: (batch, H, W, C) merged, else (batch, K, H, W, C)."""
    batch, shared, height, width, channels = x.shape
    if D is None:
        return x.new_zeros((batch, height, width, channels) if merge else (batch, k, height, width, channels))
    if not merge:
        y = x * D[:, None, None]
    elif shared == 1:
        y = x[:, 0] * D.sum(0)
    else:
        y = x[:, 0] * D[0]
        for i in range(1, k):
            y.addcmul_(x[:, i], D[i])
    return y.contiguous()


def _skip_backward(x: Tensor, D: Tensor | None, dy: Tensor, k: int, merge: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of x (to add to) and D through D x."""
    if D is None:
        return x.new_zeros(x.shape), None
    if merge and x.shape[1] == 1:
        dx, dD = (dy * D.sum(0)).unsqueeze(1), (dy * x[:, 0]).sum((0, 1, 2)).expand(k, -1)
    else:
        dy = dy.unsqueeze(1) if merge else dy
        dx, dD = dy * D[:, None, None], (dy * x).sum((0, 2, 3))
        dx = dx if x.shape[1] > 1 else dx.sum(1, keepdim=True)
    return dx.contiguous(), dD


def _sum_states(m: Tensor, weights: Tensor) -> Tensor:
    """(batch, L, N, C), (batch or 1, L or 1, N) -> (batch, L, C); may overwrite m."""
    return m.squeeze(2).mul_(weights) if m.shape[2] == 1 else torch.matmul(weights.unsqueeze(2), m).squeeze(2)


def _dot(m: Tensor, other: Tensor, spare: Tensor) -> Tensor:
    """(batch, L, N, C), (batch, L, C) -> (batch, L, N); `spare` like m, to overwrite."""
    if m.shape[2] == 1:
        return torch.mul(m, other.unsqueeze(2), out=spare).sum(-1)
    return torch.matmul(m, other.unsqueeze(3)).squeeze(3)


def _largest(m: Tensor) -> float:
    """The largest magnitude in m."""
    low, high = m.aminmax()
    return max(-low.item(), high.item())


def _of(i: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[i] for t in tensors]


# --- workspaces -------------------------------------------------------------------------------------------------------


class _Shelf:
    """Flat buffers of `size` elements and the workspaces over them."""

    def __init__(self, size: int, like: Tensor) -> None:
        with torch.inference_mode(False):  # the next caller may train
            self.buffers = {name: torch.empty(size, dtype=like.dtype, device=like.device) for name in ("delta", "a")}
        self.size, self.like = size, like.new_empty(0)
        self.workspaces: OrderedDict[tuple, _Workspace] = OrderedDict()

    def buffer(self, name: str) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(self.buffers["a"])
        return self.buffers[name]

    def workspace(self, *key: object) -> _Workspace:
        if key in self.workspaces:
            self.workspaces.move_to_end(key)
        else:
            with torch.inference_mode(False):
                self.workspaces[key] = _Workspace(self, *key)
            if len(self.workspaces) > _KEPT:
                self.workspaces.popitem(last=False)
        return self.workspaces[key]


_LOCAL = threading.local()


def _shelf(size: int, like: Tensor) -> _Shelf:
    """The thread's own shelf on a CPU, grown to `size`; a new one for one call where it would hold too much, or elsewhere."""
    if size > _KEPT_SIZE or like.device.type != "cpu":
        return _Shelf(size, like)
    shelves = _LOCAL.__dict__.setdefault("shelves", {})
    if like.dtype not in shelves or shelves[like.dtype].size < size:
        shelves[like.dtype] = _Shelf(max(size, _GROUP), like)
    return shelves[like.dtype]


class _Workspace:
    """Memory for one path of a group of samples and states, and the operations of a scan on it, ready to run.

    `delta`, `dx`, `slope` are (batch, P * Q, C), `a`, `u`, `g` (batch, P * Q, N, C). In the forward with one state, `delta`, `dx`
    and `u` are one: each is dead when the next is written.
    """

    def __init__(self, shelf: _Shelf, layout: _Layout, batch: int, states: int, channels: int, use: str, more: bool) -> None:
        steps = (batch, layout.p * layout.q, channels)
        full = (*steps[:2], states, channels)
        self.delta, self.slope = _take(shelf.buffer("delta"), steps), None
        self.a = _take(shelf.buffer("a"), full)
        if use == "forward" and states == 1 and not more:
            self.dx, self.u = self.delta, self.delta.unsqueeze(2)
        else:
            self.dx, self.u = _take(shelf.buffer("dx"), steps), _take(shelf.buffer("u"), full)
        a, u = (m.unflatten(1, (layout.p, layout.q)) for m in (self.a, self.u))
        self.last_state = u[:, 0, 0] if layout.flip else u[:, -1, -1]
        self.levels = []  # (delta of the steps by chunk, where its sums go, where their decays go)
        decays, delta = [a], self.delta.unflatten(1, (layout.p, layout.q))
        for count in layout.factors:
            chunked = delta.unflatten(1, (-1, count))
            sums = delta.new_empty((*chunked.shape[:2], *chunked.shape[3:]))
            delta = _next(sums)
            decays.append(delta.new_empty((*delta.shape[:3], states, channels)))
            self.levels.append((chunked, sums, delta.unsqueeze(3), decays[-1]))
        self.forward_steps = _scan(decays, u, layout.factors, layout.flip)
        if use == "backward":
            self.slope = _take(shelf.buffer("slope"), steps)
            self.g, self.spare = _take(shelf.buffer("g"), full), _take(shelf.buffer("spare"), full)
            self.ones = a.new_ones(1, 1, states)
            self.backward_steps = _scan_back(decays, self.g.unflatten(1, (layout.p, layout.q)), layout.factors, layout.flip)
            self.shifts = [(a[here], u[there]) for here, there in _shifts(layout.flip)]
            self.first = a[:, -1, -1] if layout.flip else a[:, 0, 0]

    def write_decays(self, A: Tensor, lowest: float) -> None:
        """exp(A delta) of the steps, and of the chunks of every level; A (N, C), `lowest` a lower bound of A delta."""
        torch.mul(self.delta.unsqueeze(2), A, out=self.a)
        if lowest < _LOWEST_EXPONENT:
            self.a.clamp_(min=_LOWEST_EXPONENT)
        self.a.exp_()
        for chunked, sums, delta, decay in self.levels:
            torch.sum(chunked, 2, out=sums)
            torch.mul(delta, A, out=decay).clamp_(min=_LOWEST_EXPONENT).exp_()

    def scan(self, path: _Path, states: slice) -> None:
        """Write the states h into u."""
        torch.mul(self.dx.unsqueeze(2), path.B[..., states, None], out=self.u)
        for step in self.forward_steps:
            step()

    def scan_back(self) -> None:
        """Turn g from C dy into dL/dh."""
        for step in self.backward_steps:
            step()

    def gradients(self, path: _Path, states: slice) -> tuple[Tensor, Tensor, Tensor]:
        """After `scan_back`: the gradients of delta x and, through A delta, of delta, (batch, P * Q, C); that of A (N, C)."""
        for a, before in self.shifts:  # a becomes the gradient of A delta: g[t] a[t] h[t-1]
            a.mul_(before)
        self.first.zero_()
        self.a.mul_(self.g)
        dA = torch.mul(self.a, self.delta.unsqueeze(2), out=self.spare).flatten(0, 1).sum(0)
        gB = _sum_states(self.g, path.B[..., states])
        return gB, _sum_states(self.a.mul_(path.A[states]), self.ones), dA


_Steps = list[Callable[[], Tensor]]


def _scan(decays: list[Tensor], u: Tensor, factors: tuple[int, ...], flip: bool) -> _Steps:
    """h[t] = a[t] h[t-1] + u[t] along (P, Q), in place in u (batch, P, Q, N, C); `decays` are a of this and of the next levels."""
    a = decays[0]
    if not factors:
        return _advance(_positions(a, flip)[1:], _positions(u, flip))
    a_steps, u_steps = _chunk_steps(a, factors[0], flip), _chunk_steps(u, factors[0], flip)
    ends = a.new_empty(u_steps[0].shape)
    steps = [_addcmul(u_steps[1], a_steps[1], u_steps[0], ends)]
    steps += [_addcmul(step, decay, ends, ends) for decay, step in zip(a_steps[2:], u_steps[2:], strict=True)]
    steps += _scan(decays[1:], _next(ends), factors[1:], flip)
    for here, there in _shifts(flip):
        first = u_steps[0][here]
        if first.numel():
            steps.append(_addcmul(first, a_steps[0][here], ends[there], first))
    return steps + _advance(a_steps[1:], u_steps)


def _scan_back(decays: list[Tensor], g: Tensor, factors: tuple[int, ...], flip: bool) -> _Steps:
    """g[t] += a[t+1] g[t+1] along (P, Q), in place in g (batch, P, Q, N, C), from the last step to the first."""
    a, flip = decays[0], not flip
    if not factors:
        return _advance(_positions(a, flip)[:-1], _positions(g, flip))
    a_steps, g_steps = _chunk_steps(a, factors[0], flip), _chunk_steps(g, factors[0], flip)
    ends = a.new_empty(g_steps[0].shape)  # what a chunk hands to the one before it
    steps = [_addcmul(g_steps[1], a_steps[0], g_steps[0], ends)]
    steps += [_addcmul(step, decay, ends, ends) for decay, step in zip(a_steps[1:-1], g_steps[2:], strict=True)]
    steps.append(functools.partial(ends.mul_, a_steps[-1]))
    steps += _scan(decays[1:], _next(ends), factors[1:], flip)
    steps += [functools.partial(g_steps[0][here].add_, ends[there]) for here, there in _shifts(flip)]
    return steps + _advance(a_steps[:-1], g_steps)


def _advance(decays: tuple[Tensor, ...] | list[Tensor], states: tuple[Tensor, ...] | list[Tensor]) -> _Steps:
    triples = zip(states[1:], decays, states[:-1], strict=True)
    return [_addcmul(state, decay, before, state) for state, decay, before in triples]


def _addcmul(base: Tensor, decay: Tensor, before: Tensor, out: Tensor) -> Callable[[], Tensor]:
    return functools.partial(torch.addcmul, base, decay, before, out=out)


def _shifts(flip: bool) -> tuple[tuple, tuple]:
    """Indices (here, there) into (batch, P, Q, ...): `there` is visited just before `here`. In the columns, then between."""
    every, after, before = slice(None), slice(1, None), slice(None, -1)
    if flip:
        return ((every, before), (every, after)), ((every, -1, before), (every, 0, after))
    return ((every, after), (every, before)), ((every, 0, after), (every, -1, before))


def _chunk_steps(m: Tensor, count: int, flip: bool) -> tuple[Tensor, ...]:
    """The steps of all chunks in visiting order: (batch, P, Q, N, C) -> `count` views (batch, P / count, Q, N, C)."""
    views = m.unflatten(1, (-1, count)).unbind(2)
    return views[::-1] if flip else views


def _positions(m: Tensor, flip: bool) -> list[Tensor]:
    """(batch, P, Q, N, C) -> views (batch, N, C) in visiting order."""
    views = [view for column in m.unbind(2) for view in column.unbind(1)]
    return views[::-1] if flip else views


def _next(chunks: Tensor) -> Tensor:
    """(batch, P, Q, ...) of the chunks as the next level sees it: a single row becomes a column."""
    return chunks.transpose(1, 2) if chunks.shape[1] == 1 else chunks


def _take(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)
