"""Read controls from pictures, without a start: probe the trained range, refine its valleys, say how sure it is."""

import math
import time
from dataclasses import replace

import torch
from einops import rearrange, repeat

from cldm.confidence import NOTHING, Reading, is_ambiguous, is_outside, raise_flags, standard_errors, widen
from cldm.denoising import DenoisingObjective
from cldm.evidence import BEYOND
from cldm.hints import wrap
from cldm.proposal import Proposal
from cldm.reference import MATCHES, find_moving, match_reference
from cldm.solvers import SAME, distinct_solutions, keep_rivals, levenberg_marquardt
from ldm.settings import InputError

PROBES = 8  # points probed for one number unless calibration asks for more; for several numbers SEVERAL times as many
SEVERAL = 6
PROFILE_POINTS, PROFILE_DRAWS = 33, 4  # of a profile of the loss over a number's range; half the points for several


@torch.no_grad()
def read_controls(model, target, known=None, draws=8, seed=0, start=None):
    """Find the controls that explain pictures best, in the sense of least squares.

    With a reference, Levenberg-Marquardt then goes on with a Cauchy loss at the scale of the loss reached, since the
    target may show what the reference does not. A control with a Proposal starts from what that says, and where no
    number moves the reference, takes a single step. Once calibrated, both count, by their covariance; until then the
    Proposal.
    model: ControlLDM, trained. target: Target of B pictures. known: {name: number} of controls that are given.
    draws: of noise, in pairs. start: (B, S, d), S places to start from; None: what a Proposal says, or the
    valleys that probes find.
    Returns: Reading. Raises: InputError if the control was never trained.
    """
    began, config = time.perf_counter(), model.control_net.config
    bounds = search_bounds(config, known).to(target.latents.device)
    free = bounds[0] < bounds[1]
    width = (bounds[1] - bounds[0])[free]
    objective = DenoisingObjective(model, target, free, draws, seed)
    every, proposes = torch.arange(len(target), device=bounds.device), model.control_net.proposal is not None
    moving = torch.zeros_like(free)
    if target.reference is not None:
        moving = find_moving(model.control_net, target.latents.shape[2:])
    if proposes:
        second, std = Proposal.moments(*model.control_net.propose(target), config)
        second = model.control_net.wrap(second)
    how = {}
    if start is not None:
        control, index = rearrange(start.to(bounds), "b s d -> (b s) d"), every.repeat_interleave(start.shape[1])
    elif proposes:
        how = {} if moving.any() else dict(iterations=1)
        control, index = torch.where(free, second, bounds[0]).clamp(*bounds), every
    else:
        control, index = probe(objective, bounds, moving & free)
    found = levenberg_marquardt(objective, control, index, bounds, **how)
    valleys = distinct_solutions(found, index, objective, bounds)
    best = found.select(torch.stack([own[0] for own in valleys]))
    loss, share = best.loss, objective.unexplained(best.residuals)
    if target.reference is not None and not how:
        best = levenberg_marquardt(objective, best, every, bounds, scale=loss)
    both = free[:, None] & free
    covariances = [
        torch.zeros(len(target), *both.shape).to(bounds).masked_scatter(both, own)
        for own in standard_errors(best, objective.paired, width)
    ]
    learned = (bounds.new_tensor(own or [0.0] * len(free)) for own in (config.error_scale, config.error_floor))
    control = model.control_net.wrap(best.control)
    others = [model.control_net.wrap(found.control[own[1:]]).tolist() for own in valleys]
    calibrated, circles = config.error_scale is not None, dict(periods=config.periods, middle=config.control_mean)
    reading = Reading(control, *covariances, loss, best.iterations, others, [], *learned, calibrated, share, **circles)
    if proposes and not calibrated:
        reading = replace(reading, control=torch.where(free, second, control), unmoved=control)
    if config.proposal_scale is not None:
        std = widen(std, config.proposal_scale, config.proposal_floor)
        reading = reading.with_opinion(second, std, config.proposal_correlation or 0)
    several = torch.tensor([is_ambiguous(found.compare(own), objective.paired) for own in valleys])
    reading.flags = raise_flags(
        len(target),
        outside_range=is_outside(config, reading.control, reading.std),
        ambiguous=several | reading.anywhere.any(1).cpu(),
        unexplained=(reading.unexplained_share > NOTHING) | (loss > (config.explained_loss or math.inf)),
        uncalibrated=[not calibrated] * len(target),
    )
    reading.model_calls = objective.calls / len(target)
    reading.seconds = (time.perf_counter() - began) / len(target)
    return reading


def read_and_profile(model, target, known=None, draws=8, seed=0):
    """As read_controls, and once more from there where a profile of the loss is lower elsewhere.

    Returns: Reading; what `profile` returns at its controls.
    """
    reading = read_controls(model, target, known, draws, seed)
    profiles = profile(model, target, reading.lowest, seed)
    if model.control_net.proposal is not None:  # which has seen the whole range
        return reading, profiles
    config = model.control_net.config
    lower = find_lower(search_bounds(config, known), config.periods, reading.lowest, *profiles)
    for i in (lower != reading.lowest).any(1).nonzero()[:, 0].tolist():  # one by one, so that none depends on others
        others = lower.new_tensor(reading.others[i]).view(-1, lower.shape[1])
        start = torch.stack([reading.lowest[i], lower[i], *others])
        own = read_controls(model, target.select([i]), known, draws, seed, start[None])
        reading = reading.exchange(i, own)
        for part, anew in zip(profiles, profile(model, target.select([i]), own.lowest, seed)):
            part[i] = anew[0]
    return reading, profiles


@torch.no_grad()
def profile(model, target, control, seed=0):
    """The denoising loss along every number, through controls that were found.

    target: Target of B pictures. control: (B, d).
    Returns: controls (B, d, n, d), their losses (B, d, n); the losses (B,) of `control` by the same draws.
    """
    objective = DenoisingObjective(model, target, draws=PROFILE_DRAWS, seed=seed)
    points = move_numbers(model.control_net.config, control, PROFILE_POINTS // min(2, control.shape[1]))
    every = torch.arange(len(control), device=control.device)
    along = objective.losses(
        rearrange(points, "b k n d -> (b k n) d"), every.repeat_interleave(points[0, ..., 0].numel())
    )
    return points, along.view(points.shape[:-1]), objective.losses(control, every)


def move_numbers(config, control, count):
    """Move one number at a time through its searched range, a periodic one half a turn either way.

    control: (B, d). Returns: (B, d, count, d).
    """
    low, high = search_bounds(config).to(control)
    goes_round, half = torch.tensor([*map(bool, config.periods)], device=control.device), (high - low) / 2
    low, high = torch.where(goes_round, control - half, low), torch.where(goes_round, control + half, high)
    points = repeat(control, "b d -> b k n d", k=control.shape[1], n=count).clone()
    along = torch.lerp(low[..., None], high[..., None], torch.linspace(0, 1, count).to(low))  # (B, d, count)
    points.diagonal(dim1=1, dim2=3).copy_(rearrange(along, "b d n -> b n d"))
    return points


def find_lower(bounds, periods, control, points, losses, here):
    """bounds: (2, d), equal for numbers that are known. periods: as in the config. control: (B, d).
    points, losses, here: as `profile` has them.

    Returns: (B, d), the lowest place of a profile if it lies below the control and away from it; else the control.
    """
    low, high = bounds.to(points)
    away = (wrap(points - control[:, None, None], periods).abs() > SAME * (high - low)).any(-1)
    losses = losses.masked_fill(~away | (low == high)[:, None], torch.inf).flatten(1)
    lowest = rearrange(points, "b k n d -> b (k n) d")[range(len(control)), losses.argmin(1)]
    return torch.where((losses.amin(1) < here)[:, None], lowest, control)


def search_bounds(config, known=None):
    """Returns: (2, d) float64, where controls are searched: the trained range and BEYOND it; known ones as given.

    Of a periodic number, these are the ends of its circle.
    Raises: InputError if there is no trained range.
    """
    if config.control_low is None:
        raise InputError("this control was never trained, so its range is unknown: run tutorial_train.py")
    statistics = (config.control_low, config.control_high, config.control_std)
    low, high, std = (torch.tensor(own, dtype=torch.float64) for own in statistics)
    margin = BEYOND * torch.where(high > low, high - low, std)
    margin[[period is not None for period in config.periods]] = 0
    bounds = torch.stack([low - margin, high + margin])
    for name, number in (known or {}).items():
        bounds[:, config.control_names.index(name)] = number
    return bounds


def probe(objective, bounds, moving):
    """Find places to start from: by matching references, or by the loss at points that fill the searched range.

    objective: a DenoisingObjective of B targets, evaluated with few of its draws. bounds: (2, d). moving: (d,) bool,
    which numbers move the reference; if none does, or there is none, points are probed.
    Returns: places low in valleys (P, d); the index (P,) of the target that each is for.
    """
    model, target, free, (low, high) = objective.model, objective.target, objective.free, bounds
    count, draw_index, width = len(target), objective.middle_draws, (high - low)[free]
    if moving.any():
        control, index = match_reference(model, target, fill_range(MATCHES, bounds, moving), moving, bounds)
    else:
        draw_index = draw_index[:1]
        probes = (model.control_net.config.probes or PROBES) * (SEVERAL if free.sum() > 1 else 1)
        points = fill_range(probes, bounds, free)
        every = torch.arange(count, device=bounds.device)
        losses = objective.losses(points.repeat(count, 1), every.repeat_interleave(probes), draw_index)
        gaps = wrap(points[:, None] - points, objective.periods)[..., free] / width
        index, which = find_valleys(gaps, losses.view(count, probes)).nonzero(as_tuple=True)
        control = points[which]
        if free.sum() == 1:  # the points lie close enough to the bottom
            return control, index
    found = levenberg_marquardt(objective, control, index, bounds, draw_index)
    kept = keep_rivals(found, index, objective, bounds)
    return found.control[kept], index[kept]


def fill_range(count, bounds, which):
    """Returns: (count, d) points that fill the bounds (2, d) of some numbers, (d,) bool; the others in their middle."""
    low, high = bounds[:, which]
    points = bounds.mean(0).repeat(count, 1)
    if len(low) == 1:
        shares = (torch.arange(count)[:, None] + 0.5) / count
    else:
        shares = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=0).draw(count)
    points[:, which] = low + (high - low) * shares.to(low)
    return points


def find_valleys(gaps, losses):
    """Find points below all their neighbours and at least halfway down from the median to the lowest point.

    gaps: (P, P, f), between the points. losses: (B, P). Returns: (B, P) bool, at least one per target.
    """
    distance = gaps.norm(dim=2).fill_diagonal_(torch.inf)
    neighbours = distance.topk(min(2 * gaps.shape[2], len(gaps) - 1), largest=False).indices  # (P, 2 f)
    lowest, middle = losses.amin(1, keepdim=True), losses.median(1, keepdim=True).values
    below = (losses[:, :, None] <= losses[:, neighbours]).all(2)
    return (below & (losses <= (lowest + middle) / 2)) | (losses == lowest)
