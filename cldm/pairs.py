"""Pairs of pictures between which known things change, cut at random from any photographs."""

import math
import os
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from torch.utils.data import Dataset

from cldm.changes import CHANGES, MOTIONS, draw_change, expose_picture, similarity
from cldm.dataset import ControlDataset, Row, TrainingData
from cldm.model import MODEL_YAML
from ldm.base import roughly
from ldm.pictures import check_pictures, load_picture
from ldm.settings import InputError

SMALLEST = 0.7  # least side of a cut square, as a share of the pictures' size: smaller ones would be blurred
TILT = 15.0  # degrees that a reference is turned at most, beside quarter turns
REFERENCE_EXPOSURE, REFERENCE_BLUR = 0.7, 1.0  # stops and pixels that a reference itself is changed by at most
OVERSAMPLE = 2  # a picture is cut at this many times its resolution, then averaged down
LONGEST = 2048  # pixels of a photograph's longer side; larger ones are scaled down when they are read
PHOTOS = 256  # kept in memory, each as it is and scaled down
CORNERS = [[-0.5, 0.5, -0.5, 0.5], [-0.5, -0.5, 0.5, 0.5], [1, 1, 1, 1]]  # of the square that a frame cuts
TRIES = 100_000  # to find squares inside a photograph, at least
HOPEFUL = 1000  # of these, before it is asked whether any photograph is large enough
POOL, PASSES = 512, 4  # pairs drawn at once in training; how often each is used on average, with other noise
VALIDATION_PAIRS, VALIDATION_ROWS = 144, 1000  # at most
STATISTICS = 10_000  # random changes from which the mean and spread of each number are taken
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
OTHERS = {".arw", ".avif", ".cr2", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".pgm", ".ppm", ".tga"}


def list_pictures(folder):
    """Returns: the pictures in a folder and below it, links followed, without hidden ones and those of trainings' runs;
    tells of those, and of those of OTHERS.

    Raises: InputError if there are none.
    """
    files, left, seen, runs = [], [], set(), []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        real = os.path.realpath(place)
        if real in seen:  # by a link
            folders.clear()
            continue
        seen.add(real)
        if place != os.fspath(folder) and (MODEL_YAML in names or "tensorboard" in folders):
            runs.append(place)
            folders.clear()
            continue
        own = [Path(place, name) for name in names if not name.startswith(".")]
        files += [file for file in own if file.suffix.lower() in SUFFIXES and file.is_file()]
        left += [file.suffix.lower() for file in own if file.suffix.lower() in OTHERS]
    files.sort()
    if runs:
        print(f"{folder}: pictures of {len(runs)} training(s) are left out, such as {runs[0]}")
    if not files:
        raise InputError(f"{folder}: no pictures in it ({', '.join(sorted(SUFFIXES))})")
    if left:
        kinds = ", ".join(sorted({*left}))
        print(f"{folder}: {len(left)} picture(s) of other kinds are left out ({kinds}); convert them")
    return files


def read_photos(train, validation, ranges, seed):
    """Returns: the TrainingData of pairs cut from photographs; ranges: as choose_changes returns them."""
    check_pictures(train + validation)  # so that a broken one is found before training starts
    rng = random.Random(seed)
    drawn = [draw_change(rng, ranges) for _ in range(STATISTICS)]
    controls = [[change[name] for name in ranges] for change in drawn] + [*zip(*ranges.values())]
    controls = np.array(controls)
    return TrainingData(train, validation, controls, list(ranges), [CHANGES[name][0] for name in ranges], ranges=ranges)


def training_set(data, base, image_size, seed, cache=""):
    """Returns: the dataset of a TrainingData's training rows, or pairs. cache: as ControlDataset has it."""
    if data.ranges:
        return FreshPairs(data.train, data.ranges, base, image_size, seed)
    return ControlDataset(data.train, base, image_size, cache)


def validation_set(data, base, image_size, seed, cache=""):
    """Returns: a ControlDataset of validation rows, or pairs, of training photographs if need be; None without rows.

    Of many rows, VALIDATION_ROWS are taken, from the first to the last.
    """
    if data.ranges:
        pairs = FreshPairs(data.validation or data.train, data.ranges, base, image_size, seed + 1)
        return pairs.draw(VALIDATION_PAIRS, 0)
    rows = data.validation
    if len(rows) > VALIDATION_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, VALIDATION_ROWS).astype(int)]
    return ControlDataset(rows, base, image_size, cache) if rows else None


def draw_pair(rng, files, size, ranges):
    """Returns: reference and target (PIL), {name: number}; as draw_views."""
    reference, ((target, change),) = draw_views(rng, files, size, ranges, 1)
    return reference, target, change


def draw_views(rng, files, size, ranges, count):
    """Cut squares from a photograph between which known things change.

    The reference is a random square, mirrored, turned, exposed, blurred and recoloured at random, so that a target
    alone tells little. Squares that reach over the border are drawn again, which makes large changes rarer: zooms below
    0.87 by an eighth of photographs eight times as large as the pictures, by a third of twice as large ones; of those
    that are no larger, few are left.
    files: photographs, of which one is drawn. size: pixels of the pictures. ranges: as choose_changes returns them.
    Returns: the reference (PIL); `count` targets (PIL), each with its change from the reference, {name: number}.
    """
    for attempt in range(TRIES + 1000 * len(files)):
        if attempt == HOPEFUL and all(min(open_photo(file).size) <= SMALLEST * size for file in files):
            break
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
        x, y, _ = np.moveaxis([view @ CORNERS for view in [frame, *moved]], 1, 0)
        if min(x.min(), y.min()) >= 1 and x.max() <= width - 1 and y.max() <= height - 1:  # inside the photograph
            targets = []
            for view, change in zip(moved, changes):
                blurred = math.hypot(blur * change["zoom"], change["blur"])
                targets.append((cut(file, view, size, blurred, exposure + change["exposure"], channels), change))
            return cut(file, frame, size, blur, exposure, channels), targets
    raise InputError(f"no picture large enough to cut {size} x {size} pixels from it, turned and shifted")


@lru_cache(PHOTOS)
def open_photo(file):
    photo = load_picture(file, profiled=False)  # as the shipped controls were trained
    photo.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return photo


@lru_cache(PHOTOS)
def reduced(file, factor):
    return open_photo(file).reduce(factor)


def cut(file, frame, size, blur, exposure, channels):
    """Returns: the PIL picture of size x size pixels that `frame` (3, 3) cuts from a photograph."""
    fine = OVERSAMPLE * size
    factor = max(1, int(abs(np.linalg.det(frame)) ** 0.5 / fine))
    pixels = np.array([[1 / fine, 0, -0.5], [0, 1 / fine, -0.5], [0, 0, 1]])
    matrix = np.diag([1 / factor, 1 / factor, 1]) @ frame @ pixels
    affine = (fine, fine), Image.Transform.AFFINE, matrix[:2].flatten().tolist(), Image.Resampling.BICUBIC
    picture = reduced(file, factor).transform(*affine).reduce(OVERSAMPLE).filter(ImageFilter.GaussianBlur(blur))
    return expose_picture(Image.merge("RGB", [picture.split()[k] for k in channels]), exposure)


class FreshPairs(Dataset):
    """Endless pairs, drawn POOL at a time while they are asked for; each is used PASSES times on average.

    Items are as a ControlDataset's. They are asked for in order; item i depends on the seed and i alone.
    """

    def __init__(self, files, ranges, base, image_size, seed):
        self.files, self.ranges, self.base, self.image_size = files, ranges, base, image_size
        self.seed, self.number = seed, None

    def __getitem__(self, i):
        number = i // (POOL * PASSES)
        if number != self.number:
            with roughly(self.base.device):
                self.number, self.pool = number, self.draw(POOL, number)
        return self.pool[random.Random(hash((self.seed, i))).randrange(POOL)]

    def draw(self, count, number):
        """Returns: a ControlDataset of `count` pairs."""
        rng = random.Random(hash((self.seed, number)))
        rows = []
        for _ in range(count):
            reference, target, change = draw_pair(rng, self.files, self.image_size, self.ranges)
            rows.append(Row(tuple(change[name] for name in self.ranges), target, "", reference))
        return ControlDataset(rows, self.base, self.image_size)
