"""The specification: every operator as plain PyTorch that one can check by eye, in any floating dtype, differentiable by autograd.

Slow on purpose (one Python step per position). 16-bit inputs are computed in float32 and returned in the input's dtype.
The arguments are those of the public twins in api.py and arrive here already checked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .paths import ScanPaths


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan (Mamba, arXiv 2312.00752, algorithm 2). Twin of `selective_scan`; see there for shapes.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] . h[t] + D u[t],  then y silu(z)
    """
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias = compute_dtype(u, delta, A, B, C, D, z, delta_bias)
    batch, dim, length = u.shape
    state = A.shape[1]
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (m if m.dim() == 4 else m[:, None] for m in (B, C))  # (batch, groups, state, length)
    B, C = (m.repeat_interleave(dim // m.shape[1], dim=1) for m in (B, C))  # (batch, dim, state, length)

    h = u.new_zeros(batch, dim, state)
    ys = []
    for t in range(length):
        step = delta[:, :, t, None]  # (batch, dim, 1)
        h = torch.exp(step * A) * h + step * B[..., t] * u[:, :, t, None]
        ys.append((C[..., t] * h).sum(-1))
    y = torch.stack(ys, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    y = y.to(dtype)
    return (y, h) if return_last_state else y


def cross_scan_ref(x: Tensor, paths: tuple[str, ...] | ScanPaths) -> Tensor:
    """Twin of `cross_scan`: (batch, H, W, C), or flat (batch, positions, C), -> (batch, K, L', C), zeros at padded steps."""
    paths = _on_map(paths, x.shape[1:3])
    return _gather(x.reshape(x.shape[0], 1, paths.positions, x.shape[-1]), paths)


def cross_merge_ref(
    ys: Tensor, paths: tuple[str, ...] | ScanPaths, size: tuple[int, int] | None = None, merge: bool = True
) -> Tensor:
    """Twin of `cross_merge`: the adjoint of `cross_scan`, written as the read that inverts each path.

    (batch, K, L', C) -> (batch, H, W, C), or (batch, K, H, W, C) with `merge=False`; flat when a token is inserted.
    """
    paths = _on_map(paths, size)
    inverse = torch.from_numpy(paths.inverse.copy()).to(ys.device)  # (K, positions)
    maps = torch.stack([ys[:, k].index_select(1, inverse[k]) for k in range(len(paths))], dim=1)
    if merge:
        maps = maps.sum(1)
    if paths.token_at is None:
        maps = maps.reshape(*maps.shape[:-2], *paths.size, maps.shape[-1])
    return maps


def cross_selective_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    paths: tuple[str, ...] | ScanPaths,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    order: str = "image",
    merge: bool = True,
) -> Tensor:
    """Twin of `cross_selective_scan`: gather every path, scan it, put it back. See there for shapes."""
    if order == "image":
        paths = _on_map(paths, x.shape[-3:-1])
        batch, positions, channels = x.shape[0], paths.positions, x.shape[-1]
        x = x.reshape(batch, -1, positions, channels)  # one map for all paths, or one per path
        dt, B, C = (m.reshape(batch, len(paths), positions, m.shape[-1]) for m in (dt, B, C))
        x, dt, B, C = (_gather(m, paths) for m in (x, dt, B, C))
    dtype = x.dtype
    x, dt, A, B, C, D, dt_weight, dt_bias = compute_dtype(x, dt, A, B, C, D, dt_weight, dt_bias)
    if dt_weight is not None:
        # Not a matrix product, which autocast would run in 16 bits.
        dt = sum(dt[..., r, None] * dt_weight[:, None, :, r] for r in range(dt_weight.shape[2]))
    ys = torch.stack(
        [
            selective_scan_ref(
                x[:, k].mT,
                dt[:, k].mT,
                A[k],
                B[:, k].mT,
                C[:, k].mT,
                None if D is None else D[k],
                delta_bias=None if dt_bias is None else dt_bias[k],
                delta_softplus=dt_softplus,
            ).mT
            for k in range(dt.shape[1])
        ],
        dim=1,
    )  # (batch, K, L', C)
    return (ys if order == "scan" else cross_merge_ref(ys, paths, merge=merge)).to(dtype)


def _on_map(paths: tuple[str, ...] | ScanPaths, size: tuple[int, ...]) -> ScanPaths:
    return paths if isinstance(paths, ScanPaths) else ScanPaths(paths, tuple(size))


def _gather(maps: Tensor, paths: ScanPaths) -> Tensor:
    """(batch, 1 or K, positions, M) -> (batch, K, L', M), zeros at padded steps."""
    table = torch.from_numpy(paths.table.copy()).to(maps.device)  # (K, L')
    padded = F.pad(maps, (0, 0, 0, 1))  # index -1 reads this row of zeros
    shared = maps.shape[1] == 1
    steps = [padded[:, 0 if shared else k].index_select(1, table[k] % padded.shape[2]) for k in range(len(paths))]
    return torch.stack(steps, dim=1)


def compute_dtype(*tensors: Tensor | None) -> list[Tensor | None]:
    """All tensors in one dtype: float64 if any is, else float32 (a state kept in 16 bits overflows)."""
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]
