"""From pixels to a channels-last map, and from one stage's map to the next. Maps are (batch, H, W, C)."""

from typing import Any

import torch.nn as nn
from timm.layers import register_notrace_function
from torch import Tensor


@register_notrace_function
def check_image(x: Tensor, in_chans: int, patch_size: int) -> Tensor:
    """Return `x`, an image batch `(batch, in_chans, H, W)`, if a patch fits into it.

    Raises:
        ValueError: another rank, another number of channels, or an image smaller than the patch.
    """
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"image: expected (batch, {in_chans}, H, W), got shape {tuple(x.shape)}")
    if min(x.shape[-2:]) < patch_size:
        raise ValueError(f"image: {x.shape[-2]} x {x.shape[-1]} pixels is smaller than one {patch_size} x {patch_size} patch")
    return x


class ConvStem(nn.Module):
    """Overlapping patch embedding: two 3x3 convolutions, each followed by LayerNorm (VMamba, arXiv 2401.10166, section 4.3).

    `(batch, in_chans, H, W)` -> `(batch, ceil(H / patch_size), ceil(W / patch_size), embed_dim)`.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the map.
        patch_size: total stride, 2 or 4.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int = 4, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if patch_size not in (2, 4):
            raise ValueError(f"patch_size: expected 2 or 4 for a stem of two convolutions, got {patch_size}")
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.LayerNorm(embed_dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=patch_size // 2, padding=1, **dd)
        self.norm2 = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = check_image(x, self.in_chans, 1)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels-last in memory, so that no later step permutes
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchStem(nn.Module):
    """Non-overlapping patch embedding: one strided convolution, then LayerNorm (VMamba's first generation, LocalVMamba).

    `(batch, in_chans, H, W)` -> `(batch, H // patch_size, W // patch_size, embed_dim)`.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the map.
        patch_size: side of a patch, pixels.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int = 4, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = check_image(x, self.in_chans, self.patch_size)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2, then LayerNorm: `(batch, H, W, dim)` -> `(batch, ceil(H / 2), ceil(W / 2), out_dim)`."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
