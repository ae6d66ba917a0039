"""What two pictures can tell of the change between them, by what the change does to pixels; no model is asked.

A model's own derivative is no evidence: even on a blank wall it prefers one shift to another. Here picture A is changed
by numbers away from those that were read, and compared with picture B. Numbers at which it fits B as well are as likely
as those that were read, and the interval must hold them.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange, repeat
from torch.nn import functional as F

from cldm.pairs import CHANGES, NO_CHANGE

AS_GOOD = 0.03  # of the logarithm of the mean squared difference: a fit worse by less is as good
GREY_LEVEL = 1 / 255  # differences of that size are no evidence
REACH = 0.35, 0.5, 0.7, 1.0  # how far from what was read is looked, as shares of a number's range
BLUR_REACH = 0.75  # of blur, whose lesser changes a mean square hardly tells apart
REPETITIONS, REFINED = (
    6,
    3,
)  # places where a picture may repeat itself that are looked at; steps of Gauss-Newton to each
APART = 3  # pixels between them
BEYOND = 0.35  # of a number's range, on either side, where others may lie
LEAST_SHARED = 0.25  # of B that A must show after the change, for a comparison
CHUNK = 64  # changed pictures made at once
SHIFTS = slice(2, 4)  # of the six numbers


def change_picture(picture, change):
    """Apply changes to a grey picture, as cldm.pairs does to photographs.

    picture: (H, H), from 0 to 1. change: (P, 6), the numbers of CHANGES, in its order.
    Returns: (P, H, H) changed pictures; (P, H, H) bool, what of them the picture shows.
    """
    rotation, zoom, shift_x, shift_y, exposure, blur = change.double().T
    size, angle = len(picture), rotation.deg2rad()
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = rearrange(torch.stack([cos, sin, -sin, cos]), "(i j) p -> p i j", i=2)  # as pairs.similarity
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5  # widths from the middle
    there = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (H, H, 2), x and y
    moved = there - rearrange(torch.stack([shift_x, shift_y], 1), "p i -> p 1 1 i")
    here = torch.einsum("pij,phwj->phwi", torch.linalg.inv(linear), moved).float()
    pictures = repeat(picture, "h w -> p 1 h w", p=len(change))
    changed = F.grid_sample(pictures, 2 * here, padding_mode="border", align_corners=False)[:, 0]
    frequencies = torch.fft.fftfreq(size)[:, None].square() + torch.fft.rfftfreq(size).square()
    gaussian = torch.exp(-2 * (math.pi * blur.float()[:, None, None]).square() * frequencies)
    changed = torch.fft.irfft2(torch.fft.rfft2(changed) * gaussian, s=(size, size)).clamp(0, 1)
    light = torch.where(changed <= 0.04045, changed / 12.92, ((changed + 0.055) / 1.055) ** 2.4)
    light = (light * 2 ** exposure.float()[:, None, None]).clamp_max(1)
    changed = torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return changed, (here.abs() <= 0.5).all(-1)


def misfit(reference, target, change):
    """Returns: (P,) the logarithm of the mean squared difference of a changed reference (H, H) and a target (H, H)."""
    errors = []
    for some in change.split(CHUNK):
        changed, shown = change_picture(reference, some)
        squares = ((changed - target).square() * shown).sum((1, 2)) / shown.sum((1, 2)).clamp_min(1)
        errors.append(squares.masked_fill(shown.float().mean((1, 2)) < LEAST_SHARED, torch.inf))
    return (torch.cat(errors) + GREY_LEVEL**2).log()


def check_evidence(reading, pictures, names, known=()):
    """Widen the intervals of a Reading to what the pictures themselves can tell, and flag it.

    pictures: B pairs of PIL pictures, target and reference. names: of the d numbers. known: of those that were given.
    Returns: a Reading, `reach` and the flag "no_effect" added.
    """
    sought = [name for name in names if name not in known]
    reach = torch.zeros_like(reading.control)
    for i, (target, reference) in enumerate(pictures):
        reach[i] = as_likely(reference, target, names, reading.control[i], sought)
    flags = [own + ["no_effect"] * bool(far.any()) for own, far in zip(reading.flags, reach)]
    return replace(reading, reach=reach, flags=flags)


def as_likely(reference, target, names, control, sought=None):
    """How far from a change that was read lie others that explain a pair of pictures as well.

    reference, target: PIL pictures of one size. names: what the numbers of `control` (d,), which was read, are called.
    sought: those of `names` that were not known; None: all.
    Returns: (d,) distances in the numbers' units, 0 where there is nothing far away, and for names not in CHANGES.
    """
    first, second = (torch.from_numpy(np.asarray(p.convert("L"), np.float32) / 255) for p in (reference, target))
    read, unit = dict(zip(names, control.tolist())), torch.eye(len(CHANGES), dtype=torch.float64)
    at = torch.tensor([read.get(name, none) for name, none in NO_CHANGE.items()], dtype=torch.float64)
    low, high = torch.tensor([bounds for _, *bounds, _ in CHANGES.values()], dtype=torch.float64).T
    width = (high - low) * torch.tensor([name in (names if sought is None else sought) for name in CHANGES])
    low, high = torch.minimum(low, at), torch.maximum(high, at)
    changed, shown = change_picture(first, at + 0.02 * width * torch.cat([unit, -unit]))
    felt = rearrange(changed[: len(at)] - changed[len(at) :], "d h w -> d (h w)") * rearrange(
        shown.all(0), "h w -> (h w)"
    )
    directions = torch.cat([unit, torch.linalg.eigh((felt @ felt.T).double()).eigenvectors.T])
    directions = directions / directions.abs().amax(1, keepdim=True)
    reach = torch.tensor([sign * share for share in REACH for sign in (-1, 1)], dtype=torch.float64)
    lines = at + rearrange(reach[:, None, None] * directions * width, "r k d -> (r k) d")
    others = torch.cat([lines, about_a_spot(second, at, reach[:, None] * width), repetitions(first, second, at)])
    others = torch.where(width > 0, others, at)
    others[:, -1].clamp_(min=0)  # blur
    others = others[((others >= low - BEYOND * width) & (others <= high + BEYOND * width)).all(1)]
    as_good = misfit(first, second, others) - misfit(first, second, at[None]) <= AS_GOOD
    distances = ((others - at).abs() * as_good[:, None]).amax(0)
    least = torch.tensor([BLUR_REACH if name == "blur" else REACH[0] for name in CHANGES])
    far = dict(zip(CHANGES, (distances * (distances >= 0.99 * least * width)).tolist()))
    return torch.tensor([far.get(name, 0.0) for name in names], dtype=torch.float64)


def about_a_spot(target, at, steps):
    """Rotations and zooms about what there is to see in a picture: a round thing is where it was after them.

    at: (6,), a change. steps: (P, 6), of which the first two numbers are taken, one by one. Returns: (2 P, 6) changes.
    """
    dy, dx = torch.gradient(target)
    energy = (dx.square() + dy.square()).double() + 1e-12
    axis = (torch.arange(len(target)) + 0.5) / len(target) - 0.5
    spot = torch.stack([(energy.sum(0) * axis).sum(), (energy.sum(1) * axis).sum()]) / energy.sum()
    others = at.repeat(2, len(steps), 1)
    others[0, :, 0] += steps[:, 0]
    others[1, :, 1] *= (steps[:, 1]).exp()
    for change in others.flatten(0, 1):
        ratio, angle = change[1] / at[1], math.radians(change[0] - at[0])
        cos, sin = ratio * math.cos(angle), ratio * math.sin(angle)
        turn = torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])])
        change[SHIFTS] = spot + turn @ (at[SHIFTS] - spot)
    return others.flatten(0, 1)


def repetitions(reference, target, at):
    """Find where a picture repeats itself.

    at: (6,), a change. Returns: (REPETITIONS, 6) changes by other shifts that may fit about as well.
    """
    size = len(target)
    (changed,), (shown,) = change_picture(reference, at[None])
    spectra = (torch.fft.rfft2((part - part.mean()) * shown) for part in (target, changed))
    similar = torch.fft.irfft2(
        next(spectra) * next(spectra).conj(), s=target.shape
    )  # by how far B lies from A, circular
    near = F.max_pool2d(similar[None], 2 * APART + 1, 1, APART)[0]
    peaks = similar.masked_fill(similar < near, -torch.inf)
    peaks[:APART, :APART] = peaks[-APART:, :APART] = peaks[:APART, -APART:] = peaks[-APART:, -APART:] = -torch.inf
    within = torch.fft.fftfreq(size).abs() <= 1.35 * CHANGES["shift x"][2]
    peaks = peaks.masked_fill(~(within[:, None] & within), -torch.inf)
    places = peaks.flatten().topk(REPETITIONS).indices
    found = at.repeat(REPETITIONS, 1)
    found[:, SHIFTS] += torch.fft.fftfreq(size, dtype=torch.float64)[torch.stack([places % size, places // size], 1)]
    for _ in range(REFINED):
        steps = torch.tensor([[0, 0], [1, 0], [0, 1]]) / size
        tried = repeat(found, "p d -> (p k) d", k=3).clone()
        tried[:, SHIFTS] += steps.repeat(REPETITIONS, 1)
        changed, shown = change_picture(reference, tried)
        changed, shown = (rearrange(part, "(p k) h w -> p k (h w)", k=3) for part in (changed, shown))
        residuals = ((target.flatten() - changed[:, 0]) * shown[:, 0]).double()
        jacobian = ((changed[:, 1:] - changed[:, :1]) * shown[:, :1]).double()
        curvature = jacobian @ jacobian.mT + 1e-6 * torch.eye(2)
        found[:, SHIFTS] += (
            torch.linalg.solve(curvature, (jacobian @ residuals[:, :, None])[:, :, 0]).clamp(-2, 2) / size
        )
    return found
