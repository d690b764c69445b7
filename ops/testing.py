"""Inputs and error budgets for testing a scan backend, here and in other people's kernels.

Inputs look like those of a trained model: A = -(1..N) with noise, steps softplus(delta + bias) log-uniform in a range.
They depend on the seed and the arguments alone; those of a lower dtype are the float64 ones rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .paths import CROSS

Inputs = dict[str, Tensor | None]


def selective_scan_inputs(
    batch: int = 2,
    dim: int = 6,
    length: int = 13,
    state: int = 4,
    groups: int | None = None,
    *,
    D: bool = True,
    z: bool = True,
    delta_bias: bool = True,
    softplus: bool = True,
    step_range: tuple[float, float] = (1e-2, 1.0),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Tensor arguments of `selective_scan` by name, an optional one that is switched off as None.

    Args:
        batch, dim, length, state: sizes.
        groups: None gives B and C the layout `(batch, state, length)`, a number `(batch, groups, state, length)`.
        D, z, delta_bias: whether that optional tensor is there.
        softplus: False for a call without softplus: what makes up the step is then positive.
        step_range: bounds of the steps softplus(delta_bias), dimensionless.
        dtype: of u, delta, B, C and z; A, D and delta_bias stay float32 unless this is float64.
        device: of all.
        seed: of the generator; equal seeds give equal numbers in every dtype and on every device.
    """
    normal, steps = _generators(seed)
    matrix = (batch, state, length) if groups is None else (batch, groups, state, length)
    inputs = {
        "u": normal(batch, dim, length),
        "delta": 0.5 * normal(batch, dim, length),
        "A": _decay(normal(dim, state)),
        "B": normal(*matrix),
        "C": normal(*matrix),
        "D": 1.0 + 0.1 * normal(dim) if D else None,
        "z": normal(batch, dim, length) if z else None,
        "delta_bias": steps(step_range, dim) if delta_bias else None,
    }
    if not softplus:
        _make_positive(inputs, ("delta", "delta_bias"))
    return _cast(inputs, ("A", "D", "delta_bias"), dtype, device)


def cross_selective_scan_inputs(
    batch: int = 2,
    size: tuple[int, int] = (3, 5),
    channels: int = 4,
    state: int = 2,
    paths: tuple[str, ...] = CROSS,
    rank: int | None = 2,
    *,
    order: str = "image",
    shared: bool = True,
    D: bool = True,
    dt_bias: bool = True,
    softplus: bool = True,
    step_range: tuple[float, float] = (1e-2, 1.0),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Tensor arguments of `cross_selective_scan` by name, an optional one that is switched off as None.

    Args:
        batch, channels, state: sizes.
        size: `(H, W)`; with order="scan" a map of that many steps H * W.
        paths: K path names.
        rank: R of a low-rank dt with `dt_weight`, or None for a full dt.
        order: "image" or "scan", which decides the layout.
        shared: one map for all paths (order="image" only).
        D, dt_bias: whether that optional tensor is there.
        softplus: False for a call without softplus: what makes up the step is then positive.
        step_range, dtype, device, seed: as in `selective_scan_inputs`; dt_weight stays float32 with A, D and dt_bias.
    """
    normal, steps = _generators(seed)
    k, extent = len(paths), size if order == "image" else (size[0] * size[1],)
    inputs = {
        "x": normal(batch, *(() if shared and order == "image" else (k,)), *extent, channels),
        "dt": 0.5 * normal(batch, k, *extent, channels if rank is None else rank),
        "A": _decay(normal(k, channels, state)),
        "B": normal(batch, k, *extent, state),
        "C": normal(batch, k, *extent, state),
        "D": 1.0 + 0.1 * normal(k, channels) if D else None,
        "dt_weight": None if rank is None else normal(k, channels, rank) / math.sqrt(rank),
        "dt_bias": steps(step_range, k, channels) if dt_bias else None,
    }
    if not softplus:
        _make_positive(inputs, ("dt", "dt_weight", "dt_bias"))
    return _cast(inputs, ("A", "D", "dt_weight", "dt_bias"), dtype, device)


def pack(inputs: Inputs) -> Inputs:
    """Image-order inputs of `cross_selective_scan` as those of `cross_selective_scan_packed`."""
    x_dbl = torch.cat([inputs[name] for name in ("dt", "B", "C")], dim=-1).permute(0, 2, 3, 1, 4).contiguous()
    return {"x": inputs["x"], "x_dbl": x_dbl, **{name: t for name, t in inputs.items() if name not in ("x", "dt", "B", "C")}}


def to_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64: what a low-precision run is judged against."""
    return {name: None if t is None else t.double() for name, t in inputs.items()}


def outputs_and_gradients(op: Callable[..., Tensor], inputs: Inputs, seed: int = 0, **options: object) -> dict[str, Tensor]:
    """Run `op(**inputs, **options)` forward and backward.

    Returns:
        "y", the output, and "d<name>" for every tensor in `inputs`: the gradient of sum(y * w), with w standard normal from
        `seed` (rounded to the output's dtype, so that runs of two dtypes differ by rounding alone).
    """
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y = op(**leaves, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y.backward(weight.to(y.dtype).to(y.device))
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in leaves.items() if t is not None}


def error_budget(reference_low: Tensor, reference_64: Tensor) -> float:
    """The error a kernel may make: twice that of the reference run in the same dtype, plus one rounding band.

    Args:
        reference_low: the reference's result in the dtype under test.
        reference_64: its result in float64 on the same (already rounded) inputs.

    Returns:
        A bound on max |kernel - reference_64|; the band is one unit in the last place of the largest value.
    """
    own = (reference_low.double() - reference_64).abs().max().item()
    band = torch.finfo(reference_low.dtype).eps * reference_64.abs().max().item()
    return 2.0 * own + band


def assert_within_budget(actual: Tensor, reference_low: Tensor, reference_64: Tensor, name: str = "result") -> None:
    """`actual` has the reference's shape and dtype, is finite, and errs by no more than `error_budget`."""
    if actual.shape != reference_low.shape or actual.dtype != reference_low.dtype:
        raise AssertionError(
            f"{name}: {actual.dtype} {tuple(actual.shape)}, expected {reference_low.dtype} {tuple(reference_low.shape)}"
        )
    error = (actual.double() - reference_64).abs().max().item()
    budget = error_budget(reference_low, reference_64)
    if not error <= budget:  # also catches NaN
        raise AssertionError(f"{name}: error {error:.3e} against float64, budget {budget:.3e}")


def _generators(seed: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def steps(bounds: tuple[float, float], *shape: int) -> Tensor:
        low, high = (math.log(bound) for bound in bounds)
        step = torch.exp(low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64))
        return step + torch.log(-torch.expm1(-step))  # inverse softplus

    return normal, steps


def _decay(noise: Tensor) -> Tensor:
    """A = -(1..N) times log-normal noise."""
    return -torch.arange(1, noise.shape[-1] + 1) * torch.exp(0.1 * noise)


def _make_positive(inputs: Inputs, names: tuple[str, ...]) -> None:
    for name in names:
        if inputs[name] is not None:
            inputs[name] = inputs[name].abs()


def _cast(inputs: Inputs, parameters: tuple[str, ...], dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """Round to `dtype` (the parameters to float32 at least) and move."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: None if t is None else t.to(device, wide if name in parameters else dtype) for name, t in inputs.items()}
