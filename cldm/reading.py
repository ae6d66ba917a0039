"""Read controls from pictures, no start needed: probe the trained range, refine its valleys, say how sure it is."""

import math
import time
from dataclasses import dataclass

import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from cldm.model import CALIBRATED
from cldm.objectives import DenoisingObjective, MotionObjective, SamplingObjective
from cldm.solvers import Solution, adam, levenberg_marquardt, sgd
from ldm.files import find_path, write_whole
from ldm.settings import InputError

MARGIN = 0.35  # how far beyond the trained range is searched, as a share of it
PROBES = 8  # points tried for one number, with one draw of noise, at least; for several, six times as many
MATCHES = 64  # points tried where numbers move a reference, which takes no model; the best PROBES are refined
COARSEST = 8  # squares, on a side, that latents are averaged over at first to match them
RIVALS = 2  # places, at most, where the reference matches the target that the model chooses from
Z90 = 1.645  # half of a normal distribution's 90% interval, in standard deviations
OUTSIDE = 0.05  # a control further beyond the trained range than this share of it is outside, however unsure it is
RIVAL = 1.5  # a valley this many times as high as the best, by the probes' draw, is left alone
AMBIGUOUS = 0.1  # a valley higher than the best by less than this share of its loss explains the target as well
# A target is unexplained at this many times the loss that 95% of validation pictures stay below, without and with a
# reference: other pictures' references can be moved and scaled to look a little like it.
UNEXPLAINED = 3.0, 1.5
NO_EFFECT = 1e-6  # of the loss: a control that changes less, over the whole range, has no effect
SAME = 0.02  # solutions less than this share of the searched range apart are one
BATCH = 12  # targets read together
CALIBRATION = 36  # pictures read to learn how far to trust readings
CALIBRATION_STEPS = 16  # of DDIM, to learn how well the model draws them
PROFILED = 6  # pictures whose loss is looked at along every number, to learn how many probes it takes
MOST_PROBES, IN_A_VALLEY = 64, 4  # probes at the most, and in the narrowest valley
PROFILE_POINTS, PROFILE_DRAWS = 33, 4  # of the loss over a number's range; half the points where there are several


@dataclass
class Reading:
    """What was read from B targets, d numbers each, in the dataset's units."""

    control: torch.Tensor  # (B, d)
    noise_covariance: torch.Tensor  # (B, d, d), of errors by the spread over draws of noise
    residual_covariance: torch.Tensor  # (B, d, d), what it would be if all that is left came from wrong controls
    error_scale: torch.Tensor  # (d,), the share of residual_covariance's standard deviations that does, as calibrated
    error_floor: torch.Tensor  # (d,), standard deviations of errors that are the model's, whatever the residuals
    calibrated: bool  # whether error_scale and error_floor were learned; else there are no error bars
    loss: torch.Tensor  # (B,) mean squared residual, the least there is
    flags: list  # of B lists of some of FLAGS
    others: list  # of B lists of the controls (d numbers each) of other valleys, the best first
    iterations: torch.Tensor  # (B,), of the best valley
    model_calls: float  # pictures that the model was evaluated on, a target
    seconds: float  # a target
    reach: torch.Tensor | None = None  # (B, d), how far others lie that are as likely by the pictures alone; 0: nowhere

    @property
    def covariance(self):
        """(B, d, d), of the errors; nothing for numbers that were known."""
        scale, sought = torch.diag(self.error_scale), self.residual_covariance.diagonal(dim1=1, dim2=2) > 0
        floor = torch.diag_embed(self.error_floor.square() * sought)
        covariance = self.noise_covariance + scale @ self.residual_covariance @ scale + floor
        if self.reach is None:
            return covariance
        std = covariance.diagonal(dim1=1, dim2=2).sqrt()
        wider = (self.reach / (Z90 * std)).nan_to_num(1).clamp_min(1)
        return wider[:, :, None] * covariance * wider[:, None]

    @property
    def std(self):
        """(B, d), standard error."""
        return self.covariance.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def interval90(self):
        """(B, d, 2), [low, high]."""
        return torch.stack([self.control - Z90 * self.std, self.control + Z90 * self.std], 2)


# What may be wrong with a reading, and what that says.
FLAGS = {
    "outside_range": "the best control lies beyond the trained range",
    "ambiguous": "another control explains the target about as well",
    "no_effect": "the pictures look the same at quite other values",
    "unexplained": "the model cannot draw this target: the numbers mean nothing",
    "unlike_shapes": "A and B are cut to squares of unlike parts",
    "unsettled": "the iterations ran out before the control had settled",
    "uncalibrated": "this control was never calibrated: nothing tells how far to trust it",
}


@torch.no_grad()
def read_controls(
    model,
    target_latents,
    embeddings,
    reference=None,
    *,
    known=None,
    sampling=None,
    solver="lm",
    start=None,
    draws=8,
    seed=0,
    **options,
):
    """Find the controls that explain pictures best: by least squares.

    With a reference, Levenberg-Marquardt then goes on by a Cauchy loss, its scale the loss that was reached: the
    reference may not show all that the target does.
    model: ControlLDM, trained. target_latents: (B, C, h, w). embeddings: (B, 77, D).
    reference: (B, C, h, w), the latents of the pictures that controls are changes from, where the model takes them.
    known: {name: number} of controls that need not be found; with all others, they are part of what is returned.
    sampling: a SamplingObjective of the same targets, to be solved in place of the denoising objective.
    solver: "lm", "sgd" or "adam", with its `options`. Error bars are calibrated for the first, without `sampling`.
    start: (B, S, d), S places to start from; None: where probes find valleys.
    draws: of noise, in pairs, for the denoising objective.
    Returns: Reading.
    """
    began, count, config = time.perf_counter(), len(target_latents), model.control_net.config
    numbers = [(known or {}).get(name, math.nan) for name in config.control_names]
    given = torch.tensor(numbers, dtype=torch.float64, device=target_latents.device)  # controls are never rounded
    sought = given.isnan()
    low, high = (bound.to(given)[sought] for bound in search_bounds(config))
    denoising = DenoisingObjective(model, target_latents, embeddings, reference, draws=draws, seed=seed)
    everything = torch.arange(count, device=target_latents.device)
    objective = sampling or denoising
    if known:
        objective.known = denoising.known = given.expand(count, -1)
    if start is None:
        motion = None
        if model.control_net.uses_reference:
            motion = MotionObjective(model, target_latents, reference, given)
        control, targets = probe(denoising, everything, low, high, sought, motion, config.probes)
    else:
        control, targets = start.to(given).flatten(0, 1)[:, sought], everything.repeat_interleave(start.shape[1])
    unit = model.control_net.spread(given)[sought]
    found = solve(solver, objective, control, targets, low, high, unit, **options)

    valleys = rank_valleys(found, targets, high - low)
    best = torch.stack([own[0] for own in valleys])
    controls = objective.complete(found.control, targets)
    at = Solution(*(part[best] for part in vars(found).values()))
    loss = at.losses.mean(1)
    if reference is not None and solver == "lm":  # it may not show all that the target does
        at = levenberg_marquardt(objective, at, everything, low, high, scale=loss)
    covariances = standard_errors(at, objective.paired, high - low)
    both = (sought[:, None] & sought).expand(count, -1, -1)
    noise, residual = (torch.zeros(both.shape).to(low).masked_scatter(both, own) for own in covariances)
    result = Reading(
        objective.complete(at.control, everything),
        noise,
        residual,
        *(low.new_tensor(own or [0.0] * len(given)) for own in (config.error_scale, config.error_floor)),
        config.error_scale is not None,
        loss,
        flags=[],
        others=[controls[own[1:]].tolist() for own in valleys],
        iterations=at.iterations,
        model_calls=0.0,
        seconds=0.0,
    )
    explained = (
        denoising.evaluate(result.control[:, sought], everything).square().mean((1, 2)) if sampling else result.loss
    )
    conditions = dict(
        outside_range=is_outside(config, result.control, result.std, sought),
        ambiguous=[is_ambiguous(found.losses[own], objective.paired) for own in valleys],
        unexplained=explained > (config.explained_loss or math.inf),
        uncalibrated=[not result.calibrated] * count,
    )
    result.flags = [[name for name, holds in conditions.items() if holds[i]] for i in range(count)]
    result.model_calls = (denoising.calls + (sampling.calls if sampling else 0)) / count
    result.seconds = (time.perf_counter() - began) / count
    return result


@torch.no_grad()
def profile(model, control, target_latents, embeddings, reference=None, seed=0):
    """The denoising loss along every number, through controls that were found.

    control: (B, d). target_latents, embeddings, reference: as read_controls has them.
    Returns: controls (B, d, n, d), their losses (B, d, n), the losses (B,) of `control` by the same draws.
    """
    count = PROFILE_POINTS if control.shape[1] == 1 else PROFILE_POINTS // 2
    objective = DenoisingObjective(model, target_latents, embeddings, reference, draws=PROFILE_DRAWS, seed=seed)
    points = control[:, None, None].repeat(1, control.shape[1], count, 1)
    for k, (low, high) in enumerate(zip(*search_bounds(model.control_net.config))):
        points[:, k, :, k] = torch.linspace(low, high, count).to(points)
    targets = torch.arange(len(control), device=control.device)
    here = objective.evaluate(control, targets).square().mean((1, 2))
    targets = targets.repeat_interleave(control.shape[1] * count)
    losses = objective.evaluate(points.flatten(0, 2), targets).square().mean((1, 2))
    return points, losses.view(points.shape[:-1]), here


def find_lower(config, control, points, losses, here, sought):
    """sought: (d,) bool, along which numbers a profile counts.

    Returns: (B, d), the lowest place of a profile that lies below a control and away from it; else the control.
    """
    low, high = search_bounds(config)
    away = ((points - control[:, None, None]).abs() / (high - low).to(points) > SAME).any(-1)
    losses = losses.masked_fill(~(away & sought[:, None]), torch.inf).flatten(1)
    lowest = points.flatten(1, 2)[range(len(control)), losses.argmin(1)]
    return torch.where((losses.amin(1) < here)[:, None], lowest, control)


def search_bounds(config):
    """Returns: low, high, each (d,): the trained range and MARGIN of it on either side.

    Raises: InputError if there is none.
    """
    if config.control_low is None:
        raise InputError("this control was never trained, so its range is not known: run tutorial_train.py")
    bounds = (config.control_low, config.control_high, config.control_std)
    low, high, std = (torch.tensor(own, dtype=torch.float64) for own in bounds)
    margin = MARGIN * torch.where(high > low, high - low, std)
    return low - margin, high + margin


def middle_draws(objective):
    """Returns: (2,), the draws of opposite noise in the middle of the noise levels."""
    middle = (objective.draws - 1) // 4 * 2
    return torch.tensor([middle, middle + 1])


def probe(objective, targets, low, high, sought, motion=None, probes=None):
    """Try points that fill the box between low and high evenly, (f,) each, with one draw of noise.

    sought: (d,) bool, which f numbers of a control they are. probes: how many; None: PROBES.
    motion: a MotionObjective, which is probed instead where numbers move something; the others start in the middle.
    Returns: places low in the valleys that they lie in (P, f), and whose they are (P,), of targets (B,).
    """
    draws = middle_draws(objective)
    if motion is not None and motion.moving.any():
        own = motion.moving[sought]
        moved, whose = match(motion, targets, low[own], high[own])
        points = ((low + high) / 2).repeat(len(moved), 1)
        points[:, own] = moved
    else:
        draws, count = draws[:1], probes or PROBES
        if len(low) == 1:
            points = low + (high - low) * (torch.arange(count, device=low.device)[:, None] + 0.5) / count
        else:
            points = fill_box(6 * count, low, high)
        residuals = objective.evaluate(points.repeat(len(targets), 1), targets.repeat_interleave(len(points)), draws)
        losses = residuals.square().mean((1, 2)).unflatten(0, (len(targets), -1))
        whose, which = find_valleys(points / (high - low), losses).nonzero(as_tuple=True)
        points = points[which]
        if len(low) == 1:  # the points lie close enough to the bottom
            return points, targets[whose]
    found = levenberg_marquardt(objective, points, targets[whose], low, high, draws=draws)
    kept = keep_rivals(found, targets[whose], high - low)
    return found.control[kept], targets[whose[kept]]


def fill_box(count, low, high):
    """Returns: (count, f) points that fill the box between low and high, (f,) each, evenly."""
    return low + (high - low) * torch.quasirandom.SobolEngine(len(low), scramble=True, seed=0).draw(count).to(low)


def match(motion, targets, low, high):
    """Move the reference onto the target, from coarse to fine.

    Returns: places (P, m) of the m numbers that move it, and the index of their target (P,).
    """
    points = fill_box(MATCHES, low, high)
    pool = max(1, min(motion.target.shape[2:]) // COARSEST)
    motion.pool = pool
    residuals = motion.evaluate(points.repeat(len(targets), 1), targets.repeat_interleave(MATCHES))
    losses = residuals.square().mean((1, 2)).unflatten(0, (len(targets), -1))
    control = points[losses.topk(PROBES, largest=False).indices].flatten(0, 1)
    whose = torch.arange(len(targets), device=targets.device).repeat_interleave(PROBES)
    while pool:
        motion.pool = pool
        found = levenberg_marquardt(motion, control, targets[whose], low, high)
        control, pool = found.control, pool // 2
    kept = keep_rivals(found, whose, high - low, RIVALS)
    return control[kept], whose[kept]


def keep_rivals(found, targets, width, most=None):
    """Returns: indices of every target's best solutions, at most so many, apart by the width (f,), near the best."""
    losses, kept = found.losses.mean(1), []
    for own in rank_valleys(found, targets, width):
        kept += [i for i in own[:most].tolist() if losses[i] <= RIVAL * losses[own[0]]]
    return kept


def find_valleys(points, losses):
    """Find the points below all their neighbours and at least halfway down from the middle to the lowest point.

    points: (P, d). losses: (B, P). Returns: (B, P) bool, at least one a target.
    """
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    neighbours = distance.topk(min(2 * points.shape[1], len(points) - 1), largest=False).indices  # (P, 2 d)
    lowest, middle = losses.amin(1, keepdim=True), losses.median(1, keepdim=True).values
    below = (losses[:, :, None] <= losses[:, neighbours]).all(2)
    return (below & (losses <= (lowest + middle) / 2)) | (losses == lowest)


def solve(solver, objective, control, targets, low, high, unit, **options):
    """Run a solver, lm, sgd or adam, from control (P, d), each for one of the targets (P,). Returns: Solution."""
    if solver == "lm":
        return levenberg_marquardt(objective, control, targets, low, high, **options)
    last = {}
    descend = {"sgd": sgd, "adam": adam}[solver]
    taken, _ = descend(
        objective, control, targets, unit, on_iteration=lambda control, _: last.update(control=control), **options
    )
    return Solution(last["control"], *objective.linearize(last["control"], targets), taken)


def rank_valleys(found, targets, width):
    """Returns: for every target, indices of its solutions more than SAME of the width (d,) apart, the best first."""
    order = found.losses.mean(1).argsort(stable=True)
    valleys = []
    for own in (order[targets[order] == i].tolist() for i in targets.unique()):
        distinct = []
        for i in own:
            steps = (found.control[distinct] - found.control[i]).abs() / width
            if (steps.amax(1) > SAME).all():
                distinct.append(i)
        valleys.append(torch.tensor(distinct))
    return valleys


def standard_errors(found, paired, width):
    """Estimate how unsure the controls of a Solution are.

    paired: whether every two draws have opposite noise. width: (d,), of the searched range.
    Returns: covariances of the errors, each (P, d, d): White's sandwich over draws, and the one for residuals that all
    err alike, where their number K N does not help. A control without effect on them may be anywhere in the range.
    """
    gradients = found.gradients.unflatten(1, (-1, 2)).mean(2) if paired else found.gradients
    gradients = gradients.double() * width  # of controls in units of the range, which may be of very unlike sizes
    curvature, loss = found.curvature.double() * width[:, None] * width, found.losses.mean(1, keepdim=True)
    count = gradients.shape[1]
    scatter = torch.einsum("pkd,pke->pde", gradients, gradients) / (count * max(count - 1, 1))
    inverse = torch.linalg.pinv(curvature, hermitian=True)
    noise = inverse @ scatter @ inverse
    idle = curvature.diagonal(dim1=1, dim2=2) <= NO_EFFECT * loss
    noise = noise.masked_fill(idle[:, :, None] | idle[:, None], 0) + torch.diag_embed(idle.to(noise))
    units = width[:, None] * width
    return (noise * units).to(width), (loss[:, :, None] * inverse * units).to(width)


def is_outside(config, control, std, sought):
    """sought: (d,) bool, which numbers were read.

    Returns: (B,) bool, whether any of those in control (B, d) lies further beyond the trained range than it is unsure,
    and never more than OUTSIDE of it.
    """
    low, high = control.new_tensor(config.control_low), control.new_tensor(config.control_high)
    slack = torch.minimum(Z90 * std, OUTSIDE * (high - low))
    return (((control < low - slack) | (control > high + slack)) & sought).any(1)


def is_ambiguous(losses, paired):
    """losses: (V, K), of a target's valleys, the best first. Returns: whether the second is about as good."""
    if len(losses) < 2:
        return False
    difference = losses[1] - losses[0]  # (K,)
    difference = difference.unflatten(0, (-1, 2)).mean(1) if paired else difference
    chance = difference.std(correction=min(1, len(difference) - 1)) / len(difference) ** 0.5
    return bool(difference.mean() < max(2 * chance, AMBIGUOUS * losses[0].mean()))


def calibrate(model, folder, dataset):
    """Learn from pictures whose controls are known how far to trust readings; keep it in the control's folder.

    probes: how many find the valley that the truth lies in.
    error_scale, error_floor: such that 90% of each number lie in their 90% intervals, by the rank that split conformal
    prediction takes; variances by the residuals are halfway from typical ones, for they tell the errors' only roughly.
    explained_loss, sampling_loss: above them, unexplained, by the denoising and by the sampling objective.
    model: ControlLDM, trained. folder: its control's. dataset: a ControlDataset, best of pictures that training did not
    see.
    Source: Angelopoulos & Bates 2021, eq. 1; Smyth 2004, moderated variances.
    """
    register = model.control_net.register_to_config
    register(**dict.fromkeys(CALIBRATED))
    chosen = torch.linspace(0, len(dataset) - 1, min(CALIBRATION, len(dataset))).round().long().tolist()
    batches = []
    for start in range(0, len(chosen), BATCH):
        batch = default_collate([dataset[i] for i in chosen[start : start + BATCH]])
        keys = ("latents", "embeddings", "reference", "control")
        batches.append({key: batch[key].to(model.base.device) for key in keys if key in batch})
    probes = choose_probes(model, **batches[0])
    register(probes=probes)
    readings, drawn = [], []
    for batch in tqdm(batches, desc="calibrating"):
        control = batch.pop("control")
        readings.append(read_controls(model, *batch.values()))
        drawn.append(sampling_losses(model, control, **batch))
    noise, residual = (
        torch.cat([getattr(reading, key).diagonal(dim1=1, dim2=2) for reading in readings]).cpu()
        for key in ("noise_covariance", "residual_covariance")
    )
    found, loss = (torch.cat([getattr(reading, key) for reading in readings]).cpu() for key in ("control", "loss"))
    missing = ((found - dataset.controls[chosen]) / Z90).square() - noise
    typical = residual.median(0).values
    moderated = (residual + typical) / 2
    shares = torch.where(moderated > 0, missing / moderated, 0)  # 0: a control without any effect
    rank = min(len(shares), math.ceil(0.9 * (len(shares) + 1)))
    error_scale = (shares.sort(0).values[rank - 1].clamp_min(0) / 2).sqrt()
    limits = (
        UNEXPLAINED[model.control_net.uses_reference] * own.quantile(0.95).item()
        for own in (loss, torch.cat(drawn).cpu())
    )
    learned = error_scale.tolist(), (error_scale * typical.sqrt()).tolist(), *limits, probes
    register(**dict(zip(CALIBRATED, learned)))
    text = model.control_net.to_json_string()
    write_whole(find_path(folder) / "config.json", lambda partial: partial.write_text(text))


@torch.no_grad()
def choose_probes(model, latents, embeddings, control, reference=None):
    """Returns: how many probes find, of every number, the valley of the loss that the truth lies in; None: by matching.

    A valley reaches from its bottom as far as the loss rises; IN_A_VALLEY probes lie in the narrowest there is.
    latents: (B, C, h, w), pictures of which PROFILED are looked at. control: (B, d), the truth.
    """
    if reference is not None:
        return None
    latents, embeddings, control = (part[:PROFILED] for part in (latents, embeddings, control))
    objective = DenoisingObjective(model, latents, embeddings)
    low, high = (bound.to(control) for bound in search_bounds(model.control_net.config))
    grid, narrowest = torch.linspace(0, 1, MOST_PROBES, device=control.device), MOST_PROBES
    for k in range(control.shape[1]):
        points = control[:, None].repeat(1, MOST_PROBES, 1)
        points[:, :, k] = low[k] + (high[k] - low[k]) * grid
        targets = torch.arange(len(control), device=control.device).repeat_interleave(MOST_PROBES)
        losses = objective.evaluate(points.flatten(0, 1), targets, middle_draws(objective)).square().mean((1, 2))
        for profile, truth in zip(losses.unflatten(0, (-1, MOST_PROBES)).tolist(), control[:, k].tolist()):
            at = round((truth - low[k].item()) / (high[k] - low[k]).item() * (MOST_PROBES - 1))
            narrowest = min(narrowest, valley_width(profile, at))
    return min(MOST_PROBES, max(PROBES, math.ceil(IN_A_VALLEY * MOST_PROBES / narrowest)))


def valley_width(profile, at):
    """profile: a list of losses. Returns: how many of them are in the valley that number `at` lies in."""

    def walk(i, step, sign):  # as long as the loss rises, or for -1 falls
        while 0 <= i + step < len(profile) and sign * (profile[i + step] - profile[i]) > 0:
            i += step
        return i

    bottom = min(walk(at, -1, -1), walk(at, 1, -1), key=profile.__getitem__)
    return walk(bottom, 1, 1) - walk(bottom, -1, 1) + 1


@torch.no_grad()
def sampling_losses(model, control, latents, embeddings, reference=None):
    """Returns: (B,) the sampling loss of targets at their true controls (B, d), of one drawing each."""
    start = torch.zeros_like(latents) if reference is None else reference
    how = dict(ddim_steps=CALIBRATION_STEPS, eta=1.0)
    objective = SamplingObjective(model, start, latents, embeddings, **how)
    return objective.evaluate(control, torch.arange(len(control), device=control.device)).square().mean((1, 2))
