"""JPEG files decoded on the device, for where a machine's cores cannot decode as many images a second as its GPUs train on.

A loader's workers read the files and draw crop and mirror image; a batch is decoded, cropped and resized where the model is.
"""

import functools
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import Compose, InterpolationMode, RandomHorizontalFlip, RandomVerticalFlip

from visionssm.errors import UserError

_END_OF_IMAGE = b"\xff\xd9"  # a file without it may be truncated, which not every decoder reports
_FLIPPED_AXES = {RandomHorizontalFlip: 3, RandomVerticalFlip: 2}  # of (batch, C, H, W)
_MODES = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}


class EncodedImage(NamedTuple):
    """A JPEG file, and what is to become of it.

    Args:
        data: the file's bytes.
        name: what to call it where it cannot be decoded.
        box: of the crop: top, left, height, width, in pixels.
        size: height and width after resizing.
        mode: "bilinear" or "bicubic"; antialiased either way.
        flips: the axes of `(batch, C, H, W)` along which it is mirrored.
    """

    data: bytes
    name: str
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    mode: str
    flips: tuple[int, ...]


class DrawnView:
    """Draws what timm's training transform would do to an image, in the same order of draws, without doing it.

    Args:
        transform: timm's: a random crop, mirror images, nothing else.

    Raises:
        UserError: it does more than a device does.
    """

    def __init__(self, transform: Compose) -> None:
        crop, *flips, _ = transform.transforms  # the last makes a tensor
        if not isinstance(crop, RandomResizedCropAndInterpolation):
            raise UserError(f'dataset.decode: "device" expects timm\'s random resized crop in transform, got {type(crop).__name__}')
        if others := [type(t).__name__ for t in flips if type(t) not in _FLIPPED_AXES]:
            raise UserError(
                f'dataset.decode: "device" leaves a worker no image for {", ".join(others)}: set transform.auto_augment=None and '
                "transform.color_jitter=None; model.batch_augmentation distorts and recolours on the device"
            )
        modes = crop.interpolation if isinstance(crop.interpolation, tuple) else (crop.interpolation,)
        if any(mode not in _MODES for mode in modes):
            raise UserError(
                f'transform.interpolation: expected bilinear, bicubic or random with decode="device", got {modes[0].value}'
            )
        self.crop, self.flips, self.modes = crop, flips, modes

    def __call__(self, file: BinaryIO, name: str) -> EncodedImage | Image.Image:
        """The file with its view drawn; decoded already if it is no whole JPEG in YCbCr, which is left to Pillow."""
        data = file.read()
        image = Image.open(io.BytesIO(data))  # reads the header alone
        # Adobe's transform 0 is RGB without a conversion, which decoders take for YCbCr
        plain = image.format == "JPEG" and image.mode == "RGB" and image.info.get("adobe_transform") != 0
        # nvJPEG decodes a file without quantization tables, to noise
        if not (plain and image.quantization and data.endswith(_END_OF_IMAGE)):
            return image.convert("RGB")
        box = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        mode = self.modes[0] if len(self.modes) == 1 else random.choice(self.modes)
        flips = tuple(_FLIPPED_AXES[type(flip)] for flip in self.flips if torch.rand(1) < flip.p)
        return EncodedImage(data, name, box, tuple(self.crop.size), _MODES[mode], flips)


@dataclass
class EncodedImages:
    """The files of a batch, in one tensor, so that they reach the main process in one piece of shared memory.

    Args:
        data: uint8 `(bytes,)`, one file after another.
        lengths: bytes of each.
        views: the images without their data.
    """

    data: Tensor
    lengths: list[int]
    views: list[EncodedImage]

    @classmethod
    def gathered(cls, images: Sequence[EncodedImage]) -> "EncodedImages":
        """Of the files of a batch."""
        data = torch.frombuffer(bytearray().join(image.data for image in images), dtype=torch.uint8)
        return cls(data, [len(image.data) for image in images], [image._replace(data=b"") for image in images])

    def decoded(self, device: torch.device) -> list[Tensor | None]:
        """Every image, uint8 `(1, C, H, W)` of its final size, or None where it cannot be decoded."""
        images = _decoded(list(self.data.split(self.lengths)), device)
        return [None if image is None else _viewed(image, view) for image, view in zip(images, self.views, strict=True)]


def decode_batch(batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The images `(batch, C, H, W)` uint8 on the device and the labels `(batch,)` of a batch that holds encoded ones.

    One that cannot be decoded is replaced by the next one of the batch that can, and its name added to the batch's `unreadable`.

    Args:
        batch: from `collate`: `encoded`, perhaps `images` that a worker has decoded, `labels` of the former, then of the latter.
        device: where to decode.

    Raises:
        UserError: nothing in the batch can be decoded.
    """
    views = batch["encoded"].views
    with _stream_of_its_own(device):
        images = batch["encoded"].decoded(device)
        if "images" in batch:
            images += batch["images"].to(device, non_blocking=True).split(1)
        batch["unreadable"].extend(view.name for view, image in zip(views, images, strict=False) if image is None)
        readable = [index for index, image in enumerate(images) if image is not None]
        if not readable:
            raise UserError(f"data_root: none of the {len(views)} images in a batch can be decoded, e.g. {views[0].name}")
        chosen = [next((r for r in readable if r >= index), readable[0]) for index in range(len(images))]
        whole = torch.cat([images[index] for index in chosen])
    if whole.is_cuda:
        whole.record_stream(torch.cuda.current_stream(device))
    return whole, batch["labels"][chosen]


@contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """Keeps the memory that nvJPEG writes to, on a stream that torch does not know, apart from what a queued step still reads."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.synchronize()  # its memory is reused, so the last batch must be through: the step before this one has waited for it
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _decoded(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """All at once; each alone if that fails, since the decoder does not say which it failed at."""
    try:
        return decode_jpeg(files, ImageReadMode.RGB, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [None] if len(files) == 1 else [image for file in files for image in _decoded([file], device)]


def _viewed(image: Tensor, view: EncodedImage) -> Tensor:
    """A decoded image `(C, h, w)`, cropped, resized and mirrored: uint8 `(1, C, H, W)`."""
    top, left, height, width = view.box
    part = image[None, :, top : top + height, left : left + width].float()
    resized = F.interpolate(part, view.size, mode=view.mode, antialias=True).round_().clamp_(0, 255).to(torch.uint8)
    return resized.flip(view.flips) if view.flips else resized
