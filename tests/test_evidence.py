"""What pictures cannot show is not read with confidence: intervals as wide as what looks the same, and a flag."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cldm.changes import CHANGES, NO_CHANGE, choose_changes, expose, expose_picture, similarity
from cldm.confidence import Reading
from cldm.evidence import change_picture, check_evidence, find_reach, unseen_numbers
from cldm.pairs import draw_pair
from dataForTrain.make_dataset import find_pictures

SIZE = 64
NAMES = list(CHANGES)
RANGES = {name: (low, high) for name, (_, low, high, _) in CHANGES.items()}
LOW, HIGH = zip(*RANGES.values())
CONFIG = SimpleNamespace(control_names=NAMES, control_low=LOW, control_high=HIGH)
WIDTH = torch.tensor([high - low for low, high in RANGES.values()])

# Grey levels by places, in widths from the middle; how they are changed; the numbers that they do not show.
MOTION = {"rotation", "zoom", "shift x", "shift y"}
FEATURELESS = {
    "flat": (lambda x, y: 0 * x + 0.5, dict(rotation=5), MOTION | {"blur"}),
    "dark": (lambda x, y: 0 * x + 0.1, dict(zoom=1.2), MOTION | {"blur"}),
    "disc": (lambda x, y: 0.2 + 0.6 * (np.hypot(x, y) < 0.3), dict(rotation=8), {"rotation"}),
    "rings": (lambda x, y: 0.5 + 0.3 * np.sin(60 * np.hypot(x, y)), dict(rotation=-6), {"rotation"}),
    "ball": (lambda x, y: 0.3 + 0.5 * (np.hypot(x - 0.2, y - 0.1) < 0.1), dict(rotation=5), {"rotation"}),
    "gradient": (lambda x, y: 0.5 + 0.6 * y, {"shift x": 0.06}, {"shift x"}),
    "stripes": (lambda x, y: 0.5 + 0.3 * np.sin(30 * y), {"shift x": 0.05}, {"shift x"}),
    "slanted": (lambda x, y: 0.5 + 0.3 * np.sin(12 * x + 14 * y), {"shift x": 0.02}, {"shift x", "shift y"}),
    "waves": (lambda x, y: 0.5 + 0.3 * np.sin(50 * x) * np.sin(3 * y), {"shift x": 0.05}, {"shift x"}),
}


def draw(shades, **change):
    """Returns: the PIL picture of `shades`, moved as the change says."""
    matrix = np.linalg.inv(similarity(*((NO_CHANGE | change)[name] for name in NAMES[:4])))
    axis = (np.arange(4 * SIZE) + 0.5) / (4 * SIZE) - 0.5
    x, y = np.meshgrid(axis, axis)
    x, y, _ = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y, np.ones_like(x)]))
    levels = (255 * shades(x, y)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB").reduce(4)


@pytest.mark.parametrize("kind", FEATURELESS)
def test_what_a_picture_does_not_show_is_told(kind):
    shades, change, unseen = FEATURELESS[kind]
    read = torch.tensor([(NO_CHANGE | change)[name] for name in NAMES]) - torch.tensor([0, 0, 0, 0, 0, 0.1])
    found = set(unseen_numbers(CONFIG, read, find_reach(draw(shades), draw(shades, **change), RANGES, read)))
    assert unseen <= found and (kind == "gradient" or found == unseen)


def test_photographs_show_what_changed():
    rng, files = random.Random(3), find_pictures("validation")
    pairs = [draw_pair(rng, files, SIZE, choose_changes(None)) for _ in range(12)]
    shares = [find_reach(a, b, RANGES, torch.tensor([change[n] for n in NAMES])) / WIDTH for a, b, change in pairs]
    assert sum((share < 0.3).all().item() for share in shares) >= 10  # two are dark and blurred


def test_clipped_light_may_have_been_brighter():
    white, grey = (draw(lambda x, y, low=low: low + 0.6 * (np.hypot(x - 0.1, y) < 0.3)) for low in (1.0, 0.4))
    dimmed = expose_picture(grey, -0.8)
    dimmed.paste("#fafafa", mask=grey.convert("L").point(lambda level: 255 * (level == 255)))
    read, exposure = torch.tensor(list(NO_CHANGE.values())), NAMES.index("exposure")
    assert find_reach(white, white, RANGES, read)[exposure] >= 1  # stops
    assert find_reach(grey, grey, RANGES, read)[exposure] == 0
    assert find_reach(grey, dimmed, RANGES, read)[exposure] >= 0.7


def test_only_numbers_that_were_sought_are_widened():
    flat = draw(FEATURELESS["flat"][0])
    ranges = {"rotation": (-10, 10), "tilt": (0, 5), "zoom": (0.8, 1.25)}
    far = find_reach(flat, flat, ranges, torch.tensor([1.0, 2.0, 1.0]), known=["zoom"])
    assert torch.equal(
        far, find_reach(flat, flat, ranges, torch.tensor([1.0, 2.0, 1.0]), known=["zoom"], periods={"zoom": 3.0})
    )
    assert far[0] > 10 and far[1:].tolist() == [0, 0]  # degrees


def test_intervals_hold_all_that_looks_the_same():
    covariance = torch.eye(2).mul(0.01).expand(2, 2, 2).double()
    control = torch.tensor([[4.0, 0.0], [4.0, 0.0]]).double()
    scale = torch.zeros(2).double()
    reading = Reading(control, covariance, covariance, None, None, [], [[], ["ambiguous"]], scale, scale)
    shades = lambda x, y: 0.5 + 0.3 * np.sin(9 * x) * np.sin(7 * y + x)  # noqa: E731
    pictures = [(draw(shades), draw(shades)), (draw(FEATURELESS["flat"][0]),) * 2]
    bounds = dict(control_low=[-10, -0.1], control_high=[10, 0.1])
    config = SimpleNamespace(control_names=["rotation", "shift x"], control_units=["degrees", "widths"], **bounds)
    config.periods, config.absolute = [None, None], None
    checked = check_evidence(reading, pictures, config)
    assert checked.flags == [[], ["ambiguous", "no_effect"]] or checked.flags[0] == ["no_effect"]
    low, high = checked.interval90[1, 0].tolist()
    assert low <= -6 and high >= 10 and checked.std[0, 1] == pytest.approx(0.1)
    config.control_units = ["turns", "widths"]  # another rotation, of which nothing is known
    assert check_evidence(reading, pictures, config).reach[1, 0] == 0
    config.control_units, config.absolute = ["degrees", "widths"], [True, False]  # B's own, which is no change
    assert check_evidence(reading, pictures, config).reach[1, 0] == 0


@pytest.mark.parametrize("name", ["shift x", "shift y"])
def test_what_repeats_itself_within_the_range_may_be_there(name):
    tile = np.kron(np.random.default_rng(0).integers(40, 215, (8, 8)), np.ones((4, 4)))  # a quarter of a width
    picture = Image.fromarray(np.tile(tile, (4, 4)).astype(np.uint8)).convert("RGB")
    for most, far in ((0.1, 0.0), (0.2, 0.25)):
        ranges = {name: (-most, most)}
        assert find_reach(picture, picture, ranges, torch.zeros(1)).item() == pytest.approx(far, abs=0.005)


def test_what_looks_the_same_all_round_may_be_anywhere():
    covariance, scale = torch.full((1, 1, 1), 0.01).double(), torch.zeros(1).double()
    circle, names = dict(periods=[360.0], middle=[0.0]), dict(control_names=["rotation"], control_units=["degrees"])
    reading = Reading(
        torch.tensor([[170.0]]).double(), covariance, covariance, *[None] * 3, [[]], scale, scale, **circle
    )
    config = SimpleNamespace(control_low=[-180], control_high=[180], periods=[360.0], absolute=None, **names)
    for kind, flags in ("disc", ["ambiguous", "no_effect"]), ("stripes", []):
        picture = draw(FEATURELESS[kind][0]).convert("RGB")
        checked = check_evidence(reading, [(picture.rotate(170, Image.Resampling.BICUBIC), picture)], config)
        assert sorted(checked.flags[0]) == flags and checked.reach[0, 0] <= 180
    whole = check_evidence(reading, [(draw(FEATURELESS["disc"][0]),) * 2], config)
    assert whole.interval90[0].tolist() == [[-180, 180]]


def test_changes_are_those_of_the_training_set():
    """Rotation, then blur, then exposure, in the order and the units of cldm.pairs."""
    levels = torch.linspace(0, 1, 32).expand(2, 32, 32)
    change = torch.tensor([[0.0, 1.0, 0.25, 0.0, 1.0, 0.0]])
    (changed,), (shown,), _ = change_picture(levels, change)
    assert not shown[:, :8].any() and shown[:, 8:].all()
    expected = expose(levels[0, 0, :24], 1.0).tolist()
    assert changed[5, 8:].tolist() == pytest.approx(expected, abs=0.02)
    spot = torch.zeros(2, 33, 33)
    spot[:, 16, 26] = 1
    turned = change_picture(spot, torch.tensor([[90.0, 1, 0, 0, 0, 0]]))[0][0]
    assert divmod(turned.argmax().item(), 33) == (6, 16)  # counterclockwise, from the right to the top
    blurred = change_picture(spot, torch.tensor([[0, 1, 0, 0, 0, 2.0]]))[0][0]
    across = blurred[16, 26] / blurred[16, 24]
    light = [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in (blurred[16, 26], blurred[16, 24])]
    assert across == pytest.approx(math.exp(0.5), rel=0.05) and light[0] > light[1]


def test_an_enlarged_picture_shows_no_blur_below_its_own_pixels():
    covariance, scale = torch.full((1, 1, 1), 0.01).double(), torch.zeros(1).double()
    reading = Reading(torch.tensor([[0.3]]).double(), covariance, covariance, *[None] * 3, [[]], scale, scale)
    config = SimpleNamespace(control_names=["blur"], control_units=["pixels"], control_low=[0], control_high=[2])
    config.periods, config.absolute = [None], None
    sharp = draw(lambda x, y: 0.5 + 0.5 * np.sign(np.sin(40 * x) * np.sin(40 * y)))
    for side, flags in ((SIZE, []), (SIZE // 8, ["no_effect"])):
        checked = check_evidence(reading, [(sharp, sharp)], config, sides=[side])
        assert checked.flags == [flags] and (checked.reach[0, 0] >= 4) == (side < SIZE)
