"""Pictures <-> tensors."""

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.settings import InputError


def load_picture(path):
    """Returns: the picture at `path`, RGB, transparency on white; a PIL picture as it is.

    Raises: InputError if there is no picture.
    """
    if isinstance(path, Image.Image):
        return path
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise InputError(f"{path}: not a picture that Pillow can read") from None


def fit_picture(picture, size):
    """Returns: the middle square of a PIL picture, resized to size x size."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def pictures_to_tensor(pictures, scaled=True):
    """Returns: (B, 3, H, W) of PIL pictures: float in -1..1, or bytes as they are."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    return pixels / 127.5 - 1 if scaled else pixels


def tensor_to_pictures(tensor):
    """tensor: (B, 3, H, W) in -1..1. Returns: list of PIL pictures."""
    pixels = ((tensor.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).numpy()]
