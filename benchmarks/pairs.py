"""Reading the change between two pictures: every method on the same pairs, in one run.

    python benchmarks/pairs.py                                  # all, about 90 minutes on two cores
    python benchmarks/pairs.py methods=ours,ecc                 # some

Pairs are cut from photographs that no training has seen. Prints the tables of docs/results.md: for rotation alone, for
all six numbers, and for pictures of 320 x 320 pixels rotated about a point that is not their middle; how often
intervals hold the truth and what is flagged, also for pairs of different photographs; and how readings agree with each
other, there and back. Leaves every error in out_dir/errors.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    model_path="models/control_tiny_pair",
    methods="all",
    photos="held_out",  # a group of make_dataset.py's, or any folder
    pairs=64,
    seed=3,
    regressor_minutes=60.0,  # as long as the control was trained
    out_dir="outputs/pairs",
)
if __name__ == "__main__":
    answer(__file__)

import contextlib
import io
import json
import math
import random
import time
from functools import partial

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from skimage.filters import difference_of_gaussians, window
from skimage.registration import phase_cross_correlation
from skimage.transform import EuclideanTransform, SimilarityTransform, warp, warp_polar
from torch import nn
from torchvision.models import resnet18
from tqdm import tqdm

from benchmarks.baselines import train_regressor
from benchmarks.common import choose, compose, decompose, quantiles
from cldm.changes import CHANGES, MOTIONS, NO_CHANGE, choose_changes, similarity
from cldm.model import load_model
from cldm.pairs import POOL, draw_pair, draw_views, open_photo
from cldm.reading import read_controls
from dataForTrain.make_dataset import find_pictures
from ldm.files import report_folder, write_whole
from ldm.pictures import fit_picture, pictures_to_tensor

SIZE = 128  # pixels
BATCH = 12  # pairs read together
NAMES = list(CHANGES)


def outside_pair(rng, files):
    """Returns: reference, target, change: 320 x 320 pictures, rotated by whole degrees about any point, PNG or JPEG."""
    size = 320
    files = [file for file in files if min(open_photo(file).size) > 1.3 * size]  # so that a rotated square fits in
    if not files:
        raise InputError(f"photos: none is large enough to cut {size} x {size} pixels from it, rotated")
    while True:
        photo = open_photo(rng.choice(files))
        angle = rng.choice([-1, 1]) * rng.randint(1, 8)
        pivot = [rng.uniform(-0.5, 0.5) for _ in range(2)]  # widths from the middle
        there = np.array([[1, 0, pivot[0]], [0, 1, pivot[1]], [0, 0, 1]])
        motion = there @ similarity(angle, 1, 0, 0) @ np.linalg.inv(there)
        if max(abs(motion[0, 2]), abs(motion[1, 2])) > CHANGES["shift x"][2]:
            continue
        x, y = (rng.uniform(0, side - size) for side in photo.size)
        pixels = np.array([[1 / size, 0, -0.5], [0, 1 / size, -0.5], [0, 0, 1]])
        place = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]) @ np.linalg.inv(pixels)
        matrices = place @ pixels, place @ np.linalg.inv(motion) @ pixels
        corners = matrices[1] @ [[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]]
        if corners[:2].min() < 0 or (corners[:2].max(1) > photo.size).any():
            continue
        cut = [
            photo.transform((size, size), Image.Transform.AFFINE, m[:2].flatten().tolist(), Image.Resampling.BICUBIC)
            for m in matrices
        ]
        file = io.BytesIO()
        cut[1].save(file, rng.choice(["png", "jpeg"]))
        return *(fit_picture(p, SIZE) for p in (cut[0], Image.open(file))), NO_CHANGE | decompose(motion)


def gray(picture):
    return np.asarray(picture.convert("L"), np.float32) / 255


def from_pixels(matrix):
    """matrix: (3, 3), from pixels of the target to those of the reference. Returns: {name: number} of MOTIONS."""
    pixels = np.array([[1 / SIZE, 0, 0.5 / SIZE - 0.5], [0, 1 / SIZE, 0.5 / SIZE - 0.5], [0, 0, 1]])
    return decompose(pixels @ np.linalg.inv(matrix) @ np.linalg.inv(pixels))


def ecc(reference, target, sought):
    """OpenCV's enhanced correlation coefficient over pyramids, with the simplest motion that holds what is sought.

    The best of pyramids of several heights is taken, since the tallest often does not converge on pictures this small.
    """
    options, best = cv2.ECCParameters(), (-1.0, np.eye(2, 3, dtype=np.float32))
    options.motionType = cv2.MOTION_AFFINE if "zoom" in sought else cv2.MOTION_EUCLIDEAN
    for options.nlevels in (4, 3, 2, 1):
        start = np.eye(2, 3, dtype=np.float32)
        with contextlib.suppress(cv2.error):  # where it does not converge
            found = cv2.findTransformECCMultiScale(gray(target), gray(reference), start, options)
            best = max(best, found, key=lambda result: result[0])
    return from_pixels(np.vstack([best[1], [0, 0, 1]]).astype(float))


def log_polar(reference, target, sought):
    """Phase correlation of log-polar spectra for rotation and zoom, then of pictures for the shift (scikit-image).

    Spectra are normalised at every radius, which did best on training photographs.
    """
    pictures, radius, turns, radii = [gray(picture) for picture in (reference, target)], SIZE // 2, 720, 2 * SIZE
    spectra = []
    for picture in pictures:
        filtered = difference_of_gaussians(picture, 1, 5) * window("hann", picture.shape)
        spectrum = np.abs(np.fft.fftshift(np.fft.fft2(filtered)))
        polar = warp_polar(spectrum, radius=radius, output_shape=(turns, radii), scaling="log", order=1)[: turns // 2]
        spectra.append((polar - polar.mean(0)) / (polar.std(0) + 1e-6))
    (turn, scale), *_ = phase_cross_correlation(*spectra, upsample_factor=20, normalization=None)
    angle = (turn * 360 / turns + 90) % 180 - 90
    zoom = math.exp(scale * math.log(radius) / radii) if "zoom" in sought else 1.0
    middle = (SIZE - 1) / 2
    center = SimilarityTransform(translation=(-middle, -middle))
    turned = EuclideanTransform(rotation=math.radians(angle)) + SimilarityTransform(scale=1 / zoom)
    back = center + turned + center.inverse  # from the target's pixels to the reference's, but for the shift
    hann = window("hann", pictures[0].shape)
    moved = warp(pictures[0], back, mode="reflect") * hann
    (down, right), *_ = phase_cross_correlation(pictures[1] * hann, moved, upsample_factor=20)
    shift = SimilarityTransform(translation=(-right, -down))
    return from_pixels((shift + back).params)


class Siamese(nn.Module):
    """What one might train instead: the first half of a ResNet-18 on each picture, the second half on both."""

    def __init__(self, outputs):
        super().__init__()
        whole = resnet18()
        self.each = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.layer1, whole.layer2)
        self.both = nn.Sequential(nn.Conv2d(256, 128, 1), whole.layer3, whole.layer4, nn.Flatten())
        self.last = nn.Linear(512 * (SIZE // 16) ** 2, outputs)

    def forward(self, reference, target):
        return self.last(self.both(torch.cat([self.each(reference), self.each(target)], 1)))


def siamese(minutes, seed, file):
    """Returns: what reads pairs by the Siamese network in `file`; it is trained if there is none.

    It learns from fresh pairs of the photographs that the control was trained on, each used four times, as there.
    """
    network, ranges = Siamese(len(NAMES)), choose_changes(None)
    low, high = torch.tensor(list(ranges.values())).T
    middle, spread = (low + high) / 2, (high - low) / 12**0.5
    rng, photos, pool = random.Random(seed), find_pictures("train"), []

    def draw_batch(step):
        if step % (4 * POOL // 32) == 0:
            pool[:] = [draw_pair(rng, photos, SIZE, ranges) for _ in range(POOL)]
        some = rng.sample(pool, 32)
        inputs = tuple(pictures_to_tensor([pair[i] for pair in some]) for i in (0, 1))
        wanted = torch.tensor([list(change.values()) for *_, change in some])
        return inputs, (wanted - middle) / spread

    if not file.exists():
        network.train()
        train_regressor(network, minutes, draw_batch, nn.functional.l1_loss)
        write_whole(file, partial(save_file, network.state_dict()))
    network.load_state_dict(load_file(file))
    network.eval()

    @torch.no_grad()
    def read(reference, target, sought):
        found = network(pictures_to_tensor([reference]), pictures_to_tensor([target]))[0] * spread + middle
        return dict(zip(NAMES, found.tolist()))

    return read


def read_pairs(model, pairs, sought):
    """Read pairs by the control; numbers that are not sought are known not to change. Returns: Readings."""
    known, readings = {name: NO_CHANGE[name] for name in NAMES if name not in sought}, []
    for first in tqdm(range(0, len(pairs), BATCH), desc="reading", leave=False):
        references, targets, _ = zip(*pairs[first : first + BATCH])
        readings.append(read_controls(model, model.encode([""] * len(targets), targets, references), known))
    return readings


def print_row(name, errors, last):
    """Print a row: for every number median / 90% within / worst of its errors, a list or None; then a last cell."""
    cells = []
    for own in errors.values():
        digits = 4 if own and np.abs(own).max() < 0.5 else 3
        cells.append(" / ".join(quantiles(own, [0.5, 0.9, 1], digits)) if own else "—")
    print(f"| {name} | {' | '.join(cells)} | {last} |", flush=True)


def main(s):
    names = choose(s.methods, ["ours", "ecc", "log_polar", "siamese"], "methods")
    check_numbers(s, int, pairs=(1, 10**6), seed=(0, 2**63 - 1))
    check_numbers(s, regressor_minutes=(0, 10**4))
    out_dir, files = report_folder(s.out_dir, "errors.json", "rotation"), find_pictures(s.photos)
    rng, model = random.Random(s.seed), load_model(s.model_path)
    torch.manual_seed(s.seed)
    readers = {"ecc": ecc, "log_polar": log_polar}
    if "siamese" in names:
        file = out_dir / f"siamese_{s.regressor_minutes:g}_{s.seed}.safetensors"
        readers["siamese"] = siamese(s.regressor_minutes, s.seed, file)
    every = choose_changes(None)
    tasks = {
        "rotation alone": (["rotation"], [draw_pair(rng, files, SIZE, {"rotation": (-5, 5)}) for _ in range(s.pairs)]),
        "all six": (NAMES, [draw_pair(rng, files, SIZE, every) for _ in range(s.pairs)]),
        "from outside": (["rotation", "shift x", "shift y"], [outside_pair(rng, files) for _ in range(s.pairs)]),
    }
    report = {}
    for task, (sought, pairs) in tasks.items():
        units = [f"{name} ({CHANGES[name][0]})" for name in sought]
        print(f"\n{task}, {len(pairs)} pairs: median / 90% within / worst\n")
        print(f"| | {' | '.join(units)} | seconds a pair |\n|{' --- |' * (len(sought) + 2)}")
        for method in names:
            began = time.perf_counter()
            if method == "ours":
                readings = read_pairs(model, pairs, sought)
                found = [dict(zip(NAMES, c)) for r in readings for c in r.control.tolist()]
            else:
                found = [readers[method](reference, target, sought) for reference, target, _ in pairs]
            seconds = (time.perf_counter() - began) / len(pairs)
            own = [name for name in sought if method in ("ours", "siamese") or name in MOTIONS]
            errors = {name: [f[name] - change[name] for f, (*_, change) in zip(found, pairs)] for name in own}
            print_row(method, {name: errors.get(name) for name in sought}, f"{seconds:.2f}")
            report[f"{task}, {method}"] = errors
            if method == "ours":
                print_flags(readings, errors)
    if "ours" in names:
        turns = [draw_pair(rng, [files[i % len(files)]], SIZE, every) for i in range((s.pairs + 1) // 2)]
        mixed = [(one[0], other[1], None) for one, other in zip(turns, turns[1:] + turns[:1])]
        print(f"\n{len(mixed)} pairs of different photographs:")
        print_flags(read_pairs(model, mixed, NAMES), {})
        check_ways(model, rng, files, tasks["all six"][1], report["all six, ours"])
    write_whole(out_dir / "errors.json", lambda file: file.write_text(json.dumps(report)))


def check_ways(model, rng, files, pairs, errors):
    """Print how far readings are from agreeing with each other, which takes no truth.

    There and back should come to no change, as should a picture and itself; a change by way of a third picture should
    be the same as the direct one. errors: {name: errors of the pairs}.
    """

    def read(pairs):
        """Returns: a list of {name: number}, without blur, which has no way back."""
        readings = read_pairs(model, pairs, [name for name in NAMES if name != "blur"])
        return [dict(zip(NAMES, control)) for reading in readings for control in reading.control.tolist()]

    def miss(ways, wholes):
        ways = list(ways)
        return {name: [way[name] - whole[name] for way, whole in zip(ways, wholes)] for name in NAMES[:-1]}

    print("\ndisagreement between readings: median / 90% within / worst\n")
    print(f"| | {' | '.join(NAMES[:-1])} | pairs |\n|{' --- |' * (len(NAMES) + 1)}")
    found = [{name: change[name] + errors[name][i] for name in NAMES} for i, (*_, change) in enumerate(pairs)]
    backs = read([(target, reference, None) for reference, target, _ in pairs])
    trips = miss(map(compose, found, backs), [NO_CHANGE] * len(pairs))
    print_row("there and back", trips, len(pairs))
    some = pairs[: (len(pairs) + 3) // 4]
    print_row("to itself", miss(read([(one, one, None) for one, *_ in some]), [NO_CHANGE] * len(some)), len(some))
    less = {name: ((low + none) / 2, (high + none) / 2) for name, (_, low, high, none) in CHANGES.items()}
    views = [draw_views(rng, files, SIZE, less | {"blur": (0, 0)}, 2) for _ in some]
    legs = ([(a, b, None) for a, ((b, _), _) in views], [(b, c, None) for _, ((b, _), (c, _)) in views])
    whole = read([(a, c, None) for a, (_, (c, _)) in views])
    print_row("by way of another", miss(map(compose, *map(read, legs)), whole), len(some))
    agree = (f"{name} {spearmanr(np.abs(trips[name]), np.abs(errors[name])).statistic:.2f}" for name in trips)
    print(f"rank correlation of there and back with the error: {', '.join(agree)}")


def print_flags(readings, errors):
    """Print how often each number's 90% interval holds the truth, and how often readings are flagged."""
    std = torch.cat([reading.std for reading in readings])
    for name, own in errors.items():
        inside = np.mean(np.abs(own) <= 1.645 * std[:, NAMES.index(name)].numpy())
        print(f"    {name}: {inside:.0%} in interval90")
    flags = [f for reading in readings for f in reading.flags]
    shares = (f"{flag} {np.mean([flag in f for f in flags]):.0%}" for flag in ("outside_range", "ambiguous"))
    print(f"    {', '.join(shares)}, unexplained {np.mean(['unexplained' in f for f in flags]):.0%}", flush=True)


if __name__ == "__main__":
    run_script(main, settings)
