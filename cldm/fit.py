"""The last digits of a change that a formula describes: least squares of pixels, from where the model read it.

What the model reads of rotation, zoom, shift, exposure and blur is as good as its latents and its training. From there
the formula itself, cldm.changes, goes on with every pixel of both pictures. What it finds counts as a second opinion,
by its variance, as calibration judged it.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import least_squares
from torch.nn import functional as F

from cldm.changes import CHANGES, NO_CHANGE, SMALLEST, are_changes, expose, similarity
from cldm.confidence import is_outside, widen
from cldm.evidence import BEYOND, CLIPPED, LEAST_SHARED
from ldm.pictures import pictures_to_tensor

NAMES = list(CHANGES)
LOW, HIGH = np.array([bounds for _, *bounds, _ in CHANGES.values()]).T
WIDTHS = HIGH - LOW
FIRST_BLUR = 0.3  # pixels from which a blur is fitted at least, since a fit's derivative at 0 is 0
DIFFERENCE, SOFT = 1e-3, 0.02  # shares of the ranges, for derivatives; scale of soft_l1, white being 1
STEPS, SETTLED = 30, 1e-5  # steps at most; share of the loss below which a step no longer lowers it
GREY_LEVEL = 1 / 255  # white being 1; pixels are rounded to it
NEAR = 4.0, 0.1  # a fit found another place if it moved farther than so many standard errors and share of the range


def has_formula(config):
    """Returns: whether all numbers of a control's config are changes that the formula knows."""
    return config.hint == "reference" and all(are_changes(config.control_names, config.control_units, config.absolute))


def find_bounds(config=None):
    """Returns: (2, 6), between which fits look: CHANGES' ranges or, where they are wider, a control's, and BEYOND."""
    ends = np.array([LOW, HIGH])
    if config:
        own = [NAMES.index(name) for name in config.control_names]
        theirs = np.array([config.control_low, config.control_high])
        ends[:, own] = np.minimum(ends[0, own], theirs[0]), np.maximum(ends[1, own], theirs[1])
    low, high = ends + BEYOND * (ends[1] - ends[0]) * [[-1], [1]]
    return np.array([np.maximum(low, SMALLEST), high])


def refine_reading(reading, pictures, config, known=()):
    """Take into account what fits find, as far as calibration trusts them, and judge by that what is outside the range.

    As fit_pictures. Returns: a Reading.
    """
    if config.fit_scale is None or {*config.control_names} <= {*known}:
        return reading
    control, std = fit_pictures(reading, pictures, config, known)
    std = widen(std, config.fit_scale, config.fit_floor)
    refined, flag = reading.with_opinion(control, std, config.fit_correlation or 0), "outside_range"
    outside = is_outside(config, refined.control, refined.std).tolist()
    flags = [[flag] * out + [own for own in flags if own != flag] for out, flags in zip(outside, reading.flags)]
    return replace(refined, flags=flags)


def fit_pictures(reading, pictures, config, known=()):
    """Fit changes to pictures, from where a Reading says that they are.

    pictures: B pairs of PIL pictures, target and reference. config: of the control, which has_formula.
    known: names of given numbers.
    Returns: controls and their standard errors, (B, d) each; infinite where a fit found nothing, or another place.
    """
    control, std = reading.control.clone(), torch.full_like(reading.control, torch.inf)
    sought = [name for name in config.control_names if name not in known]
    own, theirs = [config.control_names.index(name) for name in sought], [NAMES.index(name) for name in sought]
    bounds = find_bounds(config)
    for i, (target, reference) in enumerate(pictures):
        start = NO_CHANGE | dict(zip(config.control_names, reading.control[i].tolist()))
        if "blur" in sought:
            start["blur"] = max(start["blur"], FIRST_BLUR)
        change, loss, covariance = Fit(reference, target).solve(start, sought, bounds)
        found = reading.control.new_tensor([change[name] for name in sought])
        errors = reading.control.new_tensor(covariance.diagonal()[theirs]).sqrt()
        most = torch.maximum(NEAR[0] * reading.std[i, own], NEAR[1] * errors.new_tensor(WIDTHS[theirs]))
        if math.isfinite(loss) and ((found - reading.control[i, own]).abs() <= most).all():
            control[i, own], std[i, own] = found, errors
    return control, std


class Fit:
    """Least squares of a target's pixels, all three colours, in the numbers of a change from the reference.

    reference, target: PIL pictures, square and of one size. What the reference does not show does not count; nor does a
    target that is brighter than light clipped in the reference. The loss is soft_l1.
    """

    def __init__(self, reference, target):
        a, b = (pictures_to_tensor([picture])[0] / 2 + 0.5 for picture in (reference, target))
        clipped = (a.amax(0, keepdim=True) >= CLIPPED[0] / 255).float()
        self.reference, self.target, size = torch.cat([a, clipped])[None], b, target.width
        axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5  # widths from the middle
        self.there = torch.stack([*torch.meshgrid(axis, axis, indexing="xy"), torch.ones(size, size)])
        self.squared = torch.fft.fftfreq(size)[:, None].square() + torch.fft.rfftfreq(size).square()

    def residuals(self, changes):
        """changes: (P, 6), the numbers of CHANGES in their order. Returns: residuals and whether they count, (P, n)."""
        *motion, exposure, blur = changes.T
        exposure, blur = (torch.from_numpy(part).float()[:, None, None, None] for part in (exposure, blur))
        back = torch.from_numpy(np.linalg.inv(similarity(*motion))[:, :2])
        here = torch.einsum("pij,jhw->phwi", back, self.there).float()
        pictures = self.reference.expand(len(changes), -1, -1, -1)
        moved = F.grid_sample(pictures, 2 * here, "bicubic", "border", align_corners=False)
        gaussian = torch.exp(-2 * (math.pi * blur).square() * self.squared)
        moved = torch.fft.irfft2(torch.fft.rfft2(moved) * gaussian, s=self.target.shape[1:])
        residuals = expose(moved[:, :3].clamp(0, 1), exposure) - self.target
        counts = (here.abs() <= 0.5).all(-1)[:, None] & ((moved[:, 3:] < CLIPPED[1]) | (residuals > 0))
        return residuals.flatten(1).double().numpy(), counts.flatten(1).numpy()

    def solve(self, start, names, bounds=None):
        """Go on from a change, {name: number} of all six, with some of its numbers.

        bounds: as find_bounds has them; None: its own.
        Returns: the change; its loss, the mean over what counts, infinite if it ends on a bound that it might have
        crossed; the covariance of its errors, (6, 6), in which what the pixels do not show is as unsure as its range is
        wide.
        """
        which = [NAMES.index(name) for name in names]
        at, width = np.array([start[name] for name in NAMES], float), WIDTHS[which]
        low, high = (find_bounds() if bounds is None else bounds)[:, which]

        def render(numbers, steps):
            changes = np.tile(at, (len(steps), 1))
            changes[:, which] = numbers + DIFFERENCE * width * steps
            return self.residuals(changes)

        def value(numbers):
            residuals, counts = render(numbers, np.zeros((1, len(which))))
            return residuals[0] * counts[0]

        def derivative(numbers):
            residuals, counts = render(numbers, np.eye(1 + len(which), len(which), -1))
            return ((residuals[1:] - residuals[0]) * counts[0]).T / (DIFFERENCE * width)

        middle = np.clip(at[which], low + 1e-6 * width, high - 1e-6 * width)
        options = dict(x_scale=width, loss="soft_l1", f_scale=SOFT, max_nfev=STEPS, ftol=SETTLED)
        found = least_squares(value, middle, derivative, (low, high), **options)
        counted = render(found.x, np.zeros((1, len(which))))[1].sum()
        jacobian, variance = found.jac * width, max(2 * found.cost / max(counted, 1), GREY_LEVEL**2 / 12)
        information = jacobian.T @ jacobian / variance + np.eye(len(which))
        covariance = np.zeros((len(NAMES), len(NAMES)))
        covariance[np.ix_(which, which)] = np.linalg.inv(information) * width[:, None] * width
        stuck = ((found.active_mask != 0) & (found.x > np.array(SMALLEST)[which] + 1e-3 * width)).any()
        loss = found.cost / counted if counted > LEAST_SHARED * len(found.fun) and not stuck else math.inf
        return dict(zip(NAMES, at.tolist())) | dict(zip(names, found.x.tolist())), loss, covariance
