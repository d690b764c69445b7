"""Deterministic weights and images, regenerated from key names alone, so that golden files store neither.

The reference outputs were produced with exactly these numbers. The rule keeps activations in a sane range: norm scales near 1,
decay rates and steps like those of a fresh state-space model.
"""

import zlib

import numpy as np


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the checkpoint tensor `name`, float32 (int64 for num_batches_tracked)."""
    shape = tuple(shape)
    leaf = name.rsplit(".", 1)[-1]
    noise = _noise(name, shape)
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    if leaf == "running_var":
        value = 1.0 + 0.1 * np.abs(noise)
    elif leaf == "running_mean":
        value = 0.05 * noise
    elif leaf.startswith("A_") and "log" in leaf:  # A_log, A_b_log, A_logs: log(1..N) along the state axis
        value = np.log(np.arange(1, shape[-1] + 1, dtype=np.float64)) + 0.1 * noise
    elif leaf in ("D", "Ds", "D_b") or (leaf.startswith("D") and len(shape) == 1):
        value = 1.0 + 0.1 * noise
    elif _is_step_bias(name):
        value = -4.0 + 0.5 * noise  # softplus gives steps near 0.02
    elif leaf in ("x_proj_weight", "dt_projs_weight"):  # one (out, in) matrix per scan direction, stacked
        value = noise / np.sqrt(shape[-1])
    elif leaf in ("freqs_cos", "freqs_sin"):  # rotary tables keep their true values
        value = _rotary(shape)[leaf == "freqs_sin"]
    elif len(shape) <= 1:  # norm scales and biases
        value = 1.0 + 0.1 * noise if leaf == "weight" else 0.05 * noise
    else:
        value = noise / np.sqrt(max(np.prod(shape[1:]), 1))
    return np.asarray(value, dtype=np.float32)


def image(batch: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """A smooth image batch in roughly [-2, 2], float32, (batch, channels, height, width)."""
    y = np.linspace(0.0, 1.0, height)[:, None]
    x = np.linspace(0.0, 1.0, width)[None, :]
    phases = [1.7 * b + 0.9 * c for b in range(batch) for c in range(channels)]
    planes = [np.sin(9 * x + phase) + np.cos(7 * y - phase) + np.sin(23 * x * y + 2 * phase) for phase in phases]
    smooth = np.stack(planes).reshape(batch, channels, height, width)
    return ((smooth + 0.1 * _noise(f"image{batch}x{channels}x{height}x{width}", smooth.shape)) / 1.5).astype(np.float32)


def _noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)


def _is_step_bias(name: str) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return leaf == "dt_projs_bias" or name.endswith(("dt_proj.bias", "dt_proj_b.bias")) or (leaf == "bias" and ".dt_proj_" in name)


def _rotary(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Axial rotary cos and sin tables, (side * side, dim): row angles fill the first half, column angles the second."""
    side, half = round(shape[0] ** 0.5), shape[1] // 2
    angle = np.repeat(np.arange(side)[:, None] / 10000 ** (np.arange(0, half, 2) / half), 2, axis=1)  # (side, half)
    grid = (side, side, half)
    table = np.concatenate([np.broadcast_to(angle[:, None], grid), np.broadcast_to(angle[None], grid)], axis=-1)
    return np.cos(table).reshape(shape), np.sin(table).reshape(shape)
