"""Tables of one row per token: a class token in the middle of the sequence, and positions at another grid size."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor


def insert_token(patches: Tensor, token: Tensor) -> Tensor:
    """Patches `(batch, L, dim)` and a class token `(batch, 1, dim)` -> `(batch, L + 1, dim)`, the token at index L // 2."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], token, patches[:, middle:]], dim=1)


def take_token(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `insert_token`: `(batch, L + 1, dim)` -> the patches `(batch, L, dim)` and the token `(batch, 1, dim)`."""
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1), tokens[:, middle : middle + 1]


@register_notrace_function
def resample_tokens(table: Tensor, new_size: tuple[int, int], old_size: tuple[int, int], class_token: bool = False) -> Tensor:
    """Resize a table from one grid to another, bicubic without antialiasing.

    Args:
        table: `(1, h * w, dim)` in raster order, or `(1, h * w + 1, dim)` with a class token's row in the middle.
        new_size: (H, W) of the new grid.
        old_size: (h, w).
        class_token: whether there is such a row; it is set aside and returns to the new middle.

    Returns:
        `(1, H * W, dim)` or `(1, H * W + 1, dim)`; `table` itself if the grid stays.
    """
    if tuple(new_size) == tuple(old_size):
        return table
    if class_token:
        patches, token = take_token(table)
        return insert_token(resample_tokens(patches, new_size, old_size), token)
    grid = table.to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, tuple(old_size)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new_size), mode="bicubic", align_corners=False)
    return grid.flatten(2).mT.to(table.dtype)
