"""The public operators: documentation, argument checks, choice of backend.

`delta`, `A`, `B`, `C`, `D`, `z` are the names of the Mamba paper (arXiv 2312.00752); maps are channels-last, (batch, H, W, C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, reference
from .backends import choose_backend
from .paths import ScanPaths, check_size, path_length


def selective_scan(
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
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan with mamba's signature and layout (arXiv 2312.00752, algorithm 2).

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],   y[t] = C[t] . h[t] + D u[t],   then y silu(z)

    Args:
        u: `(batch, dim, length)`, float16, bfloat16, float32 or float64.
        delta: `(batch, dim, length)`, the step before `delta_bias` and softplus.
        A: `(dim, state)`, negative for a stable scan.
        B: `(batch, state, length)` or `(batch, groups, state, length)`; `groups` divides `dim`.
        C: like `B`.
        D: `(dim,)`, the skip weight.
        z: `(batch, dim, length)`, a gate: the output is multiplied by silu(z).
        delta_bias: `(dim,)`, added to `delta`.
        delta_softplus: apply softplus to delta (after the bias).
        return_last_state: also return the state after the last step, `(batch, dim, state)`, float32 (float64 if any input
            is), without gradient except on the reference backend.
        backend: None for the best that can run, or "reference", "chunked", "triton".

    Returns:
        `(batch, dim, length)` in the dtype of `u`, or that and the last state.

    Raises:
        TypeError: a tensor that is not real floating point.
        ValueError: shapes that do not fit, an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    checks.check_tensors(
        {"u": u, "delta": delta, "A": A, "B": B, "C": C},
        {"D": D, "z": z, "delta_bias": delta_bias},
    )
    checks.check_bool(delta_softplus=delta_softplus, return_last_state=return_last_state)
    checks.check_rank("u", u, {3: "(batch, dim, length)"})
    checks.check_rank("A", A, {2: "(dim, state)"})
    checks.check_positive("u", u)
    checks.check_positive("A", A)
    batch, dim, length = u.shape
    state = A.shape[1]
    layout = (("batch", batch), ("dim", dim), ("length", length))
    checks.check_shape("delta", delta, layout)
    checks.check_shape("A", A, (("dim", dim), ("state", state)))
    checks.check_rank("B", B, {3: "(batch, state, length)", 4: "(batch, groups, state, length)"})
    groups = B.shape[1] if B.dim() == 4 else 1
    if groups == 0 or dim % groups:
        raise ValueError(f"B: has {groups} groups, expected a divisor of dim = {dim}")
    for name, m in (("B", B), ("C", C)):
        if m.dim() == 3 and groups == 1:
            checks.check_shape(name, m, (("batch", batch), ("state", state), ("length", length)))
        else:
            checks.check_shape(name, m, (("batch", batch), ("groups", groups), ("state", state), ("length", length)))
    checks.check_shape("D", D, (("dim", dim),))
    checks.check_shape("z", z, layout)
    checks.check_shape("delta_bias", delta_bias, (("dim", dim),))
    backend = choose_backend(u, backend, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    if backend == "reference":
        return reference.selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)

    B, C = (m if m.dim() == 4 else m.unsqueeze(1) for m in (B, C))
    if backend == "triton":
        operands = (u, delta, A, B, C, D, z, delta_bias)
        # What the backward needs is a third of the traffic. Operands are not asked: under vmap none says it requires a gradient.
        keep_states = torch.is_grad_enabled()
        y, last_state, _ = torch.ops.visionssm.selective_scan(*operands, delta_softplus, return_last_state, keep_states)
        return (y, last_state) if return_last_state else y
    split = (groups, dim // groups)
    # the gate comes before the rounding to 16 bits: what it tames may overflow float16
    wide = u if z is None else u.to(torch.promote_types(u.dtype, torch.float32))
    y, last_state = _scan(
        wide.unflatten(1, split).mT.unsqueeze(2),  # (batch, groups, 1, length, dim / groups)
        _pack(*(m.mT.unsqueeze(2) for m in (delta.unflatten(1, split), B, C))),
        A.unflatten(0, split),
        None if D is None else D.unflatten(0, split),
        None,
        None if delta_bias is None else delta_bias.unflatten(0, split),
        tuple("h" for _ in range(groups)),  # not ("h",) * groups, which a symbolic number cannot do
        delta_softplus,
        False,
        return_last_state,
        backend,
    )
    y = y.squeeze(2).mT.flatten(1, 2)
    if z is not None:
        y = (y * F.silu(z.to(y.dtype))).to(u.dtype)
    return (y, last_state.flatten(1, 2)) if return_last_state else y


def cross_selective_scan(
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
    backend: str | None = None,
) -> Tensor:
    """Selective scans of one map along K paths: cross-scan, scan and cross-merge in one, nothing permuted in memory.

    Along path k, with `delta = softplus(dt_weight[k] dt + dt_bias[k])` at each position:

        h[t] = exp(delta[t] A[k]) h[t-1] + delta[t] B[t] x[t],   y[t] = C[t] . h[t] + D[k] x[t]

    and y[t] goes back to the position it came from. A padded step of a window path has x = B = C = 0 and
    delta = softplus(dt_bias): the state only decays. Source: VMamba (arXiv 2401.10166, section 4.2, SS2D).

    Args:
        x: `(batch, H, W, C)`, one map for all paths, or `(batch, K, H, W, C)`, one per path.
        dt: `(batch, K, H, W, R)` with `dt_weight`, or `(batch, K, H, W, C)` without.
        A: `(K, C, N)`, negative for a stable scan.
        B: `(batch, K, H, W, N)`.
        C: `(batch, K, H, W, N)`.
        D: `(K, C)`, the skip weight.
        paths: K path names (h, v, wK, each with or without `_flip`; see `CROSS`), or a `ScanPaths`.
        dt_weight: `(K, C, R)`, expands a low-rank `dt` inside the kernel.
        dt_bias: `(K, C)`, added to the step before softplus.
        dt_softplus: apply softplus to the step.
        order: "image": the layouts above. "scan": x, dt, B and C are `(batch, K, L', .)`, already in path order (from
            `cross_scan`), shorter paths padded at their end; the result is unmerged `(batch, K, L', C)`.
        merge: sum the paths. False returns them apart.
        backend: None for the best that can run, or "reference", "chunked", "triton".

    Returns:
        `(batch, H, W, C)`, or `(batch, K, H, W, C)` unmerged, or `(batch, K, L', C)` in scan order; in the dtype of `x`.

    Raises:
        TypeError: a tensor that is not real floating point.
        ValueError: shapes that do not fit, an unknown path, order or backend.
        RuntimeError: the backend asked for cannot run here.
    """
    checks.check_tensors({"x": x, "dt": dt, "A": A, "B": B, "C": C}, {"D": D, "dt_weight": dt_weight, "dt_bias": dt_bias})
    checks.check_rank("A", A, {3: "(K, C, N)"})
    if order == "image":
        checks.check_rank("x", x, {4: "(batch, H, W, C)", 5: "(batch, K, H, W, C)"})
        size = (("H", x.shape[-3]), ("W", x.shape[-2]))
        names = checks.path_names(paths, (x.shape[-3], x.shape[-2]))
        if isinstance(paths, ScanPaths) and paths.token_at is not None:
            raise ValueError('paths: token_at needs order="scan" (cross_scan inserts the token)')
    elif order == "scan":
        checks.check_rank("x", x, {4: '(batch, K, L\', C) with order="scan"'})
        size = (("L'", x.shape[2]),)
        names = checks.path_names(paths)
        if isinstance(paths, ScanPaths):
            checks.check_axis("x", "L'", x.shape[2], paths.length, "the longest of paths")
    else:
        raise ValueError(f'order: got {order!r}, expected "image" or "scan"')
    k, channels, state, batch = len(names), x.shape[-1], A.shape[2], x.shape[0]
    rank = _rank(dt_weight, channels)
    for name, m, last in (
        ("dt", dt, ("R" if dt_weight is not None else "C", rank)),
        ("B", B, ("N", state)),
        ("C", C, ("N", state)),
    ):
        checks.check_shape(name, m, (("batch", batch), ("K", k), *size, last))
    _check_parameters(x, A, D, dt_weight, dt_bias, k, rank)
    if x.dim() == 5 or order == "scan":
        checks.check_axis("x", "K", x.shape[1], k, "the number of paths")
    checks.check_bool(dt_softplus=dt_softplus, merge=merge)
    backend = choose_backend(x, backend, dt=dt, A=A, B=B, C=C, D=D, dt_weight=dt_weight, dt_bias=dt_bias)
    if backend == "reference":
        return reference.cross_selective_scan_ref(
            x, dt, A, B, C, D,
            paths=paths, dt_weight=dt_weight, dt_bias=dt_bias, dt_softplus=dt_softplus, order=order, merge=merge,
        )  # fmt: skip
    if order == "scan":  # a path in scan order is a row of a 1 x L' map
        x, dt, B, C = (m.unsqueeze(2) for m in (x, dt, B, C))
        y, _ = _scan(x, _pack(dt, B, C), A, D, dt_weight, dt_bias, ("h",) * k, dt_softplus, False, False, backend)
        return y.squeeze(2)
    x = x if x.dim() == 5 else x.unsqueeze(1)
    return _scan(x, _pack(dt, B, C), A, D, dt_weight, dt_bias, names, dt_softplus, merge, False, backend)[0]


def cross_selective_scan_packed(
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    paths: tuple[str, ...] | ScanPaths,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    merge: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`cross_selective_scan` in image order with dt, B and C as one tensor, the way a single projection GEMM writes them.

    The gradient of the projection comes back packed as well, so a block that calls this neither splits nor concatenates.

    Args:
        x: `(batch, H, W, C)` or `(batch, K, H, W, C)`.
        x_dbl: `(batch, H, W, K, R + 2N)`: dt (R with `dt_weight`, else C), then B (N), then C (N), at every position and path.
        A, D, paths, dt_weight, dt_bias, dt_softplus, merge, backend: as in `cross_selective_scan`.

    Returns:
        `(batch, H, W, C)`, or `(batch, K, H, W, C)` unmerged, in the dtype of `x`.

    Raises:
        TypeError, ValueError, RuntimeError: as in `cross_selective_scan`.
    """
    checks.check_tensors({"x": x, "x_dbl": x_dbl, "A": A}, {"D": D, "dt_weight": dt_weight, "dt_bias": dt_bias})
    checks.check_rank("x", x, {4: "(batch, H, W, C)", 5: "(batch, K, H, W, C)"})
    checks.check_rank("A", A, {3: "(K, C, N)"})
    batch, height, width, channels = x.shape[0], *x.shape[-3:]
    names = checks.path_names(paths, (height, width))
    if isinstance(paths, ScanPaths) and paths.token_at is not None:
        raise ValueError("paths: token_at is for cross_scan and cross_merge; an image-order scan has no inserted token")
    k, state = len(names), A.shape[2]
    rank = _rank(dt_weight, channels)
    width_of = "R + 2N" if dt_weight is not None else "C + 2N"
    checks.check_shape("x_dbl", x_dbl, (("batch", batch), ("H", height), ("W", width), ("K", k), (width_of, rank + 2 * state)))
    _check_parameters(x, A, D, dt_weight, dt_bias, k, rank)
    if x.dim() == 5:
        checks.check_axis("x", "K", x.shape[1], k, "the number of paths")
    checks.check_bool(dt_softplus=dt_softplus, merge=merge)
    backend = choose_backend(x, backend, x_dbl=x_dbl, A=A, D=D, dt_weight=dt_weight, dt_bias=dt_bias)
    if backend == "reference":
        dt, B, C = x_dbl.permute(0, 3, 1, 2, 4).split([rank, state, state], dim=-1)
        return reference.cross_selective_scan_ref(
            x, dt, A, B, C, D,
            paths=paths, dt_weight=dt_weight, dt_bias=dt_bias, dt_softplus=dt_softplus, merge=merge,
        )  # fmt: skip
    x = x if x.dim() == 5 else x.unsqueeze(1)
    return _scan(x, x_dbl, A, D, dt_weight, dt_bias, names, dt_softplus, merge, False, backend)[0]


def cross_scan(x: Tensor, paths: tuple[str, ...] | ScanPaths) -> Tensor:
    """Read a map along K paths.

    Args:
        x: `(batch, H, W, C)`; flat `(batch, H * W, C)` as well when `paths` is a `ScanPaths`, and flat `(batch, H * W + 1, C)`
            when that inserts a token.
        paths: K path names or a `ScanPaths`.

    Returns:
        `(batch, K, L', C)`, zero at padded steps; L' is the length of the longest path.

    Raises:
        TypeError: `x` is not real floating point.
        ValueError: shapes that do not fit, an unknown path.
    """
    names, size, token_at = _check_map(x, paths)
    flat = x.reshape(x.shape[0], 1, -1, x.shape[-1])
    return torch.ops.visionssm.cross_scan(flat, list(names), *size, token_at)


def cross_merge(ys: Tensor, paths: tuple[str, ...] | ScanPaths, size: tuple[int, int] | None = None, merge: bool = True) -> Tensor:
    """Put K sequences back on the map they were read from; with `merge=True` exactly the adjoint of `cross_scan`.

    Args:
        ys: `(batch, K, L', C)`.
        paths: K path names or a `ScanPaths`.
        size: (H, W); may be left out when `paths` is a `ScanPaths`.
        merge: sum the paths. False returns them apart.

    Returns:
        `(batch, H, W, C)`, or `(batch, K, H, W, C)` unmerged; with an inserted token flat, `(batch, [K,] H * W + 1, C)`.

    Raises:
        TypeError: `ys` is not real floating point.
        ValueError: shapes that do not fit, an unknown path, no size.
    """
    names, size, token_at = _check_sequences(ys, paths, size, merge)
    maps = torch.ops.visionssm.cross_merge(ys, list(names), *size, token_at, merge)
    if token_at is None:
        maps = maps.unflatten(2, size)
    return maps.squeeze(1) if merge else maps


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
    """The twin of `selective_scan` that specifies it: the plain loop of reference.py behind the same checks."""
    operands = (u, delta, A, B, C, D, z, delta_bias)
    return selective_scan(*operands, delta_softplus, return_last_state, backend="reference")


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
    """The twin of `cross_selective_scan` that specifies it."""
    options = {"dt_weight": dt_weight, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "order": order, "merge": merge}
    return cross_selective_scan(x, dt, A, B, C, D, paths=paths, **options, backend="reference")


def cross_scan_ref(x: Tensor, paths: tuple[str, ...] | ScanPaths) -> Tensor:
    """The twin of `cross_scan` that specifies it, in operations that autograd knows."""
    _check_map(x, paths)
    return reference.cross_scan_ref(x, paths)


def cross_merge_ref(
    ys: Tensor, paths: tuple[str, ...] | ScanPaths, size: tuple[int, int] | None = None, merge: bool = True
) -> Tensor:
    """The twin of `cross_merge` that specifies it, in operations that autograd knows."""
    _check_sequences(ys, paths, size, merge)
    return reference.cross_merge_ref(ys, paths, size, merge)


def _check_map(x: Tensor, paths: tuple[str, ...] | ScanPaths) -> tuple[tuple[str, ...], tuple[int, int], int | None]:
    """Check the arguments of `cross_scan`; returns names, (H, W) and token_at."""
    checks.check_tensors({"x": x})
    if isinstance(paths, ScanPaths):
        checks.check_rank("x", x, {4: "(batch, H, W, C)", 3: "(batch, positions, C)"})
        if x.dim() == 4:
            checks.path_names(paths, (x.shape[1], x.shape[2]))
            if paths.token_at is not None:
                raise ValueError(f"x: with token_at expected a flat map (batch, {paths.positions}, C), got {tuple(x.shape)}")
        else:
            checks.check_axis("x", "positions", x.shape[1], paths.positions, "the positions of paths")
        names, size, token_at = paths.names, paths.size, paths.token_at
    else:
        checks.check_rank("x", x, {4: "(batch, H, W, C)"})
        names, size, token_at = checks.path_names(paths), (x.shape[1], x.shape[2]), None
    checks.check_positive("x", x)
    return names, size, token_at


def _check_sequences(
    ys: Tensor, paths: tuple[str, ...] | ScanPaths, size: tuple[int, int] | None, merge: bool
) -> tuple[tuple[str, ...], tuple[int, int], int | None]:
    """Check the arguments of `cross_merge`; returns names, (H, W) and token_at."""
    checks.check_tensors({"ys": ys})
    checks.check_bool(merge=merge)
    checks.check_rank("ys", ys, {4: "(batch, K, L', C)"})
    names, token_at = checks.path_names(paths), None
    if isinstance(paths, ScanPaths):
        if size is not None:
            checks.path_names(paths, check_size("size", size))
        size, token_at = paths.size, paths.token_at
    elif size is None:
        raise ValueError("size: expected (H, W), got None; only a ScanPaths knows the size of its map")
    size = check_size("size", size)
    length = max(path_length(name, *size) for name in names) + int(token_at is not None)
    checks.check_axis("ys", "K", ys.shape[1], len(names), "the number of paths")
    checks.check_axis("ys", "L'", ys.shape[2], length, "the longest of paths")
    checks.check_positive("ys", ys)
    return names, size, token_at


def _rank(dt_weight: Tensor | None, channels: int) -> int:
    """Size of the last axis of dt: R, or C when the step comes at full width."""
    if dt_weight is None:
        return channels
    checks.check_rank("dt_weight", dt_weight, {3: "(K, C, R)"})
    checks.check_positive("dt_weight", dt_weight)
    return dt_weight.shape[2]


def _check_parameters(
    x: Tensor, A: Tensor, D: Tensor | None, dt_weight: Tensor | None, dt_bias: Tensor | None, k: int, rank: int
) -> None:
    checks.check_positive("x", x)
    checks.check_positive("A", A)
    per_channel = (("K", k), ("C", x.shape[-1]))
    checks.check_shape("A", A, (*per_channel, ("N", A.shape[2])))
    checks.check_shape("D", D, per_channel)
    checks.check_shape("dt_weight", dt_weight, (*per_channel, ("R", rank)))
    checks.check_shape("dt_bias", dt_bias, per_channel)


def _pack(dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """(batch, K, H, W, .) each -> (batch, H, W, K, R + 2N)."""
    return torch.cat([dt, B, C], dim=-1).permute(0, 2, 3, 1, 4)


def _scan(
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    names: tuple[str, ...],
    dt_softplus: bool,
    merge: bool,
    return_last_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y, last_state, _ = torch.ops.visionssm.cross_selective_scan(
        x, x_dbl, A, D, dt_weight, dt_bias, list(names), dt_softplus, merge, return_last_state, backend
    )
    return y, last_state
