"""Argument checks of the public operators: every message names the argument, what was got and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .paths import ScanPaths, check_names

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(required: dict[str, object], optional: dict[str, object] | None = None) -> None:
    """Each is a real floating-point tensor (an optional one may be None), on one device; float64 does not mix with 16 bits.

    In a mix of float64 and 16 bits the result would silently lack the precision that the caller asked for.
    """
    first_name, first = next(iter(required.items()))
    present = {name: tensor for name, tensor in (optional or {}).items() if tensor is not None}
    for name, tensor in (required | present).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a float16, bfloat16, float32 or float64 tensor, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: is on {tensor.device}, expected {first.device}, where {first_name} is")
    dtypes = {name: tensor.dtype for name, tensor in (required | present).items()}
    if torch.float64 in dtypes.values():
        for name, dtype in dtypes.items():
            if dtype in (torch.float16, torch.bfloat16):
                wide = next(other for other, d in dtypes.items() if d == torch.float64)
                raise TypeError(f"{name}: is {dtype} beside float64 {wide}; expected both in one dtype, or one of them in float32")


def check_shape(name: str, tensor: Tensor | None, expected: tuple[tuple[str, int], ...]) -> None:
    """`tensor` has exactly the `expected` shape, given as (axis name, size) pairs."""
    if tensor is None:
        return
    sizes = tuple([size for _, size in expected])
    if tensor.shape != sizes:
        axes = ", ".join(axis for axis, _ in expected)
        raise ValueError(f"{name}: expected ({axes}) = {_text(sizes)}, got shape {_text(tuple(tensor.shape))}")


def check_rank(name: str, tensor: Tensor, layouts: dict[int, str]) -> None:
    """The rank of `tensor` is one of `layouts`, a table from rank to the layout's description."""
    if tensor.dim() not in layouts:
        raise ValueError(f"{name}: expected {' or '.join(layouts.values())}, got shape {_text(tuple(tensor.shape))}")


def check_positive(name: str, tensor: Tensor) -> None:
    """No axis of `tensor` is empty."""
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected every size to be at least 1, got shape {_text(tuple(tensor.shape))}")


def path_names(paths: object, size: tuple[int, int] | None = None) -> tuple[str, ...]:
    """The names in `paths`, a tuple of names or a ScanPaths whose map must then be of `size`."""
    if not isinstance(paths, ScanPaths):
        return check_names(paths)
    if size is not None and paths.size != size:
        raise ValueError(f"paths: made for a map of {_text(paths.size)}, got a map of {_text(size)}")
    return paths.names


def check_axis(name: str, axis: str, got: int, expected: int, source: str) -> None:
    """One axis agrees with what `source` says."""
    if got != expected:
        raise ValueError(f"{name}: axis {axis} is {got}, expected {expected} ({source})")


def check_bool(**flags: bool) -> None:
    """Each flag is a bool: a string such as "image" passed by position is caught here."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")


def _text(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
