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

AS_GOOD = 0.2  # of the logarithm of the mean squared difference: a fit worse by less is as good
GREY_LEVEL = 2 / 255  # differences of that size are no evidence, but resampling
REACH = 0.1, 0.2, 0.35, 0.5, 0.7, 1.0  # how far from what was read is looked, as shares of a number's range
NOT_SHOWN = 0.3  # of a range: a number that may lie further away is not shown at all
LEAST = {"blur": 0.75}  # of numbers whose lesser changes a mean square hardly tells apart
BEYOND = 0.35  # of a number's range, on either side, where others may lie
NEARLY, IMPROVED, STEPS = 3.0, 24, 2  # a fit worse by less is improved, so many at the most, by so many steps
SMALL = 0.01  # of a range, for derivatives
REPETITIONS, APART = 6, 3  # places where a picture repeats itself that are looked at; pixels between them
LEAST_SHARED = 0.25  # of B that A must show after the change, for a comparison
CHUNK = 64  # changed pictures made at once


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
    errors = [torch.zeros(0)]
    for some in change.split(CHUNK) if len(change) else []:
        changed, shown = change_picture(reference, some)
        squares = ((changed - target).square() * shown).sum((1, 2)) / shown.sum((1, 2)).clamp_min(1)
        errors.append(squares.masked_fill(shown.float().mean((1, 2)) < LEAST_SHARED, torch.inf))
    return (torch.cat(errors) + GREY_LEVEL**2).log()


def check_evidence(reading, pictures, config, known=()):
    """Widen the intervals of a Reading to what the pictures themselves can tell, and flag it.

    pictures: B pairs of PIL pictures, target and reference. config: of the control. known: names of numbers given.
    Returns: a Reading, `reach` and the flag "no_effect" added.
    """
    ranges = dict(zip(config.control_names, zip(config.control_low, config.control_high)))
    reach = torch.zeros_like(reading.control)
    for i, (target, reference) in enumerate(pictures):
        reach[i] = as_likely(reference, target, ranges, reading.control[i], known)
    width = reach.new_tensor(config.control_high) - reach.new_tensor(config.control_low)
    flags = [own + ["no_effect"] * bool(far.any()) for own, far in zip(reading.flags, reach > NOT_SHOWN * width)]
    return replace(reading, reach=reach, flags=flags)


def as_likely(reference, target, ranges, control, known=()):
    """How far from a change that was read lie others that explain a pair of pictures as well.

    Tried are places along every number, along the combinations of numbers that A's own pixels feel least, and where the
    picture repeats itself; those that fit nearly as well are improved by Gauss-Newton steps.
    reference, target: PIL pictures of one size. ranges: {name: (low, high)} of the numbers of `control` (d,), which was
    read. known: names of those that were given.
    Returns: (d,) the largest distances, in the numbers' units; 0 if none is far away, and for names not in CHANGES.
    """
    first, second = (torch.from_numpy(np.asarray(p.convert("L"), np.float32) / 255) for p in (reference, target))
    read, unit = dict(zip(ranges, control.tolist())), torch.eye(len(CHANGES), dtype=torch.float64)
    at = torch.tensor([read.get(name, none) for name, none in NO_CHANGE.items()], dtype=torch.float64)
    at = at.clamp(min=torch.tensor([-math.inf, 0.1, -math.inf, -math.inf, -math.inf, 0]))  # zoom is a ratio
    free = {name: bounds for name, bounds in ranges.items() if name not in known}
    bounds = [free.get(name, (none, none)) for name, none in NO_CHANGE.items()]
    low, high = torch.tensor(bounds, dtype=torch.float64).T
    width = high - low
    _, jacobian = linearize(first, second, at[None], width)
    directions = torch.cat([unit, torch.linalg.eigh(jacobian[0] @ jacobian[0].T).eigenvectors.T])
    directions = directions / directions.abs().amax(1, keepdim=True)
    reach = torch.tensor([sign * share for share in REACH for sign in (-1, 1)], dtype=torch.float64)
    lines = at + rearrange(reach[:, None, None] * directions * width, "r k d -> (r k) d")
    others = torch.cat([lines, repetitions(first, second, at)])
    bounds = torch.minimum(low, at) - BEYOND * width, torch.maximum(high, at) + BEYOND * width
    bounds[0][-1].clamp_(min=0)  # blur

    def fit(changes):
        changes = torch.where(width > 0, changes, at)
        changes = changes[((changes >= bounds[0]) & (changes <= bounds[1])).all(1)]
        return changes, misfit(first, second, changes) - misfit(first, second, at[None])

    others, worse = fit(others)
    near = others[worse.argsort()[(worse.sort().values > AS_GOOD) & (worse.sort().values < NEARLY)][:IMPROVED]]
    for _ in range(STEPS if len(near) else 0):
        residuals, jacobian = linearize(first, second, near, width)
        curvature = jacobian @ jacobian.mT
        damping = 1e-3 * torch.diag_embed(curvature.diagonal(dim1=1, dim2=2)) + 1e-6 * torch.eye(len(at))
        near = near + width * torch.linalg.solve(curvature + damping, torch.einsum("pdn,pn->pd", jacobian, residuals))
        near = near.clamp(*bounds)
    others, worse = (torch.cat(parts) for parts in zip((others, worse), fit(near)))
    distances, least = (others - at).abs(), torch.tensor([LEAST.get(name, REACH[0]) for name in CHANGES])
    away = ((distances >= 0.99 * least * width) & (width > 0)).any(1)
    far = dict(zip(CHANGES, (distances * ((worse <= AS_GOOD) & away)[:, None]).amax(0).tolist()))
    return torch.tensor([far.get(name, 0.0) for name in ranges], dtype=torch.float64)


def linearize(reference, target, change, width):
    """change: (P, 6). width: (6,), units of the numbers.

    Returns: what a target has that the changed reference has not, (P, H H); derivatives of the latter, (P, 6, H H).
    """
    small = SMALL * torch.cat([torch.zeros(1, len(width)), torch.diag(width)])
    steps = rearrange(change[:, None] + small, "p k d -> (p k) d")
    changed, shown = (rearrange(p, "(p k) h w -> p k (h w)", k=len(small)) for p in change_picture(reference, steps))
    shown = shown[:, :1]
    residuals, jacobian = (target.flatten() - changed[:, :1]) * shown, (changed[:, 1:] - changed[:, :1]) * shown / SMALL
    return residuals[:, 0].double(), jacobian.double()


def repetitions(reference, target, at):
    """Returns: (REPETITIONS, 6) changes that lie from `at` (6,) by how far a picture repeats itself, to a pixel."""
    size = len(target)
    (changed,), (shown,) = change_picture(reference, at[None])
    spectra = (torch.fft.rfft2((part - part.mean()) * shown) for part in (target, changed))
    similar = torch.fft.irfft2(next(spectra) * next(spectra).conj(), s=target.shape)  # for all shifts, circular
    near = F.max_pool2d(similar[None], 2 * APART + 1, 1, APART)[0]
    peaks = similar.masked_fill(similar < near, -torch.inf)
    peaks[:APART, :APART] = peaks[-APART:, :APART] = peaks[:APART, -APART:] = peaks[-APART:, -APART:] = -torch.inf
    within = torch.fft.fftfreq(size).abs() <= (1 + BEYOND) * CHANGES["shift x"][2]
    places = peaks.masked_fill(~(within[:, None] & within), -torch.inf).flatten().topk(REPETITIONS).indices
    others = at.repeat(REPETITIONS, 1)
    others[:, 2:4] += torch.fft.fftfreq(size, dtype=torch.float64)[torch.stack([places % size, places // size], 1)]
    return others
