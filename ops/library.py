"""Registration with torch.library: schemas, fake implementations, autograd. The only file that knows torch.library.

One operator pair carries every use of the scan. It takes one packed projection, as the model's GEMM writes it, and returns its
gradient packed, so that neither direction permutes or concatenates in memory. `backend` is a schema argument: which code computes
an operator is decided on real tensors, inside the implementation, and tracing never sees it.

`cross_scan` and `cross_merge` are each other's gradients (they are adjoint).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .paths import ScanPaths, path_length

_LIB = torch.library.Library("visionssm", "DEF")
_SCAN_ARGUMENTS = (
    "Tensor x, Tensor x_dbl, Tensor A, Tensor? D, Tensor? dt_weight, Tensor? dt_bias, "
    "str[] paths, bool dt_softplus, bool merge, {extra}str backend"
)
_LIB.define(
    f"cross_selective_scan({_SCAN_ARGUMENTS.format(extra='bool return_last_state, ')})"
    " -> (Tensor y, Tensor last_state, Tensor states)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIB.define(
    f"cross_selective_scan_backward(Tensor dy, Tensor states, {_SCAN_ARGUMENTS.format(extra='')})"
    " -> (Tensor dx, Tensor dx_dbl, Tensor dA, Tensor dD, Tensor ddt_weight, Tensor ddt_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)
_SEQUENCE_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus"
)
_LIB.define(
    f"selective_scan({_SEQUENCE_ARGUMENTS}, bool return_last_state, bool keep_states=True)"
    " -> (Tensor y, Tensor last_state, Tensor states)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIB.define(
    f"selective_scan_backward(Tensor dy, Tensor states, {_SEQUENCE_ARGUMENTS}) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, "
    "Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)
_PATH_ARGUMENTS = "str[] paths, SymInt height, SymInt width, SymInt? token_at"
_LIB.define(f"cross_scan(Tensor x, {_PATH_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIB.define(f"cross_merge(Tensor ys, {_PATH_ARGUMENTS}, bool merge) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _backend(name: str) -> ModuleType:
    """The module that computes for backend `name`; imported on first use, so that importing visionssm loads no kernel."""
    return importlib.import_module({"chunked": ".chunked", "triton": ".kernels"}[name], __package__)


def _no_autocast(x: Tensor) -> torch.autocast:
    """A backend chooses its own precision: autocast would run its float32 products in 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


# --- the scan ---------------------------------------------------------------------------------------------------------


def _scan(
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    paths: list[str],
    dt_softplus: bool,
    merge: bool,
    return_last_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `cross_selective_scan_packed` in api.py; x is (batch, 1 or K, H, W, C) here.

    Returns y (batch, H, W, C) or (batch, K, H, W, C), last_state (batch, K, C, N) or empty, and `states`, whatever the backend
    keeps for its backward (at most the states at chunk boundaries). Both are float32, or on chunked float64 if any input is.
    """
    with _no_autocast(x):
        return _backend(backend).forward(x, x_dbl, A, D, dt_weight, dt_bias, tuple(paths), dt_softplus, merge, return_last_state)


def _scan_fake(
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    paths: list[str],
    dt_softplus: bool,
    merge: bool,
    return_last_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, height, width, channels = x.shape
    k, _, state = A.shape
    tensors = (x, x_dbl, A, D, dt_weight, dt_bias)
    wide = backend == "chunked" and any(t is not None and t.dtype == torch.float64 for t in tensors)
    kept = torch.float64 if wide else torch.float32
    y = x.new_empty((batch, height, width, channels) if merge else (batch, k, height, width, channels))
    last_state = x.new_empty((batch, k, channels, state) if return_last_state else (0,), dtype=kept)
    states = x.new_empty(_backend(backend).states_shape(batch, k, _length(paths, height, width, None), channels, state), dtype=kept)
    return y, last_state, states


def _scan_backward(
    dy: Tensor,
    states: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    paths: list[str],
    dt_softplus: bool,
    merge: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, x_dbl, A, D, dt_weight, dt_bias in their dtypes; a zero-size tensor for an input that is None."""
    with _no_autocast(x):
        return _backend(backend).backward(dy, states, x, x_dbl, A, D, dt_weight, dt_bias, tuple(paths), dt_softplus, merge)


def _scan_backward_fake(
    dy: Tensor,
    states: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    paths: list[str],
    dt_softplus: bool,
    merge: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, x_dbl, A, D, dt_weight, dt_bias))


def _scan_setup_context(ctx: object, inputs: tuple, output: tuple) -> None:
    tensors, ctx.options = inputs[:6], (*inputs[6:9], inputs[10])
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _scan_autograd(ctx: object, dy: Tensor | None, *_: None) -> tuple:
    *tensors, states = ctx.saved_tensors
    if dy is None:
        return (None,) * 11
    grads = torch.ops.visionssm.cross_selective_scan_backward(dy, states, *tensors, *ctx.options)
    kept = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:6], strict=True))
    return (*kept, *(None,) * 5)


def _no_double_backward(functions: str) -> Callable[..., None]:
    """The gradient of a backward operator, which `functions` of api.py lead to: an error."""

    def refuse(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(
            f"visionssm: no second derivative of {functions} on this backend; pass backend='reference' for double backward"
        )

    return refuse


torch.library.impl("visionssm::cross_selective_scan", "CompositeExplicitAutograd", lib=_LIB)(_scan)
torch.library.impl("visionssm::cross_selective_scan_backward", "CompositeExplicitAutograd", lib=_LIB)(_scan_backward)
torch.library.register_fake("visionssm::cross_selective_scan", _scan_fake, lib=_LIB)
torch.library.register_fake("visionssm::cross_selective_scan_backward", _scan_backward_fake, lib=_LIB)
torch.library.register_autograd("visionssm::cross_selective_scan", _scan_autograd, setup_context=_scan_setup_context, lib=_LIB)
_refuse = _no_double_backward("selective_scan, cross_selective_scan and cross_selective_scan_packed")
torch.library.register_autograd("visionssm::cross_selective_scan_backward", _refuse, lib=_LIB)


# --- the scan in mamba's layout, on Triton alone: there the packed operator's copies would cost more than the scan ---------------


def _sequence(
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
    keep_states: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `selective_scan` in api.py; B and C are (batch, groups, state, length) here. y is a view of a channels-last map.

    `states` is what the backward needs; without `keep_states` it is empty and there is no backward.
    """
    options = delta_softplus, return_last_state, keep_states
    with _no_autocast(u):
        return _backend("triton").sequence_forward(u, delta, A, B, C, D, z, delta_bias, *options)


def _sequence_fake(
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
    keep_states: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, length = u.shape
    groups, state = B.shape[1], A.shape[1]
    last_state = u.new_empty((batch, dim, state) if return_last_state else (0,), dtype=torch.float32)
    states = _backend("triton").states_shape(batch, groups, length, dim // groups, state) if keep_states else (0,)
    return u.new_empty(batch, length, dim).mT, last_state, u.new_empty(states, dtype=torch.float32)


def _sequence_backward(
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
    with _no_autocast(u):
        return _backend("triton").sequence_backward(dy, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _sequence_backward_fake(
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
    batch, dim, length = u.shape
    du, ddelta, dz = (u.new_empty(0) if t is None else t.new_empty(batch, length, dim).mT for t in (u, delta, z))
    dA, dB, dC, dD, dbias = (u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (A, B, C, D, delta_bias))
    return du, ddelta, dA, dB, dC, dD, dz, dbias


def _sequence_setup_context(ctx: object, inputs: tuple, output: tuple) -> None:
    ctx.softplus, ctx.kept = inputs[8], inputs[10]
    ctx.save_for_backward(*inputs[:8], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _sequence_autograd(ctx: object, dy: Tensor | None, *_: None) -> tuple:
    *tensors, states = ctx.saved_tensors
    if dy is None:
        return (None,) * 11
    if not ctx.kept:
        raise RuntimeError("visionssm: no gradient of a selective_scan that ran, or was traced, with gradients turned off")
    grads = torch.ops.visionssm.selective_scan_backward(dy, states, *tensors, ctx.softplus)
    return (*(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:8], strict=True)), None, None, None)


for _name, _impl, _fake, _autograd, _setup in (
    ("selective_scan", _sequence, _sequence_fake, _sequence_autograd, _sequence_setup_context),
    ("selective_scan_backward", _sequence_backward, _sequence_backward_fake, _no_double_backward("selective_scan"), None),
):
    torch.library.impl(f"visionssm::{_name}", "CompositeExplicitAutograd", lib=_LIB)(_impl)
    torch.library.register_fake(f"visionssm::{_name}", _fake, lib=_LIB)
    torch.library.register_autograd(f"visionssm::{_name}", _autograd, setup_context=_setup, lib=_LIB)


# --- moving between image order and path order -------------------------------------------------------------------------


def _length(paths: list[str], height: int, width: int, token_at: int | None) -> int:
    """L' from arithmetic alone, so that it also works on symbolic sizes."""
    return functools.reduce(torch.sym_max, (path_length(name, height, width) for name in paths)) + int(token_at is not None)


@functools.cache  # a CUDA graph goes on reading the pinned memory, so nothing is ever evicted
def _order(
    paths: tuple[str, ...], height: int, width: int, token_at: int | None, shared: bool, pinned: bool
) -> tuple[Tensor, Tensor | None]:
    """Where in `(1 or K) x positions` each of `K x L'` steps reads, and which steps are padding, or None if none is."""
    scan_paths = ScanPaths(paths, (height, width), token_at)
    table = torch.tensor(scan_paths.table)
    index = table.clamp(min=0)
    if not shared:
        index = index + torch.arange(len(paths))[:, None] * scan_paths.inverse.shape[1]
    padding = table < 0
    return _pinned(index.flatten(), pinned), _pinned(padding, pinned) if padding.any() else None


@functools.cache
def _inverse_order(paths: tuple[str, ...], height: int, width: int, token_at: int | None, pinned: bool) -> Tensor:
    """Where in `K x L'` steps each of `K x positions` lies."""
    scan_paths = ScanPaths(paths, (height, width), token_at)
    inverse = torch.tensor(scan_paths.inverse) + torch.arange(len(paths))[:, None] * scan_paths.table.shape[1]
    return _pinned(inverse.flatten(), pinned)


def _pinned(t: Tensor, pinned: bool) -> Tensor:
    """Pinned memory goes to a GPU without waiting for it, also while a CUDA graph is recorded."""
    return t.pin_memory() if pinned else t


def _cross_scan(x: Tensor, paths: list[str], height: int, width: int, token_at: int | None) -> Tensor:
    """(batch, 1 or K, positions, C) -> (batch, K, L', C), zeros at padded steps."""
    index, padding = _order(tuple(paths), height, width, token_at, x.shape[1] == 1, x.is_cuda)
    steps = x.flatten(1, 2).index_select(1, index.to(x.device, non_blocking=True)).unflatten(1, (len(paths), -1))
    return steps if padding is None else steps.masked_fill_(padding.to(x.device, non_blocking=True)[..., None], 0.0)


def _cross_scan_fake(x: Tensor, paths: list[str], height: int, width: int, token_at: int | None) -> Tensor:
    return x.new_empty(x.shape[0], len(paths), _length(paths, height, width, token_at), x.shape[-1])


def _cross_merge(ys: Tensor, paths: list[str], height: int, width: int, token_at: int | None, merge: bool) -> Tensor:
    """(batch, K, L', C) -> (batch, 1, positions, C), or (batch, K, positions, C) unmerged."""
    index = _inverse_order(tuple(paths), height, width, token_at, ys.is_cuda)
    maps = ys.flatten(1, 2).index_select(1, index.to(ys.device, non_blocking=True)).unflatten(1, (len(paths), -1))
    return maps.sum(1, keepdim=True) if merge else maps  # the sum of 16-bit maps accumulates in float32


def _cross_merge_fake(ys: Tensor, paths: list[str], height: int, width: int, token_at: int | None, merge: bool) -> Tensor:
    positions = height * width + int(token_at is not None)
    return ys.new_empty(ys.shape[0], 1 if merge else len(paths), positions, ys.shape[-1])


def _cross_scan_setup_context(ctx: object, inputs: tuple, output: Tensor) -> None:
    ctx.paths, ctx.shared = inputs[1:], inputs[0].shape[1] == 1


def _cross_scan_autograd(ctx: object, dsteps: Tensor) -> tuple:
    return torch.ops.visionssm.cross_merge(dsteps, *ctx.paths, ctx.shared), None, None, None, None


def _cross_merge_setup_context(ctx: object, inputs: tuple, output: Tensor) -> None:
    ctx.paths = inputs[1:5]


def _cross_merge_autograd(ctx: object, dmaps: Tensor) -> tuple:
    return torch.ops.visionssm.cross_scan(dmaps, *ctx.paths), None, None, None, None, None


for _name, _impl, _fake, _autograd, _setup in (
    ("cross_scan", _cross_scan, _cross_scan_fake, _cross_scan_autograd, _cross_scan_setup_context),
    ("cross_merge", _cross_merge, _cross_merge_fake, _cross_merge_autograd, _cross_merge_setup_context),
):
    torch.library.impl(f"visionssm::{_name}", "CompositeExplicitAutograd", lib=_LIB)(_impl)
    torch.library.register_fake(f"visionssm::{_name}", _fake, lib=_LIB)
    torch.library.register_autograd(f"visionssm::{_name}", _autograd, setup_context=_setup, lib=_LIB)
