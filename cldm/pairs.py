"""Changes between two pictures: pairs cut at random from any photographs, and how changes invert and compose."""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from tqdm import tqdm

from cldm.dataset import ControlDataset, Row
from ldm.pictures import check_picture, load_picture
from ldm.settings import InputError

# unit, range, and the number that changes nothing
CHANGES = {
    "rotation": ("degrees", -10.0, 10.0, 0.0),  # counterclockwise, about the middle
    "zoom": ("ratio", 0.8, 1.25, 1.0),  # above 1, larger
    "shift x": ("widths", -0.1, 0.1, 0.0),  # to the right, after rotation and zoom
    "shift y": ("widths", -0.1, 0.1, 0.0),  # down
    "exposure": ("stops", -1.0, 1.0, 0.0),  # of linear light
    "blur": ("pixels", 0.0, 2.0, 0.0),  # standard deviation of a Gaussian, after the zoom
}
NO_CHANGE = {name: none for name, (*_, none) in CHANGES.items()}
MOTIONS = ("rotation", "zoom", "shift x", "shift y")
SMALLEST = 0.7  # side of a cut square over the pictures' size: below it, they would be blurred
TILT = 15.0  # degrees, at most, that a reference is turned, beside the quarter turns
REFERENCE_EXPOSURE, REFERENCE_BLUR = 0.7, 1.0  # stops and pixels, at most, that a reference itself is changed by
OVERSAMPLE = 2  # a picture is cut at this many times its resolution, then averaged down
LONGEST = 2048  # pixels of a photograph's longer side; more is scaled down when it is read
POOL, PASSES = 512, 4  # pairs drawn at once in training, and how often each is used, on average, with other noise
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def list_pictures(folder):
    """Returns: the pictures in a folder and below it, hidden ones left out. Raises: InputError if there are none."""
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    if not files:
        raise InputError(f"{folder}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
    return files


def check_photos(files):
    """Look at every photograph once, so that a broken one is found before it is needed.

    Returns: a digest of them all, a text. Raises: InputError naming one that cannot be read.
    """

    def check(file):
        check_picture(file)
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()

    with ThreadPoolExecutor() as pool:
        digests = tqdm(pool.map(check, files), "looking at pictures", len(files), delay=1)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def choose_changes(controls):
    """controls: a list of CHANGES' names, or {name: [low, high]}; None: all. Returns: {name: (low, high)}.

    Raises: InputError for a name that is not among them, or bounds that are none.
    """
    controls = list(CHANGES) if controls is None else controls
    listed = isinstance(controls, (Sequence, Mapping)) and not isinstance(controls, str)
    if not listed or not controls or any(name not in CHANGES for name in controls):
        raise InputError(f"controls: expected some of {', '.join(CHANGES)}, got {controls}")
    ranges = {name: bounds for name, (_, *bounds, _) in CHANGES.items() if name in controls}
    if not isinstance(controls, Mapping):
        return ranges
    for name in ranges:
        try:
            low, high = map(float, controls[name])
        except (TypeError, ValueError):
            low = high = math.nan
        least = {"zoom": 1e-3, "blur": 0}.get(name, -math.inf)
        if not least <= low <= high < math.inf or low == -math.inf:
            raise InputError(f"controls: {name} needs [low, high], got {controls[name]}")
        ranges[name] = [low, high]
    return ranges


def draw_change(rng, ranges):
    """Returns: {name: number} of all CHANGES, those in `ranges` drawn evenly, zoom in its logarithm."""
    change = dict(NO_CHANGE)
    for name, (low, high) in ranges.items():
        even = name != "zoom"
        change[name] = rng.uniform(low, high) if even else math.exp(rng.uniform(math.log(low), math.log(high)))
    return change


def draw_pair(rng, files, size, ranges):
    """Returns: reference, target (PIL), {name: number}, as draw_views has them."""
    reference, ((target, change),) = draw_views(rng, files, size, ranges, 1)
    return reference, target, change


def draw_views(rng, files, size, ranges, count):
    """Cut squares from a photograph between which known things change.

    The reference is a random square, mirrored, turned, exposed, blurred and recoloured at random, so that a target
    alone tells little. Squares that do not lie in their photograph are drawn again with their changes: zooms below 0.87
    come up a sixth more seldom than evenly.
    files: of photographs, one is drawn. size: pixels of the pictures. ranges: as choose_changes has them.
    Returns: reference (PIL); `count` targets (PIL), each with how it is changed from the reference, {name: number}.
    Raises: InputError if no photograph is large enough.
    """
    for _ in range(1000 * len(files)):
        file, changes = rng.choice(files), [draw_change(rng, ranges) for _ in range(count)]
        width, height = open_photo(file).size
        largest = min(width, height)
        side = math.exp(rng.uniform(math.log(min(SMALLEST * size, largest)), math.log(largest)))
        turned = similarity(rng.choice([0, 90, 180, 270]) + rng.uniform(-TILT, TILT), 1.0, 0.0, 0.0)
        frame = np.array([[rng.choice([-side, side]), 0, rng.uniform(0, width)], [0, side, rng.uniform(0, height)]])
        frame = np.vstack([frame, [0, 0, 1]]) @ turned  # from positions in the reference to those in the photograph
        moved = [frame @ np.linalg.inv(similarity(*(change[name] for name in MOTIONS))) for change in changes]
        blur = max(0.0, rng.uniform(-REFERENCE_BLUR, REFERENCE_BLUR))
        exposure = rng.uniform(-REFERENCE_EXPOSURE, REFERENCE_EXPOSURE)
        channels = rng.sample(range(3), 3)
        if all(reaches(view, width, height) for view in [frame, *moved]):
            targets = []
            for view, change in zip(moved, changes):
                blurred = math.hypot(blur * change["zoom"], change["blur"])
                targets.append((cut(file, view, size, blurred, exposure + change["exposure"], channels), change))
            return cut(file, frame, size, blur, exposure, channels), targets
    raise InputError(f"no picture large enough to cut {size} x {size} pixels from it, turned and shifted")


def similarity(rotation, zoom, shift_x, shift_y):
    """Returns: (3, 3), from a position in a picture, in widths from its middle, to where the change moves it."""
    angle = math.radians(rotation)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    return np.array([[cos, sin, shift_x], [-sin, cos, shift_y], [0, 0, 1]])


def reaches(frame, width, height):
    """Returns: whether a photograph has all of the square that `frame` puts into it."""
    x, y, _ = frame @ [[-0.5, 0.5, -0.5, 0.5], [-0.5, -0.5, 0.5, 0.5], [1, 1, 1, 1]]
    return min(x.min(), y.min()) >= 1 and x.max() <= width - 1 and y.max() <= height - 1


@lru_cache(64)
def open_photo(file):
    photo = load_picture(file, profiled=False)  # the shipped controls know the packages' photographs so
    photo.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return photo


@lru_cache(64)
def reduced(file, factor):
    return open_photo(file).reduce(factor)


def cut(file, frame, size, blur, exposure, channels):
    """Returns: the PIL picture of size x size pixels that `frame` (3, 3) puts into a photograph."""
    fine = OVERSAMPLE * size
    factor = max(1, int(abs(np.linalg.det(frame)) ** 0.5 / fine))
    pixels = np.array([[1 / fine, 0, -0.5], [0, 1 / fine, -0.5], [0, 0, 1]])
    matrix = np.diag([1 / factor, 1 / factor, 1]) @ frame @ pixels
    affine = (fine, fine), Image.Transform.AFFINE, matrix[:2].flatten().tolist(), Image.Resampling.BICUBIC
    picture = reduced(file, factor).transform(*affine).reduce(OVERSAMPLE).filter(ImageFilter.GaussianBlur(blur))
    picture = Image.merge("RGB", [picture.split()[k] for k in channels])
    return picture.point([round(255 * expose(value / 255, exposure)) for value in range(256)] * 3)


def expose(value, stops):
    """value: in sRGB, from 0 to 1. Returns: likewise, clipped. Source: IEC 61966-2-1, its transfer function."""
    light = value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
    light = min(1.0, light * 2**stops)
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def compose(first, second):
    """first, second: {name: number}, changes. Returns: likewise, the one change that both make after each other.

    Numbers of other names than CHANGES' add up.
    """
    given = [{name: change.get(name, none) for name, none in NO_CHANGE.items()} for change in (first, second)]
    matrix = similarity(*map(given[1].get, MOTIONS)) @ similarity(*map(given[0].get, MOTIONS))
    whole = {name: first[name] + second[name] for name in first} | decompose(matrix)
    whole["blur"] = math.hypot(given[0]["blur"] * given[1]["zoom"], given[1]["blur"])
    return {name: whole[name] for name in first}


def inverse(change):
    """change: {name: number}. Returns: likewise, the way back, in which nothing is blurred."""
    given = {name: change.get(name, none) for name, none in NO_CHANGE.items()}
    back = {name: -value for name, value in change.items()} | {"blur": 0.0}
    back |= decompose(np.linalg.inv(similarity(*map(given.get, MOTIONS))))
    return {name: back[name] for name in change}


def decompose(matrix):
    """matrix: as similarity has it. Returns: {name: number} of MOTIONS."""
    rotation, zoom = math.degrees(math.atan2(matrix[0, 1], matrix[0, 0])), float(np.linalg.det(matrix)) ** 0.5
    return dict(zip(MOTIONS, (rotation, zoom, float(matrix[0, 2]), float(matrix[1, 2]))))


class FreshPairs(Dataset):
    """Pairs drawn while they are asked for, POOL at once; each is used PASSES times. Items as a ControlDataset's.

    There is no end of them. They are asked for in order; what item i is depends on the seed alone.
    """

    def __init__(self, files, ranges, base, image_size, seed):
        self.files, self.ranges, self.base, self.image_size = files, ranges, base, image_size
        self.seed, self.number = seed, None

    def __getitem__(self, i):
        number = i // (POOL * PASSES)
        if number != self.number:
            with torch.autocast(self.base.device.type, torch.bfloat16):  # half the time; training is not that exact
                self.number, self.pool = number, self.draw(POOL, number)
        return self.pool[random.Random(hash((self.seed, i))).randrange(POOL)]

    def draw(self, count, number):
        """Returns: a ControlDataset of `count` pairs."""
        rng = random.Random(hash((self.seed, number)))
        rows = []
        for _ in range(count):
            reference, target, change = draw_pair(rng, self.files, self.image_size, self.ranges)
            rows.append(Row(tuple(change[name] for name in self.ranges), target, "", reference))
        return ControlDataset(rows, self.base, self.image_size, label=None)
