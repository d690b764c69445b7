"""Maps drawn over images; needs matplotlib."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionssm.errors import UserError

from .evaluation import scaled, to_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = "inferno"


def overlay(image: Image.Image, heat: Tensor, strength: float = 0.6) -> Image.Image:
    """Blend a map, scaled to its own range, over an image.

    Args:
        image: any Pillow image; it is shown as RGB.
        heat: `(h, w)` on any grid that spans the image.
        strength: share of the map's colours, 0..1.

    Returns:
        An RGB image of the same size.

    Raises:
        UserError: matplotlib is missing, a map of another rank or with values that are not finite.
    """
    try:
        from matplotlib import colormaps
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install 'visionssm[explain]'") from None
    if heat.dim() != 2 or not heat.isfinite().all():
        raise UserError(f"heat: expected a finite map (h, w), got {tuple(heat.shape)}")
    values = scaled(to_size(heat.detach().float().cpu()[None], (image.height, image.width)))[0]
    colours = colormaps[_COLOURS](values.numpy(), bytes=True)[..., :3]
    return Image.blend(image.convert("RGB"), Image.fromarray(np.ascontiguousarray(colours)), strength)


def show(image: Image.Image, heat: Tensor, axes: "Axes | None" = None, title: str = "") -> "Axes":
    """Draw `overlay` into axes, new ones by default, and return them.

    Raises:
        UserError: as `overlay`.
    """
    blended = overlay(image, heat)
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(layout="constrained").subplots()
    axes.imshow(blended)
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set(xticks=[], yticks=[])
    return axes


def unnormalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Image.Image:
    """The image behind what a model gets: `(channels, H, W)` normalised by `mean` and `std`, one or three channels."""
    mean, std = (torch.tensor(m, dtype=torch.float32).view(-1, 1, 1) for m in (mean, std))
    bytes_ = ((pixels.detach().float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).squeeze(-1).numpy()).convert("RGB")
