"""Pairs of pictures in which every place's move is known: cut-outs that fly before a detail of a photograph.

As the Flying Chairs of Dosovitskiy et al. 2015, and lit anew. A cldm.matcher.Matcher learns from them.
"""

import math

import numpy as np
from PIL import Image

FIELD = 1.8  # side of what is drawn of a background, in pictures
MOVED = 0.6  # share of the backgrounds that move, too
STRENGTHS = 0.3, 1.0  # of moves, one of which is drawn for each
RELIT = 0.6  # share of the pairs whose pictures are lit unlike one another


def draw_map(rng, depth):
    """Returns: (3, 3), a homography in half pictures from the middle. depth: how far it is no similarity, 0 to 1."""
    strength = rng.choice(STRENGTHS)

    def draw(std):
        return rng.gauss(0, std * strength)

    angle, scale, stretch = math.radians(draw(8)), math.exp(draw(0.12)), math.exp(depth * draw(0.2))
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    shape = [[scale * stretch, depth * draw(0.1), 0], [0, scale, 0], [depth * draw(0.12), depth * draw(0.12), 1]]
    return np.array([[1, 0, draw(0.15)], [0, 1, draw(0.1)], [0, 0, 1]]) @ turn @ shape


def transform(points, matrix):
    """points: (..., 2), x and y. Returns: likewise, where a homography takes them."""
    moved = np.concatenate([points, np.ones_like(points[..., :1])], -1) @ matrix.T
    return moved[..., :2] / np.maximum(moved[..., 2:], 0.2)


def warp(picture, size, matrix):
    """matrix: (3, 3), from half pictures of the result to half widths of `picture`. Returns: PIL, size x size, RGBA."""
    to_middle = np.array([[2 / size, 0, -1], [0, 2 / size, -1], [0, 0, 1]])  # from pixels, as PIL counts them
    from_middle = np.array([[picture.width / 2, 0, picture.width / 2], [0, picture.height / 2, picture.height / 2]])
    matrix = np.vstack([from_middle, [0, 0, 1]]) @ matrix @ to_middle
    coefficients = (matrix / matrix[2, 2]).flatten()[:8].tolist()
    how = Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC
    return picture.convert("RGBA").transform((size, size), *how)


def cut_blob(rng, picture):
    """Returns: a square picture without what lies outside of a wavy outline, RGBA."""
    picture, size = picture.convert("RGBA"), picture.width
    y, x = np.mgrid[:size, :size] * 2 / size - 1
    waves = sum(rng.gauss(0, 0.3) / k * np.cos(k * np.arctan2(y, x) + rng.uniform(0, 6.3)) for k in (2, 3, 4, 5))
    picture.putalpha(Image.fromarray(255 * (np.hypot(x, y) < 0.75 * (1 + 0.4 * waves)).astype(np.uint8)))
    return picture


def draw_light(rng):
    """Returns: gamma, gains of the channels, and a slope to the right and downwards."""
    gains = [math.exp(rng.gauss(0, 0.15)) for _ in range(3)]
    return math.exp(rng.gauss(0, 0.2)), np.array(gains), np.array([rng.uniform(-0.4, 0.4) for _ in range(2)])


def light(picture, gamma, gains, slope):
    """Returns: a picture as bytes (3, size, size), lit so."""
    pixels = np.asarray(picture.convert("RGB")) / 255
    y, x = np.mgrid[: picture.height, : picture.width] * 2 / picture.width - 1
    pixels = pixels**gamma * gains * (1 + slope[0] * x + slope[1] * y)[..., None]
    return (255 * pixels.clip(0, 1)).astype(np.uint8).transpose(2, 0, 1)


def draw_pair(rng, size, places, background, cutouts):
    """Draw a target and a reference.

    size: of pictures, in pixels. places: along a side, at which moves are told. background, cutouts: PIL pictures, the
    latter RGBA, the last in front.
    Returns: bytes (2, 3, size, size), target first; (2, places, places), how far to the right and down, in places, what
    the target shows at a place lies in the reference; (places, places) bool, whether the reference shows it, too.
    """
    moved = draw_map(rng, 0.5) if rng.random() < MOVED else np.eye(3)
    layers = [(background, np.diag([1 / FIELD, 1 / FIELD, 1]), moved)]
    for cutout in cutouts:
        largest, side = max(cutout.size), rng.uniform(0.4, 0.85)
        around = np.diag([largest / cutout.width / side, largest / cutout.height / side, 1])
        aside = np.array([[1, 0, rng.uniform(-0.4, 0.4)], [0, 1, rng.uniform(-0.4, 0.4)], [0, 0, 1]])
        layers.append((cutout, around @ aside, draw_map(rng, 1)))
    pictures = [Image.new("RGBA", (size, size)) for _ in range(2)]
    fronts = np.zeros((2, size, size), int)  # which layer shows
    for i, (layer, place, move) in enumerate(layers):
        for picture, front, matrix in zip(pictures, fronts, (place @ move, place)):
            own = warp(layer, size, matrix)
            picture.alpha_composite(own)
            front[np.asarray(own)[..., 3] > 127] = i + 1
    first = draw_light(rng)
    lights = first, draw_light(rng) if rng.random() < RELIT else first
    middle = (np.arange(places) + 0.5) / places * 2 - 1
    here = np.stack(np.meshgrid(middle, middle), -1)  # (places, places, 2)
    shown = fronts[0][to_pixels(here, size)]
    there = np.stack([here, *(transform(here, move) for *_, move in layers)])  # for what nothing covers, none moves
    there = np.take_along_axis(there, shown[None, ..., None], 0)[0]
    seen = (np.abs(there) < 1).all(-1) & (fronts[1][to_pixels(there, size)] == shown) & (shown > 0)
    moves = ((there - here) * places / 2).transpose(2, 0, 1)
    return np.stack([light(*own) for own in zip(pictures, *zip(*lights))]), moves.astype(np.float32), seen


def to_pixels(points, size):
    """points: (..., 2), x and y in half pictures from the middle. Returns: (...) rows, and columns, of pixels."""
    x, y = np.moveaxis(((points + 1) * size / 2).astype(int).clip(0, size - 1), -1, 0)
    return y, x
