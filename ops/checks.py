"""Argument checks of the public operators: every message names the argument, what was got and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .paths import ScanPaths, check_names


def check_floating(**tensors: Tensor | None) -> None:
    """Each tensor is real floating point and on the device of the first."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a real floating-point tensor, got {tensor.dtype}")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name}: is on {tensor.device}, expected {device}, where {first} is")


def check_shape(name: str, tensor: Tensor | None, expected: tuple[tuple[str, int], ...]) -> None:
    """`tensor` has exactly the `expected` shape, given as (axis name, size) pairs."""
    if tensor is None:
        return
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(got != size for got, (_, size) in zip(shape, expected, strict=True)):
        axes = ", ".join(axis for axis, _ in expected)
        sizes = ", ".join(str(size) for _, size in expected)
        raise ValueError(f"{name}: expected ({axes}) = ({sizes}), got shape {_text(shape)}")


def check_rank(name: str, tensor: Tensor, layouts: dict[int, str]) -> None:
    """The rank of `tensor` is one of `layouts`, a table from rank to the layout's description."""
    if tensor.dim() not in layouts:
        raise ValueError(f"{name}: expected {' or '.join(layouts.values())}, got shape {_text(tuple(tensor.shape))}")


def check_positive(name: str, tensor: Tensor) -> None:
    """No axis of `tensor` is empty."""
    if any(size == 0 for size in tensor.shape):
        raise ValueError(f"{name}: has an empty axis, shape {_text(tuple(tensor.shape))}; every size must be at least 1")


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


def check_same_dtype_family(**tensors: Tensor | None) -> None:
    """float64 does not mix with 16 bits: the result would silently lose what the caller asked for."""
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if torch.float64 in dtypes.values() and {torch.float16, torch.bfloat16} & set(dtypes.values()):
        raise TypeError(f"float64 and 16-bit tensors in one call: {', '.join(f'{n} {d}' for n, d in dtypes.items())}")


def _text(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
