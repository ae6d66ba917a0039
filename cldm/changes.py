"""What a change does to a picture: its numbers, how they are drawn, their geometry and light."""

import math
from itertools import repeat

import numpy as np
import torch
from einops import rearrange

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
SMALLEST = [{"zoom": 0.1, "blur": 0.0}.get(name, -math.inf) for name in CHANGES]  # that the formula is asked to draw
NO_CHANGE = {name: none for name, (*_, none) in CHANGES.items()}
MOTIONS = ("rotation", "zoom", "shift x", "shift y")


def are_changes(names, units, absolute=None):
    """absolute: whether a number is no change; None: none is. Returns: [whether it is of CHANGES, by name and unit]."""
    rows = zip(names, units, absolute or repeat(False))
    return [name in CHANGES and CHANGES[name][0] == unit and not own for name, unit, own in rows]


def choose_changes(controls):
    """Returns: {name: (low, high)} for a list of names in CHANGES, or {name: [low, high]}; None: all.

    Raises: InputError for an unknown name or impossible bounds.
    """
    controls = list(CHANGES) if controls is None else controls
    listed = isinstance(controls, (list, tuple, dict)) and len(controls)
    if not listed or any(name not in [*CHANGES] for name in controls):
        raise InputError(f"controls: expected some of {', '.join(CHANGES)}, got {controls}")
    ranges = {name: bounds for name, (_, *bounds, _) in CHANGES.items() if name in controls}
    for name in ranges if isinstance(controls, dict) else []:
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
    """Returns: {name: number} of all CHANGES, those in `ranges` drawn uniformly, zoom in its logarithm."""
    change = dict(NO_CHANGE)
    for name, (low, high) in ranges.items():
        uniform = name != "zoom"
        change[name] = rng.uniform(low, high) if uniform else math.exp(rng.uniform(math.log(low), math.log(high)))
    return change


def similarity(rotation, zoom, shift_x, shift_y):
    """Returns: (3, 3), or (P, 3, 3) for (P,) arrays, from a position, in widths from the middle, to where it moves."""
    angle = np.radians(rotation)
    cos, sin, zero = zoom * np.cos(angle), zoom * np.sin(angle), np.zeros_like(angle)
    matrix = np.stack([cos, sin, shift_x + zero, -sin, cos, shift_y + zero, zero, zero, zero + 1])
    return rearrange(matrix, "(i j) ... -> ... i j", i=3)


def expose(values, stops):
    """Returns: sRGB values from 0 to 1 with their light multiplied by 2^stops, clipped. Source: IEC 61966-2-1."""
    light = torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    light = (light * 2**stops).clamp_max(1)
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def expose_picture(picture, stops):
    """Returns: the RGB PIL picture with its light multiplied by 2^stops."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    return picture.point((255 * expose(levels, stops)).round().int().tolist() * 3)
