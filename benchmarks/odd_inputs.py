"""Odd inputs to invert.py: is any of them read wrong without a word?

    python benchmarks/odd_inputs.py                      # all, about 40 minutes on two cores
    python benchmarks/odd_inputs.py quick=true           # two of every sort
    python benchmarks/odd_inputs.py sorts=flat,stripes   # some

More than 500 inputs are drawn, with a fixed seed, from the photographs that no training has seen, from formulas, and
from the photographs that the shipped controls know. Each is read as invert.py reads it, and must end in one of three
ways: right, every number within three of its standard errors of the truth, and an interval of at least half the range
for numbers that the picture cannot show; flagged; or refused, in one line. What ends otherwise is wrong. Prints a table
of sorts and what was wrong; leaves out_dir/cases.json and the pictures. Exit code 1 if anything was wrong.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, nearest, override, run_script

settings = dict(
    sorts="all",
    quick=False,  # True: two inputs of every sort
    seed=5,
    out_dir="outputs/odd_inputs",
)
if __name__ == "__main__":
    answer(__file__)

import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

import invert
from cldm.changes import CHANGES, MOTIONS, NO_CHANGE, draw_change, expose_picture, inverse, similarity
from cldm.dataset import read_rows
from cldm.pairs import cut, draw_pair
from dataForTrain.make_dataset import HELD_OUT, TRAIN, VIEW, draw_view, find_photo, render_framed
from ldm.files import ROOT, report_folder, write_whole
from ldm.pictures import check_picture

SIZE = 128  # pixels
MODELS = {name: ROOT / "models" / name for name in ("control_tiny_pair", "control_tiny", "control_views")}
NUMBERS = {"control_tiny_pair": tuple(CHANGES), "control_tiny": ("angle",), "control_views": VIEW}
ERRORS = 3.0  # standard errors
ENDS = ("right", "flagged", "refused", "wrong")
LIMIT = 20  # seconds, for refusing a picture
RANGES = {name: bounds for name, (_, *bounds, _) in CHANGES.items()}
FILES = [find_photo(photo.file) for photo in HELD_OUT.values()]
ALL, STILL = tuple(CHANGES), (*MOTIONS, "blur")  # all numbers; those that brightness does not touch


@dataclass
class Case:
    name: str
    target: object  # a PIL picture, or a function that writes the file it is given
    reference: object = None  # likewise
    truth: dict | None = field(default_factory=dict)  # of the numbers that are judged; None: no control explains it
    unseen: tuple = ()  # numbers that the picture cannot show
    prompt: str = ""
    model: str = "control_tiny_pair"
    suffix: str = "png"
    row: dict = field(default_factory=dict)  # instead of what prompt.json would say
    arguments: tuple | None = None  # of invert.py, in place of a picture


# Pairs of photographs


def pair(rng, size=SIZE, **ranges):
    """Returns: reference, target, change; `ranges` replace those of CHANGES."""
    return draw_pair(rng, FILES, size, RANGES | ranges)


def judged(change, names):
    return None if names is None else {name: change[name] for name in names}


def altered(rng, alterations, **ranges):
    """alterations: {name: (what is done to reference and target, the numbers that are still true, or None)}."""
    for name, (alter, names) in alterations.items():
        for i in range(2):
            reference, target, change = pair(rng, **ranges)
            reference, target = alter(reference, target)
            yield Case(f"{name} {i}", target, reference, judged(change, names))


def both(alter):
    return lambda a, b: (alter(a), alter(b))


def only_b(alter):
    return lambda a, b: (a, alter(b))


def per_pixel(function):
    """function: of arrays from 0 to 1. Returns: the same for PIL pictures."""
    return lambda p: Image.fromarray((255 * function(np.asarray(p) / 255).clip(0, 1)).round().astype(np.uint8))


def contrast(share):
    return per_pixel(lambda x: 0.5 + share * (x - 0.5))


def stops(number):
    return lambda p: expose_picture(p, number)


def noise(rng, sigma):
    def add(picture):
        generator = np.random.default_rng(rng.getrandbits(32))
        return per_pixel(lambda x: x + generator.normal(0, sigma / 255, x.shape))(picture)

    return add


def speckle(rng, share, seed=None):
    """Set a share of the pixels to white or black."""

    def add(picture):
        generator, pixels = np.random.default_rng(rng.getrandbits(32) if seed is None else seed), np.array(picture)
        dead = generator.random(pixels.shape[:2]) < share
        pixels[dead] = np.where(generator.random(dead.sum()) < 0.5, 0, 255)[:, None]
        return Image.fromarray(pixels)

    return add


def jpeg(quality):
    def save(picture):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return save


def occlude(rng, share):
    def cover(picture):
        side = round(SIZE * share**0.5)
        x, y = (rng.randint(0, SIZE - side) for _ in range(2))
        picture = picture.copy()
        ImageDraw.Draw(picture).rectangle((x, y, x + side, y + side), fill=tuple(rng.choices(range(256), k=3)))
        return picture

    return cover


def watermark(picture):
    shown = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(shown).text((4, 40), "SAMPLE\nONLY", fill=150, font_size=34)
    return Image.composite(Image.new("RGB", picture.size, "white"), picture, shown)


def letterbox(share, colour="black"):
    def bars(picture):
        picture, bar = picture.copy(), round(share * SIZE)
        for top in (0, SIZE - bar):
            picture.paste(colour, (0, top, SIZE, top + bar))
        return picture

    return bars


def vignette(picture):
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    return per_pixel(lambda p: p * (1 - 0.4 * (x * x + y * y))[..., None])(picture)


def sheared(amount):
    affine = (1, amount, -amount * SIZE / 2, 0, 1, 0)
    return lambda p: p.transform(p.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def resized(width, height=None):
    return lambda p: p.resize((width, height or width), Image.Resampling.LANCZOS)


def padded(left, right, top=0, bottom=0):
    """Add columns and rows, or cut them off where they are negative."""

    def pad(picture):
        grown = ImageOps.expand(picture, (max(left, 0), max(top, 0), max(right, 0), max(bottom, 0)), "gray")
        width, height = grown.size
        return grown.crop((max(-left, 0), max(-top, 0), width - max(-right, 0), height - max(-bottom, 0)))

    return pad


def move_hue(picture):
    hue, *others = picture.convert("HSV").split()
    return Image.merge("HSV", [hue.point(lambda value: (value + 60) % 256), *others]).convert("RGB")


def blurred(sigma):
    return lambda p: p.filter(ImageFilter.GaussianBlur(sigma))


def ordinary(rng):
    for i in range(60):
        reference, target, change = pair(rng)
        yield Case(f"pair {i}", target, reference, change)


def single_changes(rng):
    for name in CHANGES:
        for i in range(2):
            reference, target, change = draw_pair(rng, FILES, SIZE, {name: RANGES[name]})
            yield Case(f"{name} alone {i}", target, reference, change)


def identical(rng):
    for i in range(8):
        reference, _, _ = pair(rng)
        yield Case(f"a picture and itself {i}", reference, reference, NO_CHANGE)


def there_and_back(rng):
    for i in range(6):
        reference, target, change = pair(rng, blur=(0, 0))
        yield Case(f"B for A {i}", reference, target, inverse(change))


def turned_together(rng):
    ways = {
        "mirrored": (ImageOps.mirror, lambda c: c | {"rotation": -c["rotation"], "shift x": -c["shift x"]}),
        "upside down": (ImageOps.flip, lambda c: c | {"rotation": -c["rotation"], "shift y": -c["shift y"]}),
        "turned": (lambda p: p.rotate(90), lambda c: c | {"shift x": c["shift y"], "shift y": -c["shift x"]}),
    }
    for name, (turn, become) in ways.items():
        for i in range(2):
            reference, target, change = pair(rng)
            yield Case(f"{name} {i}", turn(target), turn(reference), become(change))


def different(rng):
    for i in range(16):
        (reference, _, _), (_, target, _) = pair(rng), pair(rng)
        yield Case(f"another square or photograph {i}", target, reference, None)


def out_of_range(rng):
    far = [
        *[("rotation", n) for n in (12, 15, -20, 30, -45, 90, 180)],
        *[("zoom", n) for n in (0.5, 0.7, 1.4, 1.6, 2)],
        *[("shift x", n) for n in (0.15, -0.25, 0.4)],
        *[("shift y", n) for n in (0.2, -0.35)],
        *[("exposure", n) for n in (-3, -2, 1.5, 2.5)],
        *[("blur", n) for n in (3, 5, 9)],
    ]
    for name, number in far:
        reference, target, change = draw_pair(rng, FILES, SIZE, {name: (number, number)})
        yield Case(f"{name} {number}", target, reference, change)


def almost_textureless(rng):
    alterations = {
        **{f"blurred by {n}": (both(blurred(n)), MOTIONS) for n in (4, 8, 16)},
        **{f"contrast of {n:.0%}": (both(contrast(n)), MOTIONS) for n in (0.2, 0.05, 0.02)},
    }
    yield from altered(rng, alterations, zoom=(1, 1))
    grey = Image.new("RGB", (SIZE, SIZE), "gray")
    for sigma in (2, 10, 40):
        yield Case(f"noise of {sigma}, another in B", noise(rng, sigma)(grey), noise(rng, sigma)(grey), {}, MOTIONS)


def extreme_exposure(rng):
    yield from altered(rng, {f"both by {n} stops": (both(stops(n)), MOTIONS) for n in (-5, -3, 2, 4)})


def recoloured(rng):
    swapped = only_b(lambda p: Image.merge("RGB", p.split()[::-1]))
    hue = only_b(move_hue)
    alterations = {
        "B's channels swapped": (swapped, MOTIONS),
        "B's hue moved": (hue, MOTIONS),
        "B grey": (only_b(lambda p: p.convert("L").convert("RGB")), MOTIONS),
        "both grey": (both(lambda p: p.convert("L").convert("RGB")), STILL),
        "both one colour": (both(lambda p: ImageOps.colorize(p.convert("L"), "black", "red")), MOTIONS),
        "both negative": (both(ImageOps.invert), STILL),
        "B negative": (only_b(ImageOps.invert), MOTIONS),
        "B of gamma 1.6": (only_b(per_pixel(lambda x: x**1.6)), MOTIONS),
        "B of half the contrast": (only_b(per_pixel(lambda x: 0.25 + x / 2)), MOTIONS),
        "both equalized": (both(ImageOps.equalize), MOTIONS),
        "both of two levels": (both(lambda p: p.convert("1").convert("RGB")), MOTIONS),
        "both posterized": (both(lambda p: ImageOps.posterize(p, 2)), MOTIONS),
    }
    yield from altered(rng, alterations)


def compressed(rng):
    yield from altered(rng, {f"JPEG of quality {n}": (both(jpeg(n)), ALL) for n in (2, 5, 10, 25, 50, 90)})


def noisy(rng):
    alterations = {
        **{f"B noisy by {n}": (only_b(noise(rng, n)), ALL) for n in (4, 12, 40, 120)},
        **{f"B speckled {n:.1%}": (only_b(speckle(rng, n)), ALL) for n in (0.002, 0.02, 0.2)},
        "the same dead pixels in both": (both(speckle(rng, 0.01, seed=1)), ALL),
    }
    yield from altered(rng, alterations)


def covered(rng):
    alterations = {
        **{f"B covered {n:.0%}": (only_b(occlude(rng, n)), ALL) for n in (0.05, 0.15, 0.3, 0.6)},
        "a watermark on both": (both(watermark), ALL),
        "a watermark on B": (only_b(watermark), ALL),
        "a vignette on both": (both(vignette), ALL),
        **{f"bars of {n:.0%} on both": (both(letterbox(n)), ALL) for n in (0.06, 0.2)},
        "bars on B": (only_b(letterbox(0.15)), ALL),
        "white bars on both": (both(letterbox(0.12, "white")), ALL),
    }
    yield from altered(rng, alterations)


def warped(rng):
    alterations = {
        "B mirrored": (only_b(ImageOps.mirror), None),
        "B upside down": (only_b(ImageOps.flip), None),
        "B sheared by 0.3": (only_b(sheared(0.3)), None),
        "B stretched": (only_b(lambda p: resized(160, SIZE)(p).crop((16, 0, 16 + SIZE, SIZE))), None),
        "B's halves exchanged": (only_b(lambda p: Image.fromarray(np.roll(np.asarray(p), 64, 1))), None),
    }
    yield from altered(rng, alterations)


def sizes(rng):
    for size in (16, 32, 64, 96, 200, 320):
        for i in range(2):
            reference, target, change = pair(rng, size=size)
            yield Case(
                f"{size} x {size} pixels {i}", target, reference, change | {"blur": change["blur"] * SIZE / size}
            )
    alterations = {
        "B of 400 pixels": (only_b(resized(400)), ALL),
        "B of 64 pixels": (only_b(resized(64)), MOTIONS),
        "B of 24 pixels": (only_b(resized(24)), MOTIONS),
        "both of 8 pixels": (both(resized(8)), MOTIONS),
        "both of 1 x 128 pixels": (both(lambda p: p.crop((60, 0, 61, SIZE))), None),
        "both of 1 pixel": (both(resized(1)), None),
    }
    yield from altered(rng, alterations)


def shapes(rng):
    alterations = {
        "12 columns more in B": (only_b(padded(0, 12)), ALL),
        "20 columns fewer in B": (only_b(padded(-20, 0)), ALL),
        "30 rows fewer in B": (only_b(padded(0, 0, -30, 0)), ALL),
        "A a portrait, B a landscape": (lambda a, b: (padded(-20, -20)(a), padded(0, 0, -20, -20)(b)), ALL),
        "B squeezed": (only_b(resized(100, SIZE)), ALL),
        "40 columns more in both": (both(padded(20, 20)), ALL),
        "40 rows fewer in both": (both(padded(0, 0, -20, -20)), ()),
        "one column more in B": (only_b(padded(0, 1)), ALL),
    }
    yield from altered(rng, alterations)


# Formulas. Each: brightness at (x, y), widths from the middle; numbers it cannot show; numbers that are judged


def wave(z, period):
    return (np.sin(2 * np.pi * z / period) > 0).astype(float)


def radius(x, y):
    return np.hypot(x, y)


LINES = ("rotation", "exposure")  # of what shows no place along itself: one direction of the shift, and zoom, may mix
FORMULAS = {
    "flat": {
        "grey": (lambda x, y: 0.5 + 0 * x, (*STILL,), ("exposure",)),
        "light": (lambda x, y: 0.75 + 0 * x, (*STILL,), ("exposure",)),
        "black": (lambda x, y: 0 * x, ALL, ()),
        "white": (lambda x, y: 1 + 0 * x, STILL, ()),
    },
    "gradients": {
        "from left to right": (lambda x, y: 0.5 + 0.3 * x, ("shift y", "blur"), ()),
        "from top to bottom": (lambda x, y: 0.5 + 0.3 * y, ("shift x", "blur"), ()),
        "from corner to corner": (lambda x, y: 0.5 + 0.2 * (x + y), ("blur",), ()),
        "from the middle": (lambda x, y: np.exp(-4 * (x * x + y * y)), ("rotation",), ()),
    },
    "stripes": {
        "horizontal": (lambda x, y: wave(y, 0.2), ("shift x",), (*LINES, "zoom")),
        "narrow horizontal": (lambda x, y: 0.2 + 0.6 * wave(y, 0.08), ("shift x",), (*LINES, "zoom")),
        "vertical": (lambda x, y: wave(x, 0.14), ("shift y",), (*LINES, "zoom")),
        "soft horizontal": (lambda x, y: 0.5 + 0.4 * np.sin(2 * np.pi * y / 0.15), ("shift x",), (*LINES, "zoom")),
        "diagonal": (lambda x, y: wave(x + y, 0.25), (), (*LINES, "zoom")),
    },
    "grids": {
        "checkers": (lambda x, y: (wave(x, 0.3) + wave(y, 0.3)) % 2, (), ALL),
        "narrow checkers": (lambda x, y: (wave(x, 0.12) + wave(y, 0.12)) % 2, (), ALL),
        "dots": (lambda x, y: ((x % 0.2 - 0.1) ** 2 + (y % 0.2 - 0.1) ** 2 < 0.004).astype(float), (), ALL),
        "narrow dots": (lambda x, y: ((x % 0.1 - 0.05) ** 2 + (y % 0.1 - 0.05) ** 2 < 0.001).astype(float), (), ALL),
        "soft hills": (lambda x, y: 0.5 + 0.25 * (np.sin(40 * x) + np.sin(40 * y)), (), ALL),
    },
    "round": {
        "disc": (lambda x, y: (radius(x, y) < 0.3) * 1.0, ("rotation",), ("zoom", "shift x", "shift y")),
        "small disc": (lambda x, y: 0.2 + 0.6 * (radius(x, y) < 0.1), ("rotation",), ("zoom", "shift x", "shift y")),
        "ring": (lambda x, y: (abs(radius(x, y) - 0.3) < 0.05) * 1.0, ("rotation",), ("zoom", "shift x", "shift y")),
        "rings": (lambda x, y: wave(radius(x, y), 0.15), ("rotation",), ("shift x", "shift y")),
        "soft disc": (lambda x, y: 1 / (1 + np.exp(30 * (radius(x, y) - 0.3))), ("rotation",), ("shift x", "shift y")),
        "disc beside the middle": (lambda x, y: (radius(x - 0.2, y) < 0.15) * 1.0, ("rotation",), ("zoom",)),
        "spokes": (lambda x, y: wave(np.arctan2(y, x), math.radians(40)), ("zoom",), ("shift x", "shift y")),
    },
    "edges": {
        "vertical edge": (lambda x, y: 0.2 + 0.6 * (x > 0), ("shift y", "zoom"), LINES),
        "horizontal edge": (lambda x, y: 0.2 + 0.6 * (y > 0.05), ("shift x",), LINES),
        "line": (lambda x, y: (abs(x) < 0.03) * 1.0, ("shift y",), LINES),
        "quarters": (lambda x, y: 0.2 + 0.6 * ((x > 0) ^ (y > 0)), ("zoom",), ("rotation", "shift x", "shift y")),
        "cross": (lambda x, y: ((abs(x) < 0.04) | (abs(y) < 0.04)) * 1.0, (), ("rotation", "shift x", "shift y")),
    },
}


def draw_formula(formula, path, widths=3, pixels=512):
    """Write a PNG, `widths` squares of so many pixels wide, of which the middle one is the reference."""
    y, x = (np.mgrid[0 : widths * pixels, 0 : widths * pixels] + 0.5) / pixels - widths / 2
    Image.fromarray((255 * formula(x, y)).round().clip(0, 255).astype(np.uint8)).convert("RGB").save(path)


def formulas(sort, folder):
    def cases(rng):
        for name, (formula, unseen, names) in FORMULAS[sort].items():
            path = folder / f"{sort} {name}.png"
            draw_formula(formula, path)
            frame = np.array([[512, 0, 768], [0, 512, 768], [0, 0, 1]])
            for i in range(2):
                change = draw_change(rng, RANGES)
                if LINES[0] in names and unseen:  # so that the axis that shows nothing stays one
                    change["rotation"] = 0.0
                moved = frame @ np.linalg.inv(similarity(*(change[motion] for motion in MOTIONS)))
                reference = cut(path, frame, SIZE, 0, 0, [0, 1, 2])
                target = cut(path, moved, SIZE, change["blur"], change["exposure"], [0, 1, 2])
                yield Case(f"{name} {i}", target, reference, judged(change, names), unseen)

    return cases


# Files


def saver(mode, **how):
    """Returns: a function of a PIL picture: a function of a path, which saves the picture there in a mode."""
    return lambda picture: lambda path: picture.convert(mode).save(path, **how)


def save_deep(picture):
    return lambda path: Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path)


def save_array(scale, kind, **how):
    def save(picture):
        pixels = np.asarray(picture.convert("L"), float) * scale
        return lambda path: tifffile.imwrite(path, pixels.astype(kind), photometric="minisblack", **how)

    return save


def save_transparent(picture):
    def save(path):
        alpha = Image.new("L", picture.size, 255)
        ImageDraw.Draw(alpha).ellipse((20, 20, 50, 50), fill=0)
        picture.putalpha(alpha)
        picture.save(path)

    return save


def save_turned(picture):
    def save(path):
        exif = Image.Exif()
        exif[274] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)

    return save


KINDS = {  # how a picture is saved, with what suffix, and what is still true
    "grey": (saver("L"), "png", STILL),
    "16 bits": (save_deep, "png", STILL),
    "16 bits in TIFF": (save_deep, "tif", STILL),
    "16 bits, big-endian": (save_array(257, "u2", byteorder=">"), "tif", STILL),
    "floats": (save_array(1 / 255, "f4"), "tif", STILL),
    "floats to 255": (save_array(1, "f4"), "tif", STILL),
    "32 bits": (save_array(1, "i4"), "tif", STILL),
    "12 of 16 bits": (save_array(16, "u2"), "tif", MOTIONS),
    "one bit": (saver("1"), "png", MOTIONS),
    "grey and alpha": (saver("LA"), "png", STILL),
    "alpha": (saver("RGBA"), "png", ALL),
    "a transparent hole": (save_transparent, "png", ALL),
    "256 colours": (saver("P"), "png", ALL),
    "GIF": (saver("P"), "gif", ALL),
    "16 colours": (lambda p: lambda path: p.quantize(16).save(path), "png", MOTIONS),
    "CMYK": (saver("CMYK"), "tif", ALL),
    "CMYK in JPEG": (saver("CMYK", quality=95), "jpg", ALL),
    "YCbCr": (saver("YCbCr"), "tif", ALL),
    "WebP": (saver("RGB"), "webp", ALL),
    "AVIF": (saver("RGB"), "avif", ALL),
    "JPEG 2000": (saver("RGB"), "jp2", ALL),
    "BMP": (saver("RGB"), "bmp", ALL),
    "PPM": (saver("RGB"), "ppm", ALL),
    "turned by EXIF": (save_turned, "jpg", MOTIONS),
}


def kinds(rng):
    for name, (save, suffix, names) in KINDS.items():
        reference, target, change = pair(rng)
        yield Case(name, save(target), save(reference), judged(change, names), suffix=suffix)
    reference, target, change = pair(rng)
    yield Case("A of 8 bits, B of 16", save_deep(target), saver("L")(reference), judged(change, STILL))


def write_huge(path):
    parts = {b"IHDR": struct.pack(">IIBBBBB", 14000, 14000, 8, 0, 0, 0, 0), b"IDAT": b""}
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts.items()]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def cut_off(picture, share):
    def write(path):
        picture.copy().save(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def no_pictures(rng):
    reference, target, _ = pair(rng)

    def save_both(path):  # copies, since Pillow keeps how a picture was saved before
        target.copy().save(path, save_all=True, append_images=[reference.copy()])

    ways = {
        "missing": (lambda path: None, "png"),
        "a folder": (os.mkdir, "png"),
        "a pipe": (os.mkfifo, "png"),
        "empty": (lambda path: path.write_bytes(b""), "png"),
        "text": (lambda path: path.write_text("not a picture"), "png"),
        "a page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "jpg"),
        "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "png"),
        "zeros": (lambda path: path.write_bytes(bytes(5000)), "png"),
        "too large": (write_huge, "png"),
        "animation": (save_both, "gif"),
        "animated WebP": (save_both, "webp"),
        "pages": (save_both, "tif"),
        **{f"{n:.0%} of a {s}": (cut_off(target, n), s) for n in (0.05, 0.5, 0.95) for s in ("png", "jpg", "tif")},
        "damaged": (lambda path: (target.save(path), os.truncate(path, 9000), os.truncate(path, 20000)), "png"),
    }
    for name, (write, suffix) in ways.items():
        yield Case(f"B {name}", write, reference, None, suffix=suffix)
    for name in ("a pipe", "too large", "text"):
        yield Case(f"A {name}", target, ways[name][0], None)


# Settings and rows


def bad_settings(rng):
    del rng
    known = str(ROOT / "dataForTrain/resultData/astronaut_+2.png")
    for argument in (
        *["draws=0", "draws=2", "draws=nan", "draws=1e9", "draws=many", "batch_size=0", "batch_size=-1", "seed=-1"],
        *["seed=1e30", "seed=x", "eta=2", "eta=-1", "eta=nan", "scale=inf", "scale=-1", "scale=nan", "strength=inf"],
        *["strength=nan", "ddim_steps=0", "ddim_steps=nan", "num_samples=0", "solver=newton", "objective=best"],
        *["known=zoom=nan", "known=zoom=0", "known=zoom=-1", "known=zoom", "known=tilt=1", "known=rotation=inf"],
        *["control=1e39", "control=[1,2]", "control=abc", "control=nan", "figures=maybe", "both_ways=often"],
        *["device=warp", "model_path=nowhere", "model_path=", f"model_path={known}", "unknown=1", "draws"],
        *[
            "target_image_path=nowhere.png",
            "target_image_path=",
            "input_image_path=nowhere.png",
            "targets=nowhere.json",
        ],
        "target_image_path=" + "long" * 100 + ".png",
    ):
        yield Case(argument[:40], None, arguments=(argument,))
    tiny = f"model_path={MODELS['control_tiny']}"
    for argument in (f"input_image_path={known}", "control=[]", "control=[[1]]", "control=1e400", "both_ways=true"):
        yield Case(f"alone {argument[-40:]}", None, arguments=(tiny, f"target_image_path={known}", argument))


def bad_rows(rng):
    target = render_framed(TRAIN["astronaut"], SIZE, rng.uniform(-5, 5))
    rows = {
        **{f"source {s}": {"source": s} for s in ("abc", "", None, [], {}, True, [1, None], "nan", "1e999", [1, 2])},
        **{f"{key} {value}": {key: value} for key in ("target", "prompt") for value in (None, 5, [], "\ud800")},
        "a reference to nothing": {"reference": "nowhere.png"},
        "a target that is the folder": {"target": "."},
        "a long target": {"target": "long" * 100},
        "a target with a zero": {"target": "a\0b.png"},
    }
    for name, row in rows.items():
        yield Case(ascii(name), target, None, None, model="control_tiny", row=row)


# Photographs that the other controls know


def known_photo(rng, angle=None):
    photo = rng.choice(list(TRAIN.values()))
    angle = round(rng.uniform(-5, 5), 3) if angle is None else angle
    return photo.prompt, render_framed(photo, SIZE, angle), {"angle": angle}


def alone(rng, alterations):
    """alterations: {name: (what is done to the picture, whether the angle is still true)}."""
    for name, (alter, true) in alterations.items():
        for i in range(2):
            prompt, picture, truth = known_photo(rng)
            yield Case(f"{name} {i}", alter(picture), None, truth if true else None, (), prompt, "control_tiny")


def angles(rng):
    for i in range(12):
        prompt, picture, truth = known_photo(rng)
        yield Case(f"angle {i}", picture, None, truth, (), prompt, "control_tiny")
    for angle in (-8, 8, 12, -20, 45, 90, 180):
        for i in range(2):
            prompt, picture, truth = known_photo(rng, angle)
            yield Case(f"{angle} degrees {i}", picture, None, truth, (), prompt, "control_tiny")


def prompts(rng):
    ways = {
        "in capitals": str.upper,
        "in double quotes": lambda p: f'"{p}"',
        "in single quotes": lambda p: f"'{p}'",
        "in typographic quotes": lambda p: f"\u201c{p}\u201d",
        "with a full stop": lambda p: p + ".",
        "with spaces": lambda p: f"  {p.replace(' ', '   ')} \n",
        "with accents": lambda p: p.replace("a", "\u00e4").replace("o", "\u00f6"),
        "with a smile": lambda p: p + " \U0001f600",
        "with an entity": lambda p: p.replace(" ", "&nbsp;"),
        "with weights": lambda p: f"(({p}:1.3)), masterpiece, <lora:x:1>",
        "and a hundred words": lambda p: p + ", and very much more" * 25,
        "after a hundred words": lambda p: "much more " * 50 + p,
        "in another language": lambda p: "\u0444\u043e\u0442\u043e\u0433\u0440\u0430\u0444\u0438\u044f",
        "of another": lambda p: next(photo.prompt for photo in TRAIN.values() if photo.prompt != p),
        "unknown": lambda p: "a photo of a leather bag",
        "none": lambda p: "",
        "${seed}": lambda p: "a ${seed} b",
        "control characters": lambda p: p.replace(" ", "\u200b\u0007"),
    }
    for name, way in ways.items():
        for i in range(2):
            prompt, picture, truth = known_photo(rng)
            yield Case(f"{name} {i}", picture, None, truth, (), way(prompt), "control_tiny")
    for prompt in ("a photo of a cat", "\U0001f600" * 100, '"', "turned by 5 degrees"):
        reference, target, change = pair(rng)
        yield Case(f"a pair with {prompt[:20]!a}", target, reference, change, (), prompt)


def photographs_alone(rng):
    grey = Image.new("RGB", (SIZE, SIZE), "gray")
    alterations = {
        "negative": (ImageOps.invert, True),
        "mirrored": (ImageOps.mirror, False),
        "JPEG of quality 5": (jpeg(5), True),
        "contrast of 10%": (per_pixel(lambda x: 0.45 + 0.1 * x), True),
        "speckled": (speckle(rng, 0.02), True),
        "covered": (occlude(rng, 0.2), True),
        "a watermark": (watermark, True),
        "grey": (lambda p: p.convert("L").convert("RGB"), True),
        "brighter by 2 stops": (stops(2), True),
        "darker by 3 stops": (stops(-3), True),
        "blurred by 4": (blurred(4), True),
        "of 24 pixels": (resized(24), True),
        "in a wide frame": (padded(40, 40), True),
        "cut to a portrait": (padded(-20, -20), True),
        "flat": (lambda p: grey, False),
        "noise": (lambda p: noise(rng, 60)(grey), False),
        "a disc": (lambda p: Image.fromarray(255 * (np.hypot(*np.mgrid[-64:64, -64:64]) < 40).astype(np.uint8)), False),
    }
    yield from alone(rng, alterations)
    for name, photo in HELD_OUT.items():
        for known in list(TRAIN.values())[:2]:
            picture = render_framed(photo, SIZE, rng.uniform(-5, 5))
            yield Case(f"{name} as {known.prompt}", picture, None, None, (), known.prompt, "control_tiny")
    for name in ("16 bits", "one bit", "floats", "32 bits", "256 colours", "turned by EXIF"):
        save, suffix, _ = KINDS[name]
        prompt, picture, truth = known_photo(rng)
        yield Case(name, save(picture), None, truth, (), prompt, "control_tiny", suffix)


def views(rng):
    def view(control, prompt=None, alter=lambda p: p, true=True):
        photo = rng.choice(list(TRAIN.values()))
        truth = dict(zip(VIEW, control)) if true else None
        picture = alter(render_framed(photo, SIZE, *control))
        return dict(target=picture, truth=truth, prompt=photo.prompt if prompt is None else prompt)

    model = "control_views"
    for i in range(12):
        yield Case(f"a view {i}", **view(draw_view(rng)), model=model)
    for far in (
        (20, 1, 0, 0),
        (-15, 1.1, 0.3, 1),
        (0, 1.5, 0, 0),
        (0, 0.7, 0, 0),
        (0, 1, 2, 0),
        (3, 1, -2, 1),
        (0, 1, 0, 5),
    ):
        yield Case(f"far: {far}", **view(far), model=model)
    for prompt in ("", "unknown", "A PHOTO", TRAIN["brick"].prompt):
        yield Case(f"the prompt {prompt!a}", **view(draw_view(rng), prompt), model=model)
    alterations = {
        "flat": lambda p: Image.new("RGB", p.size, "gray"),
        "mirrored": ImageOps.mirror,
        "noise": lambda p: noise(rng, 80)(Image.new("RGB", p.size, "gray")),
    }
    for name, alter in alterations.items():
        for i in range(2):
            yield Case(f"{name} {i}", **view(draw_view(rng), None, alter, False), model=model)


SORTS = [
    *[ordinary, single_changes, identical, there_and_back, turned_together, different, out_of_range],
    *[almost_textureless, extreme_exposure, recoloured, compressed, noisy, covered, warped, sizes, shapes, kinds],
    *[no_pictures, bad_settings, bad_rows, angles, prompts, photographs_alone, views],
]


def make_cases(s, folder):
    """Returns: {sort: list of Case}."""
    sorts = {sort.__name__: sort for sort in SORTS} | {sort: formulas(sort, folder) for sort in FORMULAS}
    chosen = list(sorts) if s.sorts == "all" else s.sorts.split(",")
    for name in chosen:
        if name not in sorts:
            raise InputError(f'no sort "{name}"{nearest(name, sorts)}')
    cases = {}
    for name in chosen:
        own = list(sorts[name](random.Random(f"{s.seed} {name}")))
        cases[name] = own[:: max(1, len(own) // 2)][:2] if s.quick else own
    return cases


def write_case(case, folder, number):
    """Write the pictures of a case. Returns: its row of prompt.json."""
    row = {"prompt": case.prompt}
    for key, picture in dict(target=case.target, reference=case.reference).items():
        if picture is not None:
            path = folder / f"{number:03d}_{key}.{case.suffix if callable(picture) else 'png'}"
            if isinstance(picture, Image.Image):
                picture.save(path)
            else:
                picture(path)
            row[key] = path.name
    return row | case.row


class Hanging(BaseException):  # which nothing takes for a picture that cannot be read
    pass


@contextlib.contextmanager
def time_limit(seconds):
    """Raises: Hanging in the block if it takes longer, as a pipe that nobody writes to would for ever."""

    def stop(*_):
        raise Hanging(f"nothing in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        yield said


def refusal(arguments, out):
    """Run invert.py. Returns: the one line it ends with, or None. Raises: RuntimeError if it leaves anything else."""
    with silence() as said:
        try:
            run_script(invert.main, invert.settings, [*map(str, arguments), f"out_dir={out}"])
        except SystemExit as error:
            lines = said.getvalue().replace("\r", "\n").splitlines()
            lines = [line for line in lines if line.strip() and "%|" not in line]
            if error.code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or any(Path(out).glob("*")):
                raise RuntimeError(f"ended with {error.code}, {lines[-1:]}, {os.listdir(out)}") from None
            return lines[0]
    return None


def crashed(error):
    return dict(ended="wrong", wrong=f"{type(error).__name__}: {error}")


def read_cases(cases, folder):
    """Returns: for every case a dict: how it "ended", and the "reading", the "line" or what was "wrong"."""
    folder.mkdir(parents=True)
    outcomes, accepted = [None] * len(cases), {}
    for number, case in enumerate(cases):
        try:
            if case.arguments is not None:
                line = refusal(case.arguments, folder / f"{number:03d}_out")
                outcomes[number] = dict(ended="refused", line=line) if line else dict(ended="wrong", wrong="accepted")
                continue
            row, file = write_case(case, folder, number), folder / f"{number:03d}.json"
            file.write_text(json.dumps(row) + "\n")
            with time_limit(LIMIT):
                (read,) = read_rows(file, known=False)
                for picture in filter(None, (read.target, read.reference)):
                    check_picture(picture)
            accepted.setdefault(case.model, {})[number] = row
        except InputError as error:
            outcomes[number] = dict(ended="refused", line=str(error))
        except (Exception, Hanging) as error:
            outcomes[number] = crashed(error)
    for model, rows in accepted.items():
        for number, result in read_targets(model, rows, folder, model).items():
            outcomes[number] = result if "ended" in result else judge(cases[number], result)
    return outcomes


def read_targets(model, rows, folder, name):
    """Read rows of prompt.json, {number: row}, in one run of invert.py, or each in its own if that run ends early.

    Returns: {number: what results.jsonl has of it, or how it ended}.
    """
    file, out = folder / f"{name}.json", folder / f"{name}_out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    try:
        with silence():
            invert.main(override(invert.settings, [f"model_path={MODELS[model]}", f"targets={file}", f"out_dir={out}"]))
        return dict(zip(rows, map(json.loads, (out / "results.jsonl").read_text().splitlines()), strict=True))
    except Exception as error:
        if len(rows) > 1:
            single = [read_targets(model, {n: row}, folder, f"{model}_{n:03d}") for n, row in rows.items()]
            return {number: result for own in single for number, result in own.items()}
        ended = dict(ended="refused", line=str(error)) if isinstance(error, InputError) else crashed(error)
        return dict.fromkeys(rows, ended)


def judge(case, result):
    """Returns: how a reading ended, as read_cases has it."""
    flags, unsure = result["flags"], result.get("no_effect", ())
    if case.truth is None or set(flags) - {"no_effect"}:
        ended = dict(ended="flagged") if flags else dict(ended="wrong", wrong="no control explains it")
        return ended | dict(flags=flags, reading=result)
    numbers = zip(result["names"], np.atleast_1d(result["control"]), np.atleast_1d(result["std"]), result["interval90"])
    wrong, model = [], json.loads((MODELS[case.model] / "config.json").read_text())
    for k, (name, found, std, (low, high)) in enumerate(numbers):
        half, true = (model["control_high"][k] - model["control_low"][k]) / 2, case.truth.get(name)
        if name in unsure:
            continue
        if name in case.unseen:
            wrong += [f"{name} {found:.3f} ± {std:.3f}, which cannot be seen"] * (high - low < half)
        elif name in case.truth and abs(found - true) > ERRORS * std and not low <= true <= high:
            wrong.append(f"{name} {found:.3f} ± {std:.3f} for {true:.3f}")
    ended = "wrong" if wrong else "flagged" if flags else "right"
    return dict(ended=ended, wrong="; ".join(wrong), flags=flags, reading=result)


def main(s):
    check_numbers(s, int, seed=(0, 2**32 - 1))
    out_dir = report_folder(s.out_dir, "cases.json", "ended", "pictures", "formulas")
    for old in ("pictures", "formulas"):
        shutil.rmtree(out_dir / old, ignore_errors=True)
    (out_dir / "formulas").mkdir()
    cases, wrong = make_cases(s, out_dir / "formulas"), []
    report = {sort: [dict(name=case.name, ended="not read") for case in own] for sort, own in cases.items()}
    with tqdm(total=sum(map(len, cases.values()))) as bar:
        for sort, own in cases.items():
            bar.set_description(sort)
            write_whole(out_dir / "cases.json", lambda file: file.write_text(json.dumps(report, indent=1) + "\n"))
            report[sort] = [dict(name=c.name) | e for c, e in zip(own, read_cases(own, out_dir / "pictures" / sort))]
            wrong += [f"{sort}, {case['name']}: {case['wrong']}" for case in report[sort] if case["ended"] == "wrong"]
            bar.update(len(own))
    write_whole(out_dir / "cases.json", lambda file: file.write_text(json.dumps(report, indent=1) + "\n"))
    print(f"| | inputs | {' | '.join(ENDS)} | flags |\n| --- | --- | --- | --- | --- | --- | --- |")
    everything = [outcome for outcomes in report.values() for outcome in outcomes]
    for sort, outcomes in [*report.items(), ("all", everything)]:
        counts = [sum(outcome["ended"] == kind for outcome in outcomes) for kind in ENDS]
        flags = [flag for outcome in outcomes for flag in outcome.get("flags", [])]
        named = ", ".join(f"{flag} {flags.count(flag)}" for flag in sorted(set(flags)))
        print(f"| {sort.replace('_', ' ')} | {len(outcomes)} | {' | '.join(map(str, counts))} | {named} |")
    print("\n".join(["", *wrong]))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, settings)
