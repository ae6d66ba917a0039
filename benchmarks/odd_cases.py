"""The odd inputs of odd_inputs.py: pictures, prompts and rows, each with what is true of it."""

import io
import math
import os
import random
import struct
import zlib
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from benchmarks.common import inverse
from cldm.changes import CHANGES, MOTIONS, NO_CHANGE, draw_change, expose_picture, similarity
from cldm.pairs import cut, draw_pair
from dataForTrain.make_dataset import HELD_OUT, TRAIN, VIEW, draw_view, find_photo, render_framed

SIZE = 128  # pixels
RANGES = {name: bounds for name, (_, *bounds, _) in CHANGES.items()}
FILES = [find_photo(photo.file) for photo in HELD_OUT.values()]
ALL, STILL = tuple(CHANGES), (*MOTIONS, "blur")  # all numbers; those that brightness does not touch
GREY = Image.new("RGB", (SIZE, SIZE), "gray")


@dataclass
class Case:
    name: str
    reference: object  # a PIL picture, a function that writes one to a path, or None
    target: object = None  # likewise
    truth: dict | None = None  # {number: value} to judge by; None: no control explains the target
    unseen: tuple = ()  # numbers that the picture cannot show
    prompt: str = ""
    model: str = "control_tiny_pair"
    suffix: str = "png"
    row: dict = field(default_factory=dict)  # replaces keys of the row in prompt.json


# Pairs of photographs


def pair(rng, size=SIZE, **ranges):
    """Returns: reference, target, change. `ranges` replace those of CHANGES."""
    return draw_pair(rng, FILES, size, RANGES | ranges)


def altered(sort):
    """Returns: a function of a random generator that yields two cases of every alteration of a sort."""

    def cases(rng):
        for name, (alter, true, *ranges) in ALTERATIONS[sort](rng).items():
            for i in range(2):
                reference, target, change = pair(rng, **dict(ranges))
                truth = None if true is None else {n: change[n] for n in true}
                yield Case(f"{name} {i}", *alter(reference, target), truth)

    return cases


def both(alter):
    return lambda a, b: (alter(a), alter(b))


def only_b(alter):
    return lambda a, b: (a, alter(b))


def per_pixel(function):
    """Apply a function of arrays from 0 to 1 to PIL pictures."""
    return lambda p: Image.fromarray((255 * function(np.asarray(p) / 255).clip(0, 1)).round().astype(np.uint8))


def contrast(share, middle=0.5):
    return per_pixel(lambda x: middle + share * (x - middle))


def stops(number):
    return lambda p: expose_picture(p, number)


def blurred(sigma):
    return lambda p: p.filter(ImageFilter.GaussianBlur(sigma))


def grey(picture):
    return picture.convert("L").convert("RGB")


def noise(rng, sigma, picture):
    generator = np.random.default_rng(rng.getrandbits(32))
    return per_pixel(lambda x: x + generator.normal(0, sigma / 255, x.shape))(picture)


def speckle(rng, share, picture):
    """Set a share of the pixels to white or black."""
    generator, pixels = np.random.default_rng(rng.getrandbits(32)), np.array(picture)
    dead = generator.random(pixels.shape[:2]) < share
    pixels[dead] = np.where(generator.random(dead.sum()) < 0.5, 0, 255)[:, None]
    return Image.fromarray(pixels)


def jpeg(quality, picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cover(rng, share, picture):
    """Paint a square of one colour over a share of the picture."""
    side, picture = round(SIZE * share**0.5), picture.copy()
    x, y = (rng.randint(0, SIZE - side) for _ in range(2))
    picture.paste(tuple(rng.choices(range(256), k=3)), (x, y, x + side + 1, y + side + 1))
    return picture


def watermark(picture):
    shown = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(shown).text((4, 40), "SAMPLE\nONLY", fill=150, font_size=34)
    return Image.composite(Image.new("RGB", picture.size, "white"), picture, shown)


def shear(picture):
    affine = (1, 0.3, -0.3 * SIZE / 2, 0, 1, 0)
    return picture.transform(picture.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def vignette(picture):
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    return per_pixel(lambda p: p * (1 - 0.4 * (x * x + y * y))[..., None])(picture)


def bars(share, colour, picture):
    """Paint bars over the top and the bottom."""
    picture, height = picture.copy(), round(share * SIZE)
    for top in (0, SIZE - height):
        picture.paste(colour, (0, top, SIZE, top + height))
    return picture


def resized(width, height=None):
    return lambda p: p.resize((width, height or width), Image.Resampling.LANCZOS)


def padded(left, right, top=0, bottom=0):
    """Add grey columns and rows, or cut some off where the number is negative."""

    def pad(picture):
        grown = ImageOps.expand(picture, tuple(max(n, 0) for n in (left, top, right, bottom)), "gray")
        left_cut, right_cut, top_cut, bottom_cut = (max(-n, 0) for n in (left, right, top, bottom))
        return grown.crop((left_cut, top_cut, grown.width - right_cut, grown.height - bottom_cut))

    return pad


def move_hue(picture):
    hue, *others = picture.convert("HSV").split()
    return Image.merge("HSV", [hue.point(lambda value: (value + 60) % 256), *others]).convert("RGB")


def ordinary(rng):
    for i in range(60):
        yield Case(f"pair {i}", *pair(rng))


def single_changes(rng):
    for name in CHANGES:
        for i in range(2):
            yield Case(f"{name} alone {i}", *draw_pair(rng, FILES, SIZE, {name: RANGES[name]}))


def identical(rng):
    for i in range(8):
        reference, _, _ = pair(rng)
        yield Case(f"a picture and itself {i}", reference, reference, NO_CHANGE)


def there_and_back(rng):
    for i in range(6):
        reference, target, change = pair(rng, blur=(0, 0))
        yield Case(f"B for A {i}", target, reference, inverse(change))


def turned_together(rng):
    ways = {
        "mirrored": (ImageOps.mirror, lambda c: c | {"rotation": -c["rotation"], "shift x": -c["shift x"]}),
        "upside down": (ImageOps.flip, lambda c: c | {"rotation": -c["rotation"], "shift y": -c["shift y"]}),
        "turned": (lambda p: p.rotate(90), lambda c: c | {"shift x": c["shift y"], "shift y": -c["shift x"]}),
    }
    for name, (turn, become) in ways.items():
        for i in range(2):
            reference, target, change = pair(rng)
            yield Case(f"{name} {i}", turn(reference), turn(target), become(change))


def different(rng):
    for i in range(16):
        (reference, _, _), (_, target, _) = pair(rng), pair(rng)
        yield Case(f"another square or photograph {i}", reference, target)


def out_of_range(rng):
    far = {
        "rotation": (12, 15, -20, 30, -45, 90, 180),
        "zoom": (0.5, 0.7, 1.4, 1.6, 2),
        "shift x": (0.15, -0.25, 0.4),
        "shift y": (0.2, -0.35),
        "exposure": (-3, -2, 1.5, 2.5),
        "blur": (3, 5, 9),
    }
    for name, numbers in far.items():
        for number in numbers:
            yield Case(f"{name} {number}", *draw_pair(rng, FILES, SIZE, {name: (number, number)}))


def other_noise(rng):
    for sigma in (2, 10, 40):
        target, reference = noise(rng, sigma, GREY), noise(rng, sigma, GREY)
        yield Case(f"noise of {sigma}, another in B", reference, target, {}, MOTIONS)


# sort: {name: (function of reference and target, the numbers that are still true; None: no control explains it)}
ALTERATIONS = {
    "almost_textureless": lambda rng: {
        **{f"blurred by {n}": (both(blurred(n)), MOTIONS, ("zoom", (1, 1))) for n in (4, 8, 16)},
        **{f"contrast of {n:.0%}": (both(contrast(n)), MOTIONS, ("zoom", (1, 1))) for n in (0.2, 0.05, 0.02)},
    },
    "extreme_exposure": lambda rng: {f"both by {n} stops": (both(stops(n)), MOTIONS) for n in (-5, -3, 2, 4)},
    "recoloured": lambda rng: {
        "B's channels swapped": (only_b(lambda p: Image.merge("RGB", p.split()[::-1])), MOTIONS),
        "B's hue moved": (only_b(move_hue), MOTIONS),
        "B grey": (only_b(grey), MOTIONS),
        "both grey": (both(grey), STILL),
        "both one colour": (both(lambda p: ImageOps.colorize(p.convert("L"), "black", "red")), MOTIONS),
        "both negative": (both(ImageOps.invert), STILL),
        "B negative": (only_b(ImageOps.invert), MOTIONS),
        "B of gamma 1.6": (only_b(per_pixel(lambda x: x**1.6)), MOTIONS),
        "B of half the contrast": (only_b(contrast(0.5)), MOTIONS),
        "both equalized": (both(ImageOps.equalize), MOTIONS),
        "both of two levels": (both(lambda p: p.convert("1").convert("RGB")), MOTIONS),
        "both posterized": (both(lambda p: ImageOps.posterize(p, 2)), MOTIONS),
    },
    "compressed": lambda rng: {f"JPEG of quality {n}": (both(partial(jpeg, n)), ALL) for n in (2, 5, 10, 25, 50, 90)},
    "noisy": lambda rng: {
        **{f"B noisy by {n}": (only_b(partial(noise, rng, n)), ALL) for n in (4, 12, 40, 120)},
        **{f"B speckled {n:.1%}": (only_b(partial(speckle, rng, n)), ALL) for n in (0.002, 0.02, 0.2)},
        "the same dead pixels in both": (both(lambda p: speckle(random.Random(1), 0.01, p)), ALL),
    },
    "covered": lambda rng: {
        **{f"B covered {n:.0%}": (only_b(partial(cover, rng, n)), ALL) for n in (0.05, 0.15, 0.3, 0.6)},
        "a watermark on both": (both(watermark), ALL),
        "a watermark on B": (only_b(watermark), ALL),
        "a vignette on both": (both(vignette), ALL),
        **{f"bars of {n:.0%} on both": (both(partial(bars, n, "black")), ALL) for n in (0.06, 0.2)},
        "bars on B": (only_b(partial(bars, 0.15, "black")), ALL),
        "white bars on both": (both(partial(bars, 0.12, "white")), ALL),
    },
    "warped": lambda rng: {
        "B mirrored": (only_b(ImageOps.mirror), None),
        "B upside down": (only_b(ImageOps.flip), None),
        "B sheared": (only_b(shear), None),
        "B stretched": (only_b(lambda p: padded(-16, -16)(resized(160, SIZE)(p))), None),
        "B's halves exchanged": (only_b(lambda p: Image.fromarray(np.roll(np.asarray(p), 64, 1))), None),
    },
    "sizes": lambda rng: {
        "B of 400 pixels": (only_b(resized(400)), ALL),
        "B of 64 pixels": (only_b(resized(64)), MOTIONS),
        "B of 24 pixels": (only_b(resized(24)), MOTIONS),
        "both of 8 pixels": (both(resized(8)), MOTIONS),
        "both of 1 x 128 pixels": (both(lambda p: p.crop((60, 0, 61, SIZE))), None),
        "both of 1 pixel": (both(resized(1)), None),
    },
    "shapes": lambda rng: {
        "12 columns more in B": (only_b(padded(0, 12)), ALL),
        "20 columns fewer in B": (only_b(padded(-20, 0)), ALL),
        "30 rows fewer in B": (only_b(padded(0, 0, -30, 0)), ALL),
        "A a portrait, B a landscape": (lambda a, b: (padded(-20, -20)(a), padded(0, 0, -20, -20)(b)), ALL),
        "B squeezed": (only_b(resized(100, SIZE)), ALL),
        "40 columns more in both": (both(padded(20, 20)), ALL),
        "40 rows fewer in both": (both(padded(0, 0, -20, -20)), ()),
        "one column more in B": (only_b(padded(0, 1)), ALL),
    },
}


def other_sizes(rng):
    for size in (16, 32, 64, 96, 200, 320):
        for i in range(2):
            reference, target, change = pair(rng, size=size)
            truth = change | {"blur": change["blur"] * SIZE / size}
            yield Case(f"{size} x {size} pixels {i}", reference, target, truth)


# Formulas: brightness at (x, y), widths from the middle; numbers that it cannot show; numbers that are judged


def wave(z, period):
    return (np.sin(2 * np.pi * z / period) > 0).astype(float)


def dots(x, y, period, square):
    """square: of a dot's radius."""
    return ((x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < square).astype(float)


radius = np.hypot
SHIFTS, PLACE = ("shift x", "shift y"), ("zoom", "shift x", "shift y")
TURN, LINES = ("rotation", "exposure"), ("rotation", "exposure", "zoom")  # of lines, where a shift may mix with a zoom
FORMULAS = {
    "flat": {
        "grey": (lambda x, y: 0.5 + 0 * x, STILL, ("exposure",)),
        "light": (lambda x, y: 0.75 + 0 * x, STILL, ("exposure",)),
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
        "horizontal": (lambda x, y: wave(y, 0.2), ("shift x",), LINES),
        "narrow horizontal": (lambda x, y: 0.2 + 0.6 * wave(y, 0.08), ("shift x",), LINES),
        "vertical": (lambda x, y: wave(x, 0.14), ("shift y",), LINES),
        "soft horizontal": (lambda x, y: 0.5 + 0.4 * np.sin(2 * np.pi * y / 0.15), ("shift x",), LINES),
        "diagonal": (lambda x, y: wave(x + y, 0.25), (), LINES),
    },
    "grids": {
        "checkers": (lambda x, y: (wave(x, 0.3) + wave(y, 0.3)) % 2, (), ALL),
        "narrow checkers": (lambda x, y: (wave(x, 0.12) + wave(y, 0.12)) % 2, (), ALL),
        "dots": (lambda x, y: dots(x, y, 0.2, 0.004), (), ALL),
        "narrow dots": (lambda x, y: dots(x, y, 0.1, 0.001), (), ALL),
        "soft hills": (lambda x, y: 0.5 + 0.25 * (np.sin(40 * x) + np.sin(40 * y)), (), ALL),
    },
    "round": {
        "disc": (lambda x, y: (radius(x, y) < 0.3) * 1.0, ("rotation",), PLACE),
        "small disc": (lambda x, y: 0.2 + 0.6 * (radius(x, y) < 0.1), ("rotation",), PLACE),
        "ring": (lambda x, y: (abs(radius(x, y) - 0.3) < 0.05) * 1.0, ("rotation",), PLACE),
        "rings": (lambda x, y: wave(radius(x, y), 0.15), ("rotation",), SHIFTS),
        "soft disc": (lambda x, y: 1 / (1 + np.exp(30 * (radius(x, y) - 0.3))), ("rotation",), SHIFTS),
        "disc beside the middle": (lambda x, y: (radius(x - 0.2, y) < 0.15) * 1.0, ("rotation",), ("zoom",)),
        "spokes": (lambda x, y: wave(np.arctan2(y, x), math.radians(40)), ("zoom",), SHIFTS),
    },
    "edges": {
        "vertical edge": (lambda x, y: 0.2 + 0.6 * (x > 0), ("shift y", "zoom"), TURN),
        "horizontal edge": (lambda x, y: 0.2 + 0.6 * (y > 0.05), ("shift x",), TURN),
        "line": (lambda x, y: (abs(x) < 0.03) * 1.0, ("shift y",), TURN),
        "quarters": (lambda x, y: 0.2 + 0.6 * ((x > 0) ^ (y > 0)), ("zoom",), ("rotation", *SHIFTS)),
        "cross": (lambda x, y: ((abs(x) < 0.04) | (abs(y) < 0.04)) * 1.0, (), ("rotation", *SHIFTS)),
    },
}


def draw_formula(formula, path, widths=3, pixels=512):
    """Write a PNG of `widths` x `widths` squares of so many pixels, the middle one of which is the reference."""
    y, x = (np.mgrid[0 : widths * pixels, 0 : widths * pixels] + 0.5) / pixels - widths / 2
    Image.fromarray((255 * formula(x, y)).round().clip(0, 255).astype(np.uint8)).convert("RGB").save(path)


def formulas(sort, folder):
    """Returns: a function of a random generator that yields a sort's cases, and writes pictures to a folder."""

    def cases(rng):
        for name, (formula, unseen, names) in FORMULAS[sort].items():
            path = folder / f"{sort} {name}.png"
            draw_formula(formula, path)
            frame = np.array([[512, 0, 768], [0, 512, 768], [0, 0, 1]])
            for i in range(2):
                change = draw_change(rng, RANGES)
                if "rotation" in names and unseen:  # so that what cannot be seen is a shift along one axis
                    change["rotation"] = 0.0
                moved = frame @ np.linalg.inv(similarity(*(change[motion] for motion in MOTIONS)))
                reference = cut(path, frame, SIZE, 0, 0, [0, 1, 2])
                target = cut(path, moved, SIZE, change["blur"], change["exposure"], [0, 1, 2])
                yield Case(f"{name} {i}", reference, target, {n: change[n] for n in names}, unseen)

    return cases


# Files


def saver(mode, **how):
    """Returns: a function of a PIL picture that returns a function of a path, which saves the picture in a mode."""
    return lambda picture: lambda path: picture.convert(mode).save(path, **how)


def save_deep(picture):
    return lambda path: Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path)


def save_array(scale, kind, **how):
    def save(picture):
        pixels = (np.asarray(picture.convert("L"), float) * scale).astype(kind)
        return lambda path: tifffile.imwrite(path, pixels, photometric="minisblack", **how)

    return save


def save_transparent(picture):
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (20, 20, 50, 50))
    picture.putalpha(alpha)
    return picture.save


def save_turned(picture):
    exif = Image.Exif()
    exif[274] = 6
    return lambda path: picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


KINDS = {  # name: how a picture is saved, with what suffix, and which numbers are still true
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
    "16 colours": (lambda p: p.quantize(16).save, "png", MOTIONS),
    "CMYK": (saver("CMYK"), "tif", ALL),
    "CMYK in JPEG": (saver("CMYK", quality=95), "jpg", ALL),
    "YCbCr": (saver("YCbCr"), "tif", ALL),
    **{
        name: (saver("RGB"), suffix, ALL)
        for name, suffix in dict(WebP="webp", AVIF="avif", BMP="bmp", PPM="ppm").items()
    },
    "JPEG 2000": (saver("RGB"), "jp2", ALL),
    "turned by EXIF": (save_turned, "jpg", MOTIONS),
}


def kinds(rng):
    for name, (save, suffix, true) in KINDS.items():
        reference, target, change = pair(rng)
        yield Case(name, save(reference), save(target), {n: change[n] for n in true}, suffix=suffix)
    reference, target, change = pair(rng)
    yield Case("A of 8 bits, B of 16", saver("L")(reference), save_deep(target), {n: change[n] for n in STILL})


def write_huge(path):
    """Write the header of a PNG of 196 megapixels."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", 14000, 14000, 8, 0, 0, 0, 0), b"IDAT": b""}
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts.items()]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def no_pictures(rng):
    reference, target, _ = pair(rng)

    def save_both(path):  # of copies, since Pillow remembers how a picture was saved before
        target.copy().save(path, save_all=True, append_images=[reference.copy()])

    def cut_off(share):
        def write(path):
            target.copy().save(path)
            os.truncate(path, int(share * path.stat().st_size))

        return write

    def damage(path):
        target.save(path)
        for size in (9000, 20000):
            os.truncate(path, size)

    ways = {
        "missing": (lambda path: None, "png"),
        "a folder": (os.mkdir, "png"),
        "empty": (lambda path: path.touch(), "png"),
        "text": (lambda path: path.write_text("not a picture"), "png"),
        "a page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "jpg"),
        "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "png"),
        "zeros": (lambda path: path.write_bytes(bytes(5000)), "png"),
        "too large": (write_huge, "png"),
        "animation": (save_both, "gif"),
        "animated WebP": (save_both, "webp"),
        "pages": (save_both, "tif"),
        **{f"{n:.0%} of a {s}": (cut_off(n), s) for n in (0.05, 0.5, 0.95) for s in ("png", "jpg", "tif")},
        "damaged": (damage, "png"),
    }
    for name, (write, suffix) in ways.items():
        yield Case(f"B {name}", reference, write, suffix=suffix)
    for name in ("too large", "text"):
        yield Case(f"A {name}", ways[name][0], target)


# Rows


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
        yield Case(ascii(name), None, target, model="control_tiny", row=row)


# Photographs that the other controls know


def known_photo(rng, angle=None):
    """Returns: prompt, picture, truth."""
    photo = rng.choice(list(TRAIN.values()))
    angle = round(rng.uniform(-5, 5), 3) if angle is None else angle
    return photo.prompt, render_framed(photo, SIZE, angle), {"angle": angle}


def alone(name, target, truth, prompt, model="control_tiny", **others):
    return Case(name, None, target, truth, prompt=prompt, model=model, **others)


def angles(rng):
    for i in range(12):
        prompt, picture, truth = known_photo(rng)
        yield alone(f"angle {i}", picture, truth, prompt)
    for angle in (-8, 8, 12, -20, 45, 90, 180):
        for i in range(2):
            prompt, picture, truth = known_photo(rng, angle)
            yield alone(f"{angle} degrees {i}", picture, truth, prompt)


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
            yield alone(f"{name} {i}", picture, truth, way(prompt))
    for prompt in ("a photo of a cat", "\U0001f600" * 100, '"', "turned by 5 degrees"):
        yield Case(f"a pair with {prompt[:20]!a}", *pair(rng), prompt=prompt)


def photographs_alone(rng):
    disc = Image.fromarray(255 * (np.hypot(*np.mgrid[-64:64, -64:64]) < 40).astype(np.uint8))
    alterations = {  # what is done to the picture, and whether the angle is still true
        "negative": (ImageOps.invert, True),
        "mirrored": (ImageOps.mirror, False),
        "JPEG of quality 5": (partial(jpeg, 5), True),
        "contrast of 10%": (contrast(0.1), True),
        "speckled": (partial(speckle, rng, 0.02), True),
        "covered": (partial(cover, rng, 0.2), True),
        "a watermark": (watermark, True),
        "grey": (grey, True),
        "brighter by 2 stops": (stops(2), True),
        "darker by 3 stops": (stops(-3), True),
        "blurred by 4": (blurred(4), True),
        "of 24 pixels": (resized(24), True),
        "in a wide frame": (padded(40, 40), True),
        "cut to a portrait": (padded(-20, -20), True),
        "flat": (lambda p: GREY, False),
        "noise": (lambda p: noise(rng, 60, GREY), False),
        "a disc": (lambda p: disc, False),
    }
    for name, (alter, true) in alterations.items():
        for i in range(2):
            prompt, picture, truth = known_photo(rng)
            yield alone(f"{name} {i}", alter(picture), truth if true else None, prompt)
    for name, photo in HELD_OUT.items():
        for known in list(TRAIN.values())[:2]:
            yield alone(f"{name} as {known.prompt}", render_framed(photo, SIZE, rng.uniform(-5, 5)), None, known.prompt)
    for name in ("16 bits", "one bit", "floats", "32 bits", "256 colours", "turned by EXIF"):
        save, suffix, _ = KINDS[name]
        prompt, picture, truth = known_photo(rng)
        yield alone(name, save(picture), truth, prompt, suffix=suffix)


def views(rng):
    def view(name, control, prompt=None, alter=lambda p: p, true=True):
        photo = rng.choice(list(TRAIN.values()))
        truth, picture = dict(zip(VIEW, control)), alter(render_framed(photo, SIZE, *control))
        prompt = photo.prompt if prompt is None else prompt
        return alone(name, picture, truth if true else None, prompt, "control_views")

    for i in range(12):
        yield view(f"a view {i}", draw_view(rng))
    turned = (20, 1, 0, 0), (-15, 1.1, 0.3, 1)
    for far in (*turned, (0, 1.5, 0, 0), (0, 0.7, 0, 0), (0, 1, 2, 0), (3, 1, -2, 1), (0, 1, 0, 5)):
        yield view(f"far: {far}", far)
    for prompt in ("", "unknown", "A PHOTO", TRAIN["brick"].prompt):
        yield view(f"the prompt {prompt!a}", draw_view(rng), prompt)
    alterations = {"flat": lambda p: GREY, "mirrored": ImageOps.mirror, "noise": lambda p: noise(rng, 80, GREY)}
    for name, alter in alterations.items():
        for i in range(2):
            yield view(f"{name} {i}", draw_view(rng), None, alter, False)


SORTS = [
    *[ordinary, single_changes, identical, there_and_back, turned_together, different, out_of_range, kinds],
    *[no_pictures, bad_rows, angles, prompts, photographs_alone, views, other_noise, other_sizes],
]


def sorts(folder):
    """Returns: {name: function of a random generator that yields Cases}; pictures of formulas go to a folder."""
    drawn = {name: altered(name) for name in ALTERATIONS} | {name: formulas(name, folder) for name in FORMULAS}
    return {sort.__name__: sort for sort in SORTS} | drawn


def write_case(case, folder, number):
    """Write a case's pictures. Returns: its row of a prompt.json."""
    row = {"prompt": case.prompt}
    for key, picture in dict(target=case.target, reference=case.reference).items():
        if picture is not None:
            path = folder / f"{number:03d}_{key}.{case.suffix if callable(picture) else 'png'}"
            picture(path) if callable(picture) else picture.save(path)
            row[key] = path.name
    return row | case.row
