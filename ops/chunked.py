"""The CPU default: a two-level scan in plain PyTorch, in image order, with its own backward; memory linear in L.

A path is cut into chunks, a row or a column of the map each, and all chunks advance one step together. Three sweeps do it:
the end state of every chunk as if it started from zero; the carries from chunk to chunk (a chunk decays the state before it by
exp(A * sum of delta)); the scan itself, now started from the right states. Nothing is kept for the backward, which recomputes.

The layout inside is (batch, chunk, step, state, C): for `h` and `v` a view of the image-order map, for every other path a copy in
path order. Flips read chunks and steps backwards.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .paths import parse_path, path_table

_GROUP = 1 << 20  # elements of one workspace; larger batches and states go through in groups


def states_shape(batch: int, k: int, height: int, width: int, channels: int, state: int) -> tuple[int, ...]:
    """Shape of what `forward` keeps for `backward`: nothing."""
    return (0,)


@dataclass(frozen=True)
class _Chunks:
    """How a path is cut: `count` chunks of `steps` steps, walked from the last to the first if `flip`.

    `table` (count * steps,) holds the raster position of each step, -1 for a padded one, `inverse` (H * W,) the way back; both None
    where a view of the map does (its columns if `column`). Steps from `length` on are no part of the path.
    """

    column: bool
    flip: bool
    count: int
    steps: int
    length: int
    table: np.ndarray | None = None
    inverse: np.ndarray | None = None


@functools.lru_cache(maxsize=512)
def _chunks(name: str, height: int, width: int) -> _Chunks:
    spec = parse_path(name)
    length = height * width
    column = spec.column and min(height, width) > 1
    if not spec.window:
        count, steps = (width, height) if column else (height, width)
        if max(count, steps) <= 4 * min(count, steps):
            return _Chunks(column, spec.flip, count, steps, length)
        if not column:
            steps = next((s for s in range(math.isqrt(length), math.isqrt(length) // 2, -1) if length % s == 0), 0)
            if steps:
                return _Chunks(False, spec.flip, length // steps, steps, length)
    path = path_table(name.removesuffix("_flip"), height, width)
    steps = math.isqrt(len(path) - 1) + 1
    count = -(-len(path) // steps)
    table = np.full(count * steps, -1, dtype=np.int64)
    table[: len(path)] = path
    inverse = np.empty(length, dtype=np.int64)
    visited = np.flatnonzero(table >= 0)
    inverse[table[visited]] = visited
    table.flags.writeable = inverse.flags.writeable = False
    return _Chunks(False, spec.flip, count, steps, len(path), table, inverse)


def _read(maps: Tensor, chunks: _Chunks) -> Tensor:
    """(batch, H, W, M) -> (batch, count, steps, M), zeros at padded steps; a view where the path allows one."""
    if chunks.table is None:
        if chunks.column:
            return maps.transpose(1, 2)
        return maps if maps.shape[1] == chunks.count else maps.flatten(1, 2).unflatten(1, (chunks.count, chunks.steps))
    table = torch.from_numpy(chunks.table.clip(min=0)).to(maps.device)
    steps = maps.flatten(1, 2).index_select(1, table)
    if len(chunks.table) > len(chunks.inverse):
        steps.masked_fill_(torch.from_numpy(chunks.table < 0).to(maps.device)[:, None], 0.0)
    return steps.unflatten(1, (chunks.count, chunks.steps))


def _put_back(steps: Tensor, chunks: _Chunks, size: tuple[int, int]) -> Tensor:
    """The inverse of `_read`: (batch, count, steps, M) -> (batch, H, W, M)."""
    if chunks.table is None:
        return steps.transpose(1, 2) if chunks.column else steps.flatten(1, 2).unflatten(1, size)
    inverse = torch.from_numpy(chunks.inverse.copy()).to(steps.device)
    return steps.flatten(1, 2).index_select(1, inverse).unflatten(1, size)


def _delta(dt: Tensor, weight: Tensor | None, bias: Tensor | None, softplus: bool, chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """The step before and after softplus, (batch, count, steps, C); zero after the end of the path."""
    z = dt if weight is None else dt @ weight.T
    if bias is not None:
        z = z + bias
    delta = torch.nn.functional.softplus(z) if softplus else z.clone()
    _clear_tail(delta, chunks)
    return z, delta


def _clear_tail(steps: Tensor, chunks: _Chunks) -> None:
    if chunks.length < chunks.count * chunks.steps:
        last = chunks.length - (chunks.count - 1) * chunks.steps
        steps[:, -1, last:] = 0.0


def _order(m: Tensor, dim: int, flip: bool) -> tuple[Tensor, ...]:
    slices = m.unbind(dim)
    return slices[::-1] if flip else slices


def _scan(a: Tensor, u: Tensor, total: Tensor, flip: bool) -> Tensor:
    """In u (batch, count, steps, N, C), turn inputs into states: h[t] = a[t] h[t-1] + u[t].

    Returns the state at the end of every chunk (batch, count, N, C). `total` is the decay over each chunk.
    """
    decays, states = _order(a, 2, flip), _order(u, 2, flip)
    ends = states[0].clone()
    for decay, state in zip(decays[1:], states[1:], strict=True):
        ends = torch.addcmul(state, decay, ends)
    rows, totals = _order(ends, 1, flip), _order(total, 1, flip)
    for before, row, decay in zip(rows[:-1], rows[1:], totals[1:], strict=True):
        row.addcmul_(decay, before)
    this, before = (slice(None, -1), slice(1, None)) if flip else (slice(1, None), slice(None, -1))
    states[0][:, this].addcmul_(decays[0][:, this], ends[:, before])
    for before, state, decay in zip(states[:-1], states[1:], decays[1:], strict=True):
        state.addcmul_(decay, before)
    return ends


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
    dtype = x.dtype
    x, x_dbl, A, D, dt_weight, dt_bias = _compute_dtype(x, x_dbl, A, D, dt_weight, dt_bias)
    batch, _, height, width, channels = x.shape
    k, _, n = A.shape
    y = x.new_zeros((batch, height, width, channels) if merge else (batch, k, height, width, channels))
    last_state = x.new_empty((batch, k, channels, n) if return_last_state else (0,))
    for i, name in enumerate(paths):
        chunks = _chunks(name, height, width)
        x_map = x[:, i if x.shape[1] > 1 else 0]
        dt, B, C = _split(x_dbl[:, :, :, i], chunks, n)
        xs = _read(x_map, chunks)
        _, delta = _delta(dt, *_of(i, dt_weight, dt_bias), dt_softplus, chunks)
        a = torch.exp(delta.unsqueeze(3) * A[i].T)
        u = (delta * xs).unsqueeze(3) * B.unsqueeze(4)
        total = torch.exp(delta.sum(2).unsqueeze(2) * A[i].T)
        ends = _scan(a, u, total, chunks.flip)
        y_map = y if merge else y[:, i]
        y_map += _put_back((u * C.unsqueeze(4)).sum(3), chunks, (height, width))
        if D is not None:
            y_map.addcmul_(x_map, D[i])
        if return_last_state:
            last_state[:, i] = ends[:, 0 if chunks.flip else -1].mT
    return y.to(dtype), last_state, x.new_empty(0)


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
    inputs = (x, x_dbl, A, D, dt_weight, dt_bias)
    dy, x, x_dbl, A, D, dt_weight, dt_bias = _compute_dtype(dy, *inputs)
    grads = [x.new_empty(0) if t is None else t.new_zeros(t.shape) for t in (x, x_dbl, A, D, dt_weight, dt_bias)]
    dx, dx_dbl, dA, dD, ddt_weight, ddt_bias = grads
    size, n = x.shape[2:4], A.shape[2]
    rank = x_dbl.shape[-1] - 2 * n
    for i, name in enumerate(paths):
        chunks = _chunks(name, *size)
        flip = chunks.flip
        x_map, dx_map = (m[:, i if x.shape[1] > 1 else 0] for m in (x, dx))
        dy_map = dy if merge else dy[:, i]
        weight, bias = _of(i, dt_weight, dt_bias)
        if D is not None:
            dx_map.addcmul_(dy_map, D[i])
            dD[i] = (dy_map * x_map).sum((0, 1, 2))
        dt, B, C = _split(x_dbl[:, :, :, i], chunks, n)
        xs, dys = _read(x_map, chunks), _read(dy_map, chunks)
        z, delta = _delta(dt, weight, bias, dt_softplus, chunks)
        a = torch.exp(delta.unsqueeze(3) * A[i].T)
        dxs = delta * xs
        h = dxs.unsqueeze(3) * B.unsqueeze(4)
        total = torch.exp(delta.sum(2).unsqueeze(2) * A[i].T)
        ends = _scan(a, h, total, flip)
        dC = (h * dys.unsqueeze(3)).sum(-1)
        before = torch.zeros_like(h)  # a[t] h[t-1]
        here, prior = (slice(None, -1), slice(1, None)) if flip else (slice(1, None), slice(None, -1))
        before[:, :, here] = h[:, :, prior]
        edge = -1 if flip else 0
        before[:, here, edge] = ends[:, prior]
        before *= a
        g = dys.unsqueeze(3) * C.unsqueeze(4)
        _scan_back(a, g, total, flip)
        put = dx_dbl[:, :, :, i]
        put[..., rank + n :] = _put_back(dC, chunks, size)
        put[..., rank : rank + n] = _put_back((g * dxs.unsqueeze(3)).sum(-1), chunks, size)
        gB = (g * B.unsqueeze(4)).sum(3)
        dx_map += _put_back(gB * delta, chunks, size)
        before *= g
        dA[i] = (before * delta.unsqueeze(3)).sum((0, 1, 2)).T
        dz = gB * xs + (before * A[i].T).sum(3)
        if dt_softplus:
            dz *= torch.sigmoid(z)
        _clear_tail(dz, chunks)
        if bias is not None:
            ddt_bias[i] = dz.sum((0, 1, 2))
        if weight is not None:
            ddt_weight[i] = dz.flatten(0, 2).T @ dt.flatten(0, 2)
            dz = dz @ weight
        put[..., :rank] = _put_back(dz, chunks, size)
    return tuple(grad if t is None else grad.to(t.dtype) for grad, t in zip(grads, inputs, strict=True))


def _scan_back(a: Tensor, g: Tensor, total: Tensor, flip: bool) -> None:
    """In g, turn dL/dy C into dL/dh: g[t] += a[t+1] g[t+1], from the last step to the first."""
    decays, grads = _order(a, 2, not flip), _order(g, 2, not flip)
    starts = grads[0].clone()
    for decay, grad in zip(decays[:-1], grads[1:], strict=True):
        starts = torch.addcmul(grad, decay, starts)
    starts *= decays[-1]  # what each chunk hands to the one before it
    rows, totals = _order(starts, 1, not flip), _order(total, 1, not flip)
    for after, row, decay in zip(rows[:-1], rows[1:], totals[1:], strict=True):
        row.addcmul_(decay, after)
    this, after = (slice(1, None), slice(None, -1)) if flip else (slice(None, -1), slice(1, None))
    grads[0][:, this] += starts[:, after]
    for after, grad, decay in zip(grads[:-1], grads[1:], decays[:-1], strict=True):
        grad.addcmul_(decay, after)


def _split(x_dbl: Tensor, chunks: _Chunks, n: int) -> tuple[Tensor, Tensor, Tensor]:
    return _read(x_dbl, chunks).split([x_dbl.shape[-1] - 2 * n, n, n], dim=-1)


def _of(i: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[i] for t in tensors]


def _compute_dtype(*tensors: Tensor | None) -> list[Tensor | None]:
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]
