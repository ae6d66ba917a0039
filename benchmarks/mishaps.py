"""What happens to meters, done to a photograph of a dial: each a function(rng, picture, value) -> picture, value.

rng: a random.Random. picture: PIL, RGB, square, a dial that fills it. value: what it shows, from 0 to 10. The value of
what comes out is what a person would read from it, or would have read before.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from cldm.changes import expose_picture

FINE = 4  # times as fine as the picture, something is drawn, then averaged down
MOVED = 10  # pixels


def cover(rng, picture, value):
    """Something lies on the glass, over most of the needle or all of it."""
    size = picture.width
    x, y = (size * rng.uniform(0.45, 0.55) for _ in range(2))
    wide, high = (size * rng.uniform(0.28, 0.42) for _ in range(2))
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).ellipse((x - wide, y - high, x + wide, y + high), fill=255)
    mask = mask.rotate(rng.uniform(0, 180)).filter(ImageFilter.GaussianBlur(1.5))
    grey = rng.randint(30, 220)
    colour = tuple(grey + rng.randint(-30, 30) for _ in range(3))
    return Image.composite(Image.new("RGB", picture.size, colour), picture, mask), value


def darken(rng, picture, value):
    """The lamp is off: a 1/16 to 1/250 of the light, and the camera's noise."""
    dark = np.asarray(expose_picture(picture, -rng.uniform(4, 8)), float)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 3, dark.shape)
    return Image.fromarray((dark + noise).round().clip(0, 255).astype(np.uint8)), value


def glare(rng, picture, value):
    """A lamp or the sun is mirrored in the glass, over a part of the dial."""
    size, angle, far = picture.width, rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.3)
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size - 0.5
    squared = (x - far * math.cos(angle)) ** 2 + (y - far * math.sin(angle)) ** 2
    light = np.clip(1.6 * np.exp(-squared / rng.uniform(0.15, 0.35) ** 2), 0, 1)[..., None]
    pixels = np.asarray(picture) * (1 - light) + 255 * light
    return Image.fromarray(pixels.round().astype(np.uint8)), value


def move(rng, picture, value):
    """The camera has moved; where the photograph shows nothing, its edge is repeated."""
    angle = rng.uniform(0, 2 * math.pi)
    right, down = (round(MOVED * part(angle)) for part in (math.cos, math.sin))
    pixels = np.pad(np.asarray(picture), ((MOVED, MOVED), (MOVED, MOVED), (0, 0)), "edge")
    left, top = MOVED - right, MOVED - down
    return Image.fromarray(pixels[top : top + picture.height, left : left + picture.width]), value


def replace(rng, picture, value):
    """Another meter: drawn, or this one mirrored or with another colour of needle."""
    kind = rng.choice(["drawn", "mirrored", "recoloured"])
    if kind == "drawn":
        value = round(rng.uniform(0, 10), 2)
        return draw_meter(rng, picture.width, value), value
    if kind == "mirrored":
        return ImageOps.mirror(picture), value
    hue, *others = picture.convert("HSV").split()
    turn = rng.randint(60, 200)
    return Image.merge("HSV", [hue.point(lambda h: (h + turn) % 256), *others]).convert("RGB"), value


def draw_meter(rng, size, value):
    """Returns: a face with a scale from 0 to 9, and a needle on a hub, of random colours and sizes."""
    side = FINE * size
    light, ink = rng.randint(190, 250), rng.randint(0, 80)
    canvas = Image.new("RGB", (side, side), (light, light, light - rng.randint(0, 40)))
    pen, middle = ImageDraw.Draw(canvas), side / 2

    def place(tenths, radius):
        angle = math.radians(36 * tenths)
        return middle + side * radius * math.sin(angle), middle - side * radius * math.cos(angle)

    pen.circle((middle, middle), 0.46 * side, outline=(ink,) * 3, width=side // 80)
    for k in range(50):
        pen.line([place(k / 5, 0.46), place(k / 5, 0.43 if k % 5 else 0.4)], fill=(ink,) * 3, width=side // 120)
    for k in range(10):
        pen.text(place(k, 0.33), str(k), fill=(ink,) * 3, font_size=side // 10, anchor="mm")
    colour = rng.choice([(20, 20, 20), (200, 30, 30), (30, 60, 160), (230, 140, 20)])
    length, width, hub = rng.uniform(0.3, 0.42), rng.uniform(0.3, 0.9), rng.uniform(0.03, 0.08)
    pen.polygon([place(value, length), place(value + 2.5, hub * width), place(value + 7.5, hub * width)], fill=colour)
    pen.circle((middle, middle), hub * side, fill=colour)
    return canvas.reduce(FINE).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))


MISHAPS = {
    "covered": cover,
    "darkness": darken,
    "glare": glare,
    "camera moved": move,
    "another meter": replace,
}
