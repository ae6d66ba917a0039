"""Pictures <-> tensors."""

import io
import os
import re
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError
from tqdm import tqdm

from ldm.files import reason
from ldm.settings import InputError

SAVE = "save it as a PNG of 8 or 16 bits"  # the remedy for files of unclear meaning
SCALED = ("PNG", "TIFF", "PPM", "JPEG2000", None)  # formats (None: in memory) that define white at over 8 bits
SAME_COLOURS = 3  # of 255: a colour profile that changes less is sRGB, rounded
ROUNDING = 1e-3  # of white: floats may be this far below black or above white
ENLARGED = 2.0  # times: pictures enlarged more than this are mentioned


def load_picture(path, profiled=True):
    """Read a picture as people see it: upright, in sRGB, transparency on white, scaled to 8 bits.

    path: of a file, or a PIL picture. profiled: whether its colour profile is applied; without one, sRGB is assumed.
    Returns: a PIL picture, RGB.
    Raises: InputError if there is no picture, or several, or if the brightness of its pixels is undefined.
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of many pixels or odd EXIF
        return _to_rgb(path, profiled) if isinstance(path, Image.Image) else _load(path, profiled)


def check_pictures(paths, problems=None):
    """Look at many files, in threads.

    problems: a dict that takes {path: the InputError of load_picture}; None: the first is raised.
    Returns: a list of (width, height), those of files with problems left out.
    """

    def look(path):
        try:
            return _load(path, profiled=False).size
        except InputError as error:
            return error

    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(8) as pool:  # filters are the process's
        seen = list(tqdm(pool.map(look, paths), "looking at pictures", len(paths), delay=1))
    errors = {path: own for path, own in zip(paths, seen) if isinstance(own, InputError)}
    if problems is not None:
        problems.update(errors)
    elif errors:
        raise next(iter(errors.values()))
    return [own for own in seen if not isinstance(own, InputError)]


def _load(path, profiled):
    """Returns: the picture in a file, as load_picture does. Raises: InputError that names it, for all errors."""
    what = "cannot be opened"
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would wait for ever
            raise InputError(f"a {'folder' if stat.S_ISDIR(mode) else 'pipe or a device'}, expected a picture")
        with open(path, "rb") as file, Image.open(file) as picture:  # of a name, Pillow 13.0 maps turned TIFFs wrongly
            what = "damaged or cut off"
            return _to_rgb(picture, profiled)
    except InputError as error:
        problem = error
    except (FileNotFoundError, NotADirectoryError):
        problem = "no such file, expected a picture"
    except PermissionError:
        problem = "no permission to read it"
    except Image.DecompressionBombError as error:
        found, limit = (int(number) / 1e6 for number in re.findall(r"\d+", str(error))[:2])
        problem = f"{found:.0f} million pixels, at most {limit:.0f} are read; scale it down"
    except UnidentifiedImageError:
        problem = f"not a picture that Pillow can read{_beginning(path)}; {SAVE}"
    except Exception as error:  # Pillow raises many kinds
        problem = f"{what} ({reason(error)}), expected a picture"
    raise InputError(f"{path}: {problem}")


def _beginning(path):
    """Returns: for a message, how a file begins if it is a text, such as a web page or a Git LFS pointer."""
    with open(path, "rb") as file:
        text = file.read(50).decode(errors="replace").partition("\n")[0]
    if not text:
        return ", for it is empty"
    return f', for it begins with "{text}"' if text.isprintable() and "\ufffd" not in text else ""


def _check_kind(picture):
    """Raises: InputError for a PIL picture of several pages, or with pixels of undefined brightness."""
    pages = getattr(picture, "n_frames", 1)
    if picture.format == "TIFF" and pages > 1:  # thumbnails and masks after the first page do not count
        first, *others = (page.tag_v2.get(254, 0) for page in ImageSequence.Iterator(picture))
        pages = pages if first or 0 in others else 1
        picture.seek(0)
    if pages > 1 and picture.format not in ("MPO", "PSD"):  # MPO: a photograph and its preview; PSD: layers
        raise InputError(f"{pages} pictures in one file, expected one; save the one that is meant as a PNG")
    deep = picture.mode == "F" or picture.mode.startswith("I;16")
    if (picture.mode == "I" and picture.format != "PPM") or (deep and picture.format not in SCALED):
        raise InputError(f"pixels of mode {picture.mode}, for which nothing says how bright white is; {SAVE}")


def _to_rgb(picture, profiled):
    """Returns: a PIL picture of any kind as load_picture returns it."""
    _check_kind(picture)
    profile, clear, tags = picture.info.get("icc_profile"), _clear(picture), getattr(picture, "tag_v2", {})
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        pixels = np.asarray(picture)
        levels = pixels / (1.0 if picture.mode == "F" else 2 ** tags.get(258, (16,))[0] - 1)
        if not (levels.min() >= -ROUNDING and levels.max() <= 1 + ROUNDING):
            found = f"from {levels.min():g} to {levels.max():g}"
            raise InputError(f"floats {found}, expected them from 0, black, to 1, white; scale them, or {SAVE}")
        levels = 1 - levels if tags.get(262) == 0 else levels  # TIFF's WhiteIsZero
        levels = levels if clear is None else np.where(pixels == clear, 1, levels)
        picture = Image.fromarray((255 * levels).round().clip(0, 255).astype(np.uint8))
    else:
        if clear is not None:
            picture.info["transparency"] = clear
        if picture.has_transparency_data:
            picture = picture.convert("LA") if picture.mode == "La" else picture
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = _to_srgb(picture, profile) if profile and profiled else picture.convert("RGB")
    picture.info.pop("icc_profile", None)  # which would be applied once more when this is loaded
    return picture


def _clear(picture):
    """Returns: the value of transparent pixels, or None; of a PNG, Pillow gives it in the file's own bit depth."""
    clear = picture.info.get("transparency")
    raw = picture.tile[0].args if clear is not None and picture.format == "PNG" and picture.tile else None
    if raw == "RGB;16B":
        return tuple(value >> 8 for value in clear)
    return clear * {"L;2": 85, "L;4": 17}[raw] if raw in ("L;2", "L;4") else clear


def _to_srgb(picture, profile):
    """profile: ICC, bytes; ignored if it is damaged or does not fit the picture's mode. Returns: PIL, RGB."""
    with suppress(ImageCms.PyCMSError, OSError):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip())
        if mode and (mode == "CMYK") == (picture.mode == "CMYK"):
            transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
            probe = Image.fromarray(np.stack(np.meshgrid(*[np.arange(0, 256, 51, np.uint8)] * 3), -1).reshape(36, 6, 3))
            probe = probe.convert(mode)
            change = np.asarray(probe.convert("RGB"), int) - np.asarray(ImageCms.applyTransform(probe, transform))
            if np.abs(change).max() > SAME_COLOURS:
                return ImageCms.applyTransform(picture.convert(mode), transform)
    return picture.convert("RGB")


def fit_picture(picture, size):
    """Returns: the middle square of a PIL picture, resized to size x size."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def describe_fit(sizes, image_size):
    """sizes: (width, height) of pictures. Returns: a line on what fit_picture does to them; "" for nothing."""
    others = sorted(set(sizes) - {(image_size, image_size)})
    if not others:
        return ""
    found = ", ".join(f"{width} x {height}" for width, height in others[:3]) + " and more" * (len(others) > 3)
    cut = "cut to their middle squares and " * any(width != height for width, height in others)
    times = image_size / min(map(min, others))
    few = f"; enlarged up to {times:.1f} times, they show less than the model expects" * (times >= ENLARGED)
    return f"pictures of {found} {cut}resized to {image_size} x {image_size}{few}"


def describe_shapes(first, second):
    """Returns: a line on how A and B of unlike (width, height) distort the change between them; "" for like ones."""
    shares = np.array([[side / min(size) for side in size] for size in (first, second)])
    shift = np.abs(shares[0] - shares[1]).max() / 2  # of the middle squares, in their widths
    if 2 * shift * min(*first, *second) <= 0.51:  # pixels: sizes were rounded
        return ""
    zoom = np.exp(np.abs(np.log(shares[:, 0] / shares[:, 1]) @ [1, -1]))
    (a, b), (c, d) = first, second
    return (
        f"A of {a} x {b} and B of {c} x {d} differ in shape: their middle squares, which are compared, may show other "
        f"parts, which moves shifts by up to {shift:.3f} widths and zoom by up to a factor {zoom:.3f}; cut them alike"
    )


def tell_fit(sizes, image_size):
    """Print what fit_picture does to pictures, and how different shapes of A and B distort what is read.

    sizes: for each target a list, the (width, height) of its picture, or of A and B.
    """
    unlike = [describe_shapes(*own) for own in sizes if len(own) == 2]
    lines = describe_fit([size for own in sizes for size in own], image_size), max(unlike, key=len, default="")
    print("".join(f"{line}\n" for line in lines if line), end="")


def pictures_to_tensor(pictures, scaled=True):
    """Returns: (B, 3, H, W) of B PIL pictures, float in -1..1 or, not scaled, bytes."""
    pixels = torch.from_numpy(rearrange([np.asarray(picture) for picture in pictures], "b h w c -> b c h w"))
    return pixels / 127.5 - 1 if scaled else pixels


def tensor_to_pictures(tensor):
    """tensor: (B, 3, H, W) in -1..1. Returns: list of PIL pictures."""
    pixels = ((tensor.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(array) for array in rearrange(pixels, "b c h w -> b h w c").numpy()]
