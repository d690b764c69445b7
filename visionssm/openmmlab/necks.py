"""Necks for plain backbones, whose maps all have one stride."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from visionssm.errors import UserError
from visionssm.registry import MODELS

MODELS.register_module(module=LayerNorm2d)  # over the channels, for `norm_cfg=dict(type="visionssm.LayerNorm2d")` of heads

SCALES = (4.0, 2.0, 1.0, 0.5)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """ViTDet's simple feature pyramid (arXiv 2203.16527): levels of other strides from the last map alone.

    The map is resampled to every scale, then a 1x1 and a 3x3 convolution bring it to `out_channels`, each with a channel LayerNorm.

    Args:
        in_channels: channels of the backbone's last map.
        out_channels: channels of every level.
        scales: side of a level over the map's: 4, 2, 1 or 0.5.
        num_outs: number of levels; those beyond `scales` halve the last one.

    Raises:
        UserError: another scale; several widths; in `forward` a map of other channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int = 256, scales: Sequence[float] = SCALES, num_outs: int = 5, init_cfg: Any = None
    ) -> None:
        super().__init__(init_cfg)
        _check_width(in_channels)
        if num_outs < len(scales):
            raise UserError(f"model.neck.num_outs: got {num_outs}, expected at least {len(scales)}, the number of scales")
        self.in_channels, self.num_outs = in_channels, num_outs
        self.levels = nn.ModuleList(self._level(scale, out_channels) for scale in scales)

    def _level(self, scale: float, out_channels: int) -> nn.Sequential:
        resample, width = _resample(scale, self.in_channels)
        return nn.Sequential(
            *resample,
            nn.Conv2d(width, out_channels, 1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of a backbone, of which the last `(batch, in_channels, H, W)` counts -> `num_outs` levels, finest first."""
        _check_channels(maps[-1:], [self.in_channels])
        outs = [level(maps[-1]) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


@MODELS.register_module()
class ResamplingNeck(BaseModule):
    """Four maps of one stride -> strides of a quarter, a half, one and two of it, as the published Vim segmentor does.

    Each by the resampling alone: transposed convolutions up, max pooling down, no further layers.

    Args:
        in_channels: channels of every map, in and out.
        norm_cfg: `type` of the norm between the two transposed convolutions of the finest level, "BN" or "SyncBN".

    Raises:
        UserError: another norm; several widths; in `forward` maps of another number or other channels.
    """

    def __init__(self, in_channels: int, norm_cfg: Mapping[str, Any] | None = None, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        _check_width(in_channels)
        norms = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}
        norm = (norm_cfg or {"type": "SyncBN"})["type"]
        if norm not in norms:
            raise UserError(f"model.neck.norm_cfg.type: got {norm!r}, expected {' or '.join(norms)}")
        self.in_channels = in_channels
        up = [nn.ConvTranspose2d(in_channels, in_channels, 2, stride=2) for _ in range(3)]
        self.levels = nn.ModuleList(
            [nn.Sequential(up[0], norms[norm](in_channels), nn.GELU(), up[1]), up[2], nn.Identity(), nn.MaxPool2d(2)]
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four maps `(batch, in_channels, H, W)` -> four of sides 4, 2, 1 and 1/2 times as long."""
        _check_channels(maps, [self.in_channels] * len(self.levels))
        return tuple(level(x) for level, x in zip(self.levels, maps, strict=True))


def _resample(scale: float, dim: int) -> tuple[list[nn.Module], int]:
    """Layers that change the sides of a map by `scale`, and the channels they give."""
    if scale == 4:
        middle = [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), LayerNorm2d(dim // 2), nn.GELU()]
        return [*middle, nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)], dim // 4
    if scale == 2:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)], dim // 2
    if scale == 1:
        return [], dim
    if scale == 0.5:
        return [nn.MaxPool2d(2)], dim
    raise UserError(f"model.neck.scales: got {scale}, expected some of {', '.join(map(str, SCALES))}")


def _check_width(in_channels: int) -> None:
    if type(in_channels) is not int or in_channels < 4:  # a quarter of them is left at the finest level
        raise UserError(f"model.neck.in_channels: got {in_channels}, expected one number, the width of a plain backbone")


def _check_channels(maps: Sequence[Tensor], expected: Sequence[int]) -> None:
    got = [x.shape[1] for x in maps]
    if got != list(expected):
        raise UserError(f"model.neck.in_channels: the backbone's maps have {got} channels, the neck was made for {list(expected)}")
