"""What LocalVim and LocalVMamba share: attention over the scanned directions, and one set of path names per layer.

Source: LocalMamba (arXiv 2403.09338, section 3.3 and figure 3).
"""

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionssm.ops import ScanPaths


class BiAttn(nn.Module):
    """Channel attention on every direction's scan, then the sum over the directions.

    The paper's SCAttn has a spatial branch too; the published models were trained without it. All directions share the weights.

    `(batch, K, ..., dim)` -> `(batch, ..., dim)`, positions in `...`; a class token among them takes part in the mean.

    Args:
        dim: channels.
        reduction: `dim` over the hidden width.
    """

    def __init__(self, dim: int, reduction: int = 8, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.global_reduce = nn.Linear(dim, dim // reduction, **dd)
        self.channel_select = nn.Linear(dim // reduction, dim, **dd)

    def weights(self, y: Tensor) -> Tensor:
        """The factor of every direction and channel, `(batch, K, 1, dim)`, for scans `(batch, K, positions, dim)`."""
        scale = F.gelu(self.global_reduce(self.norm(y).mean(2)))
        return self.channel_select(scale).sigmoid().unsqueeze(2)

    def forward(self, y: Tensor) -> Tensor:
        flat = y.flatten(2, -2)  # [B, K, positions, C]
        return (flat * self.weights(flat).to(flat.dtype)).sum(1).reshape(y[:, 0].shape)


def check_layer_paths(paths: Sequence[Sequence[str]], depth: int) -> tuple[tuple[str, ...], ...]:
    """`paths` as one tuple of known path names per layer.

    Raises:
        ValueError: another number of layers than `depth`, an unknown name, or names that are not grouped by layer.
    """
    if isinstance(paths, str) or any(isinstance(names, str) for names in paths):
        raise ValueError(f"paths: expected one tuple of path names for each of {depth} layers, got {paths!r}")
    if len(paths) != depth:
        raise ValueError(f"paths: got path names for {len(paths)} layers, expected {depth}, one tuple per layer")
    return tuple(ScanPaths(tuple(names), (1, 1)).names for names in paths)
