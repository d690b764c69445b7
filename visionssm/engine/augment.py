"""Augmentation of whole batches on their device, for images so small that a processor's cores could not keep up."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionssm.errors import UserError

_GREY = (0.299, 0.587, 0.114)  # luma of red, green, blue (ITU-R BT.601)


class BatchAugmentation(nn.Module):
    """Shifts, mirrors, distorts, recolours and partly erases images, each with draws of its own.

    All draws come from the generator of the images' device: nothing waits for a GPU, and a batch costs a few kernels whatever
    its size.

    Args:
        shift: whole pixels by which an image moves at most along each axis; what comes in is a mirror of its border.
        hflip: probability of a mirror image.
        distort: share of the images that are also turned, zoomed and recoloured.
        rotation: largest angle, degrees.
        zoom: sides change by a factor between 1 - zoom and 1 + zoom.
        colour: brightness, contrast and saturation change by factors between 1 - colour and 1 + colour.
        erase: share of the images in which noise replaces a rectangle, each side up to half of the image's (arXiv:1708.04896).

    Raises:
        UserError: a value outside its range.
    """

    def __init__(
        self,
        shift: int = 0,
        hflip: float = 0.5,
        distort: float = 0.0,
        rotation: float = 15.0,
        zoom: float = 0.15,
        colour: float = 0.4,
        erase: float = 0.0,
    ) -> None:
        super().__init__()
        given = {"hflip": hflip, "distort": distort, "zoom": zoom, "colour": colour, "erase": erase}
        for name, value, most in [("shift", shift, math.inf), ("rotation", rotation, 180), *((*item, 1) for item in given.items())]:
            if not 0 <= value <= most:
                raise UserError(f"model.batch_augmentation.{name}: got {value}, expected 0 to {most}")
        self.shift = shift
        self.hflip = hflip
        self.distort = distort
        self.rotation = rotation
        self.zoom = zoom
        self.colour = colour
        self.erase = erase
        self.register_buffer("luma", torch.tensor(_GREY).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, C, H, W)` uint8 to float32 in [0, 255]; RGB if `distort` is not 0."""
        with torch.autocast(images.device.type, enabled=False):  # a grid in bfloat16 would be off by a pixel
            images = images.float()
            distorted = torch.rand(len(images), device=images.device) < self.distort
            images = self.moved(images, distorted)
            images = self.recoloured(images, distorted) if self.distort else images
            return self.erased(images) if self.erase else images

    def moved(self, images: Tensor, distorted: Tensor) -> Tensor:
        """One resampling for all that moves pixels; a shift and a mirror alone leave their values, but for rounding."""
        batch, _, height, width = images.shape
        device = images.device
        angle = _between(math.radians(self.rotation), batch, device) * distorted
        scale = 1 + _between(self.zoom, batch, device) * distorted
        mirror = 1 - 2 * (torch.rand(batch, device=device) < self.hflip).float()
        shifts = torch.randint(-self.shift, self.shift + 1, (2, batch), device=device)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        # in units of half a side, as affine_grid has them
        rows = (
            torch.stack([mirror * cos, -sin * height / width, 2 * shifts[0] / width], dim=1),
            torch.stack([mirror * sin * width / height, cos, 2 * shifts[1] / height], dim=1),
        )
        grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def recoloured(self, images: Tensor, distorted: Tensor) -> Tensor:
        """Brightness, then contrast about the image's mean grey, then saturation about each pixel's grey."""
        share = distorted.view(-1, 1, 1, 1)
        brightness, contrast, saturation = (
            1 + _between(self.colour, len(images), images.device).view(-1, 1, 1, 1) * share for _ in range(3)
        )
        images = images * brightness
        mean = (images * self.luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        images = torch.lerp(mean, images, contrast)
        grey = (images * self.luma).sum(1, keepdim=True)
        return torch.lerp(grey, images, saturation).clamp(0, 255)

    def erased(self, images: Tensor) -> Tensor:
        """Uniform noise in a rectangle that may reach over the image's border."""
        batch, device = len(images), images.device
        inside = torch.rand(batch, 1, 1, device=device) < self.erase
        for axis, size in ((2, images.shape[2]), (1, images.shape[3])):
            half = torch.rand(batch, 1, device=device) * size / 4
            centre = torch.rand(batch, 1, device=device) * size
            inside = inside & ((torch.arange(size, device=device) + 0.5 - centre).abs() < half).unsqueeze(axis)
        return torch.where(inside.unsqueeze(1), 255 * torch.rand_like(images), images)


def _between(bound: float, count: int, device: torch.device) -> Tensor:
    """`count` draws from [-bound, bound]."""
    return (2 * torch.rand(count, device=device) - 1) * bound
