"""What reads a meter for meter.py: a control, a regressor and image processing, each with error bars.

Each is a function(settings, folder, minutes) -> function(rows, name) -> Readings. folder: a Path, where folder/data is
as make_meter.py makes it. minutes: {method: of training}, which is added to. rows: as read_lines has them.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18

import tutorial_train
from benchmarks.common import half_widths, read_lines, read_targets, write_lines
from benchmarks.regressors import augment, train_regressor
from cldm.calibration import nine_in_ten
from cldm.dataset import TRAINING_FILE, split_rows
from cldm.model import MODEL_YAML, read_model_yaml
from cldm.results import digest_model
from dataForTrain.make_meter import PERIOD, shortest
from ldm.files import find_path, write_whole
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor
from ldm.settings import InputError, override

MAIN = 60  # labelled pictures of every dial, for which a control may be given
SIZE, BATCH = 128, 12  # pixels of what the regressor sees; pictures read together
DIAL = 0.42  # widths: radius in which image processing looks for a needle
HARMONIC = 15  # labelled pictures of a dial from which image processing learns its eccentricity too


@dataclass
class Readings:
    """What a method read from n pictures."""

    found: list  # n values
    half: list  # n halves of 90% intervals
    flagged: list  # n bool
    seconds: float  # a picture


def column(rows, key):
    """Returns: (n,) of the numbers that rows have; NaN where they have none."""
    return np.array([row.get(key, math.nan) for row in rows])


def labelled(data):
    """Returns: the rows of a dataset that a control learns from, and those that its training sets aside."""
    rows = [row | {"target": str(data / row["target"])} for row in read_lines(data / TRAINING_FILE)]
    parts = [{str(row.target) for row in part} for part in split_rows(data)]
    return tuple([row for row in rows if row["target"] in part] for part in parts)


def ours(s, folder, minutes):
    """A control, trained unless there is one, and read as invert.py does."""
    given = s.model_path and folder.name == str(MAIN)
    model = find_path(s.model_path) if given else folder / "control"
    config = model / "config.json"
    trained = config.exists() and json.loads(config.read_text()).get("error_scale")
    if given and not trained:
        raise InputError(f"model_path {s.model_path}: expected a control that was trained to its end, with error bars")
    if not trained:
        began = time.perf_counter()
        try:
            arguments = [f"data_root={folder / 'data'}", f"out_dir={model}"]
            tutorial_train.main(override(tutorial_train.settings, arguments))
        finally:  # a training that was stopped goes on
            minutes["ours"] = minutes.get("ours", 0) + (time.perf_counter() - began) / 60

    def read(rows, name):
        write_lines(folder / f"{name}.json", rows)
        about = repr((digest_model(model, read_model_yaml(model / MODEL_YAML).base), rows))
        out = folder / f"{name}_readings_{hashlib.sha256(about.encode()).hexdigest()[:12]}"
        results = read_targets(model, folder / f"{name}.json", out)
        half = half_widths(results, [PERIOD])[:, 0]
        flagged = [bool(result["flags"]) for result in results]
        return Readings(column(results, "control").tolist(), half.tolist(), flagged, column(results, "seconds").mean())

    return read


class DialNetwork(nn.Module):
    """A ResNet-18 from a picture to the sine and cosine of a value, with a last layer for each of several dials."""

    def __init__(self, dials):
        super().__init__()
        self.whole = resnet18(num_classes=2 * dials)

    def forward(self, pictures, dial):
        """pictures: (B, 3, H, W). dial: (B,) int. Returns: (B, 2)."""
        return self.whole(pictures).unflatten(1, (-1, 2))[torch.arange(len(dial)), dial]


def resnet(s, folder, minutes):
    """A DialNetwork, trained on what the control learns from, with bars by what its training sets aside."""
    train, validation = labelled(folder / "data")
    dials = sorted({row["prompt"] for row in train})
    about = repr((s.regressor_minutes, [(row["source"], row["prompt"], row["target"]) for row in train]))
    file = folder / f"resnet_{hashlib.sha256(about.encode()).hexdigest()[:12]}.safetensors"
    network = DialNetwork(len(dials))

    def load(rows):
        pictures = [fit_picture(load_picture(row["target"]), SIZE) for row in rows]
        return pictures_to_tensor(pictures), torch.tensor([dials.index(row["prompt"]) for row in rows])

    def draw_batch(step):
        chosen = torch.randint(len(train), (32,))
        changed = augment(pictures[chosen]) + 0.2 * torch.rand(32, 3, 1, 1) - 0.1  # other white balance
        return (changed, dial[chosen]), torch.stack([angles[chosen].sin(), angles[chosen].cos()], 1)

    if not file.exists():
        torch.manual_seed(0)
        pictures, dial = load(train)
        angles = 2 * math.pi / PERIOD * torch.tensor(column(train, "source"), dtype=torch.float32)
        train_regressor(network, s.regressor_minutes, draw_batch, nn.functional.mse_loss)
        write_whole(file, partial(save_file, network.state_dict()))
    minutes["resnet"] = s.regressor_minutes
    network.load_state_dict(load_file(file))
    network.eval()

    @torch.no_grad()
    def values(rows):
        sine, cosine = network(*load(rows)).T
        return (torch.atan2(sine, cosine) * PERIOD / (2 * math.pi)).numpy() % PERIOD

    return with_bars(values, validation)


def processing(s, folder, minutes):
    """Image processing: the direction of what is red, and what it means, fitted to what the control learns from.

    Of a dial that has few labelled pictures, only how it is mounted; of others its eccentricity too, as a harmonic.
    """
    train, validation = labelled(folder / "data")
    fits = {}

    def terms(angle, count):
        return np.stack([np.ones_like(angle), np.sin(angle), np.cos(angle)][:count], -1)

    def measure(rows):
        return np.array([find_needle(load_picture(row["target"])) for row in rows])

    for dial in {row["prompt"] for row in train}:
        own = [row for row in train if row["prompt"] == dial]
        angle, count = measure(own), 3 if len(own) >= HARMONIC else 1
        missing = 2 * math.pi / PERIOD * column(own, "source") - angle
        mounting = np.angle(np.exp(1j * missing).mean())
        rest = np.angle(np.exp(1j * (missing - mounting)))
        fits[dial] = mounting, np.linalg.lstsq(terms(angle, count), rest)[0]

    def values(rows):
        found = []
        for row, angle in zip(rows, measure(rows)):
            mounting, weights = fits[row["prompt"]]
            found.append(angle + mounting + terms(angle, len(weights)) @ weights)
        return PERIOD / (2 * math.pi) * np.array(found) % PERIOD

    return with_bars(values, validation)


def find_needle(picture):
    """Returns: the angle, clockwise from the top, of the long side of what is red in a picture's middle."""
    side = min(picture.size)
    red, green, blue = np.moveaxis(np.asarray(fit_picture(picture, side), float), 2, 0)
    redness = red - np.maximum(green, blue)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    dial = np.hypot(x, y) < DIAL * side
    needle = dial & (redness >= np.percentile(redness[dial], 95) / 2)
    place = np.stack([x[needle], y[needle]])
    place = place - place.mean(1, keepdims=True)
    axis = np.linalg.eigh(place @ place.T)[1][:, 1]
    right, down = axis * np.sign(((axis @ place) ** 3).sum())
    return math.atan2(right, -down)


def with_bars(values, validation):
    """Give a method error bars by split conformal prediction: what nine in ten of its absolute errors stay below.

    values: function(rows) -> (n,). validation: rows that it has not learned from.
    Returns: function(rows, name) -> Readings, none of them flagged. Source: Angelopoulos & Bates 2021, eq. 1.
    """
    errors = np.abs(shortest(values(validation) - column(validation, "source")))
    half = nine_in_ten(torch.from_numpy(errors)).item()

    def read(rows, name):
        began = time.perf_counter()
        found = np.concatenate([values(rows[first : first + BATCH]) for first in range(0, len(rows), BATCH)])
        seconds = (time.perf_counter() - began) / len(rows)
        return Readings(found.tolist(), [half] * len(rows), [False] * len(rows), seconds)

    return read


METHODS = {"ours": ours, "resnet": resnet, "processing": processing}
