"""Learn, at the end of training, how far to trust readings: error bars, limits of the losses, number of probes."""

import json
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.special import stdtrit
from torch.utils.data import default_collate
from tqdm import tqdm

from cldm.confidence import Z90, Reading, widen
from cldm.denoising import DenoisingObjective
from cldm.fit import fit_pictures, has_formula
from cldm.hints import wrap
from cldm.model import CALIBRATED, Sampling, Target
from cldm.proposal import Proposal
from cldm.reading import PROBES, move_numbers, read_controls
from ldm.ddim import draw_noise
from ldm.files import find_path, write_whole
from ldm.pictures import fit_picture

PICTURES = 36  # read to calibrate, by default; and drawn, at most
BATCH = 12  # read together
# A target is unexplained at this many times the loss that 95% of validation pictures stay below; by drawings, without
# and with a reference. The second is lower: any reference can be moved and scaled to look a little like any target.
UNEXPLAINED, UNDRAWN = 1.3, (3.0, 1.5)
PROFILED = 6  # pictures whose loss is profiled along every number to choose the number of probes
MOST_PROBES, IN_A_VALLEY = 64, 4  # probes at most, and in the narrowest valley
GUESSED = 0.7  # share of the error of a guess, the middle of the range, above which nothing is read
SCALED = 20  # times that bars are scaled until nine in ten lie within them
MOST, ALIKE = 3.0, 0.95  # standard deviations that an error counts for, and correlation of errors, at most
SAMPLING = Sampling(ddim_steps=16)  # to learn how well the model draws the pictures


def calibrate(model, folder, dataset, pictures=PICTURES):
    """Read pictures whose controls are known, and keep what that tells in the control's config.

    error_scale, error_floor, and those of a Proposal and of fits, where there are some: such that 90% of each number
    lie in their 90% intervals, as nine_in_ten has it; residual variances are averaged with their median, as they tell
    the errors' only roughly.
    explained_loss, sampling_loss: limits above which a target is unexplained; the first is None with a reference, since
    losses of pairs differ more by what is shown than by what is explained. probes: as choose_probes has them. guessed:
    which numbers are read no better than by a guess.
    model: ControlLDM, trained. folder: its control's. dataset: a ControlDataset, best of pictures not trained on.
    pictures: how many of it are read, if it has so many. The share of others that intervals hold varies by about
    0.3 / sqrt(N), one standard deviation, of N independent ones: 5% of 36, 1.5% of 400.
    Returns: controls (N, d) of pictures; what was read from these pictures, and from drawings at the controls of the
    first PICTURES: two Readings.
    Source: Angelopoulos & Bates 2021, eq. 1; Smyth 2004, moderated variances.
    """
    register = model.control_net.register_to_config
    register(**dict.fromkeys(CALIBRATED))
    chosen = spread_out(pictures, dataset)
    count = math.ceil(len(chosen) / BATCH)
    parts = [chosen[i::count] for i in range(count)]  # each spread over the dataset
    chosen, batches = sum(parts, []), [load_batch(model, dataset, part) for part in parts]
    probes = choose_probes(model, *batches[0])
    register(probes=probes)
    readings, drawn, losses, proposed = [], [], [], ([], [])  # of pictures, of drawings
    for target, control in tqdm(batches, desc="calibrating"):
        seen = [target]
        readings.append(read_controls(model, target))
        if BATCH * len(drawn) < PICTURES:
            latents = draw_latents(model, target, control)
            losses.append((latents - target.latents).square().mean((1, 2, 3)))
            seen.append(replace(target, latents=latents))
            drawn.append(read_controls(model, seen[1]))
        for own, kind in zip(proposed, seen if model.control_net.proposal is not None else ()):
            own.append(Proposal.moments(*model.control_net.propose(kind), model.control_net.config))
    reading, drawn = Reading.cat(readings), Reading.cat(drawn)
    reading, drawn = (replace(own, control=own.lowest, unmoved=None) for own in (reading, drawn))  # by denoising alone
    noise, residual = (own.diagonal(dim1=1, dim2=2) for own in (reading.noise_covariance, reading.residual_covariance))
    truth = dataset.controls[chosen]
    errors = wrap(reading.control - truth, model.control_net.config.periods)
    missing = (errors / Z90).square() - noise  # variance that the noise does not account for
    bars = dict(zip(("error_scale", "error_floor"), moderate(missing, residual)))
    learned, config = dict(bars), model.control_net.config
    reading, drawn = (replace(own, **bars) for own in (reading, drawn))
    second = [[torch.cat(own).cpu() for own in zip(*each)] for each in proposed]
    opinions = {"proposal": lambda _: second[0]} if second[0] else {}
    if has_formula(config):
        rows = (dataset.rows[i].load() for i in chosen)
        fitted = [[fit_picture(picture, model.config.image_size) for picture in row] for row in rows]
        opinions["fit"] = lambda reading: fit_pictures(reading, fitted, config)
    for name, tell in opinions.items():
        opinion, std = tell(reading)
        judged = judge_opinion(reading, opinion, std, truth, moderated=name == "fit")
        factor = judged.pop("factor")
        learned |= {key: factor * own for key, own in learned.items() if not key.endswith("correlation")}
        learned |= {key if key in bars else f"{name}_{key}": value for key, value in judged.items()}
        reading = hear(reading, opinion, std, judged)
        if name == "proposal":
            drawn = hear(drawn, *second[1], judged)
    read, undrawn = (own.quantile(0.95).item() for own in (reading.loss, torch.cat(losses).cpu()))
    limits = dict(
        explained_loss=None if model.control_net.uses_reference else UNEXPLAINED * read,
        sampling_loss=UNDRAWN[model.control_net.uses_reference] * undrawn,
        probes=probes,
        guessed=find_guessed(config, reading, truth),
    )
    register(**limits, **{key: own.tolist() for key, own in learned.items()})
    config = json.loads(model.control_net.to_json_string())
    config.pop("_name_or_path", None)  # where it was read from
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_whole(find_path(folder) / "config.json", lambda partial: partial.write_text(text))
    return truth, reading, drawn


def median_errors(config, reading, control):
    """Returns: (d,), the median absolute error of each number of a Reading; control: (B, d), the truth."""
    return wrap(reading.control - control, config.periods).abs().quantile(0.5, 0)  # median() takes the lower of two


def find_guessed(config, reading, control):
    """As median_errors. Returns: d bools, whether saying the middle of all would be about as good."""
    guesses = wrap(control - control.median(0).values, config.periods).abs().quantile(0.5, 0)
    quarter = (guesses.new_tensor(config.control_high) - guesses.new_tensor(config.control_low)) / 4
    guesses = torch.where(guesses > 0, guesses, quarter)  # where half of the pictures or more share a number
    return (median_errors(config, reading, control) > GUESSED * guesses).tolist()


def nine_in_ten(sizes):
    """sizes: (N, ...), of errors. Returns: (...), what nine in ten stay below.

    At the rank of split conformal prediction. Fewer than 9 have none: then the largest counts or, where it is further,
    what they tell by Student's t if errors are normal.
    """
    rank = math.ceil(0.9 * (len(sizes) + 1))
    if rank <= len(sizes):
        return sizes.sort(0).values[rank - 1]
    return torch.maximum(sizes.amax(0), stdtrit(len(sizes), 0.95) * sizes.square().mean(0).sqrt())


def moderate(missing, claimed):
    """missing: (N, d), the variance that each error alone would ask for. claimed: (N, d), variances.

    Returns: scale, floor: (d,), of standard deviations, with which 90% of each number lie in their 90% intervals.
    """
    typical = claimed.median(0).values
    moderated = (claimed + typical) / 2
    shares = torch.where(moderated > 0, missing / moderated, 0)  # 0: a number without any effect
    scale = nine_in_ten(shares.clamp_min(0).sqrt()) / 2**0.5
    return scale, scale * typical.sqrt()


def judge_opinion(reading, second, std, truth, moderated=True):
    """Find how far to trust other estimates, and Readings that take them into account.

    second, std: (N, d), the estimates and the standard errors that they claim, infinite where there is none. truth:
    (N, d). moderated: whether what they claim tells their errors only roughly, as that of residuals.
    Returns: {error_scale, error_floor, scale, floor: (d,)}, with which 90% of each number lie in their intervals; scale
    and floor are `widen`'s; {factor: (d,)}, by which the first two grew; and {correlation: ()}, of the errors of both,
    all numbers together.
    """
    errors, others = (wrap(own - truth, reading.periods) for own in (reading.control, second))
    told = std.isfinite().all(1)
    if not told.any():
        scale = floor = std.new_ones(std.shape[1])
    elif moderated:
        scale, floor = moderate((others / Z90).square()[told], std[told].square())
    else:
        scale, floor = nine_in_ten((others.abs() / std)[told]) / Z90, std.new_zeros(std.shape[1])
    trusted = widen(std, scale, floor)
    relative = errors / reading.std, others / trusted  # nan: without error nor bar
    relative = [own[told].flatten().nan_to_num(0).clamp(-MOST, MOST) for own in relative]
    correlation = F.cosine_similarity(*relative, dim=0).clamp(0, ALIKE)
    own = dict(error_scale=reading.error_scale, error_floor=reading.error_floor, scale=scale, floor=floor)
    own["factor"] = torch.ones_like(scale)
    for k in range(SCALED):  # the noise, which is part of the bars, stays as it is
        joined = hear(reading, second, std, own | {"correlation": correlation})
        factor = nine_in_ten(wrap(joined.control - truth, reading.periods).abs() / joined.margin)
        if k:  # an opinion that is trusted too much when bars shrink would come and go
            factor = factor.clamp_min(1)
        own = {key: factor * value for key, value in own.items()}
    return own | {"correlation": correlation}


def hear(reading, second, std, judged):
    """second, std: as judge_opinion has them. judged: what it returns. Returns: a Reading that counts them in."""
    reading = replace(reading, error_scale=judged["error_scale"], error_floor=judged["error_floor"])
    std = widen(std, judged["scale"], judged["floor"])
    return reading.with_opinion(second, std, judged["correlation"].item())


def spread_out(count, dataset):
    """Returns: the indices of `count` items of a dataset, or of all, from its first to its last."""
    return torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().tolist()


def load_batch(model, dataset, which):
    """Returns: the Target and the controls (B, d) of some items of a ControlDataset."""
    batch = default_collate([dataset[i] for i in which])
    keys = ("embeddings", "latents", "reference")
    parts = {key: batch[key].to(model.base.device) for key in keys if key in batch}
    return Target(**parts), batch["control"].to(model.base.device)


@torch.no_grad()
def choose_probes(model, target, control):
    """Find how many probes the narrowest valley takes: IN_A_VALLEY in the one that the truth of some picture lies in.

    target: Target of B pictures, of which PROFILED are used. control: (B, d), the truth.
    Returns: the number of probes; None with a reference, which is matched instead.
    """
    if target.reference is not None:
        return None
    target, control = target.select(slice(PROFILED)), control[:PROFILED]
    objective = DenoisingObjective(model, target)
    points = move_numbers(model.control_net.config, control, MOST_PROBES)
    index = torch.arange(len(control), device=control.device).repeat_interleave(points[0, ..., 0].numel())
    losses = objective.losses(rearrange(points, "b k n d -> (b k n) d"), index, objective.middle_draws)
    truths = (points - control[:, None, None]).abs().sum(-1).argmin(-1).flatten().tolist()
    narrowest = min(map(valley_width, losses.view(-1, MOST_PROBES).tolist(), truths))
    return min(MOST_PROBES, max(PROBES, math.ceil(IN_A_VALLEY * MOST_PROBES / narrowest)))


def valley_width(losses, at):
    """losses: a list. Returns: how many of them lie in the valley around number `at`, as far as the loss rises."""

    def walk(i, step, sign):  # uphill, or for -1 downhill
        while 0 <= i + step < len(losses) and sign * (losses[i + step] - losses[i]) > 0:
            i += step
        return i

    bottom = min(walk(at, -1, -1), walk(at, 1, -1), key=losses.__getitem__)
    return walk(bottom, 1, 1) - walk(bottom, -1, 1) + 1


@torch.no_grad()
def draw_latents(model, target, control):
    """Returns: (B, C, h, w), latents of a Target drawn once at controls (B, d)."""
    noise = draw_noise(target.latents.shape, 1 + SAMPLING.ddim_steps, 0, target.latents.device)
    return model.generate(noise, control, target, SAMPLING, target.reference)
