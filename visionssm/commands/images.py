"""Opening image files of any kind as a person sees them."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from visionssm.errors import UserError, first_line

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_CHANNELS = {1: "L", 3: "RGB"}
# what Pillow raises for broken files
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_image(path: Path, channels: int = 3) -> Image.Image:
    """Decode an image: turned upright, transparency over white, 16 bits reduced to 8, the first frame of several.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: no such file, a folder, not an image, a broken or an unusual one.
    """
    if channels not in _CHANNELS:
        raise UserError(f"the model takes {channels} channels; an image has 1 or 3")
    try:
        if path.is_dir():
            raise UserError("a folder, expected an image file")
        # Pillow warns of oddities, large panoramas among them, in files that it reads all the same
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
            return _eight_bits_over_white(image).convert(_CHANNELS[channels])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or of a kind that Pillow cannot read") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def _eight_bits_over_white(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError("its pixels are 32-bit numbers of unknown range, expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
