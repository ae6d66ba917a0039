"""How sure a reading is: error bars, and flags for what may be wrong with it."""

import math
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange

from cldm.hints import wrap

Z90 = 1.645  # half of a normal distribution's 90% interval, in standard deviations
OUTSIDE = 0.05  # share of the trained range beyond which a control is outside, however unsure it is
AMBIGUOUS = 0.1  # a second valley whose loss is higher by less than this share explains the target as well
NOTHING = 1.001  # share of the loss without a control: if more is left, it explains less than nothing, bar rounding
GUESS = 0.9  # of the trained range: the width of a 90% interval of which a guess would be as sure
NO_EFFECT = 1e-6  # share of the loss: a number that changes the loss by less, over its range, has no effect

# What may be wrong with a reading, and what that means.
FLAGS = {
    "outside_range": "the number lies beyond the trained range",
    "ambiguous": "another number explains the target about as well",
    "no_effect": "the pictures look the same at quite different values",
    "guess": "a guess would do as well: it is not to be seen, or this control has not learned to read it",
    "unexplained": "the numbers do not explain this target: they mean nothing",
    "unlike_shapes": "A and B are cut to squares that may show different parts",
    "unsettled": "the iterations ran out before the control settled",
    "unreadable": 'of many targets: nothing could be read, as its "problem" says',
    "uncalibrated": "this control was never calibrated: nothing says how far to trust it",
}


@dataclass
class Reading:
    """What was read from B targets, d numbers each, in the dataset's units."""

    control: torch.Tensor  # (B, d)
    noise_covariance: torch.Tensor  # (B, d, d), of the errors, by the scatter over draws of noise
    residual_covariance: torch.Tensor  # (B, d, d), of the errors if residuals were entirely due to control error
    loss: torch.Tensor  # (B,), of likelihood_loss at its lowest
    iterations: torch.Tensor  # (B,), of the best valley
    others: list  # of B lists: the controls (d numbers each) of other valleys, the best first
    flags: list  # of B lists of FLAGS
    error_scale: torch.Tensor  # (d,), share of residual_covariance's standard deviations that is real, as calibrated
    error_floor: torch.Tensor  # (d,), standard deviations of the model's own errors, whatever the residuals
    calibrated: bool = True  # whether error_scale and error_floor were learned; without them there are no error bars
    unexplained_share: torch.Tensor | None = None  # (B,), share of the loss without a control that is left
    model_calls: float = 0.0  # pictures that the model was evaluated on, per target
    seconds: float = 0.0  # per target
    reach: torch.Tensor | None = None  # (B, d), distance of other changes that explain the pictures as well; 0: none
    relief: torch.Tensor | None = None  # (B, d), share of each number's variance that other opinions take away
    unmoved: torch.Tensor | None = None  # (B, d), the control before other opinions moved it
    periods: tuple = ()  # of the d numbers, None where one does not go round; (): none does
    middle: tuple | float = 0.0  # of the circles that periodic numbers are told in

    @staticmethod
    def cat(readings):
        """Returns: the Reading of all targets of some Readings by one control, on the CPU."""
        keys = ["control", "noise_covariance", "residual_covariance", "loss"]
        keys += [key for key in ("unexplained_share", "relief", "unmoved") if getattr(readings[0], key) is not None]
        joined = {key: torch.cat([getattr(own, key) for own in readings]).cpu() for key in keys}
        lists = {key: [one for own in readings for one in getattr(own, key)] for key in ("others", "flags")}
        return replace(readings[0], iterations=None, **joined, **lists)

    def exchange(self, i, other):
        """Returns: this Reading with target i as `other` has it, a Reading of that alone."""
        parts = dict(model_calls=self.model_calls + other.model_calls / len(self.control))
        for key in ("control", "noise_covariance", "residual_covariance", "loss", "iterations", "unexplained_share"):
            parts[key] = getattr(self, key).clone()
            (parts[key][i],) = getattr(other, key)
        for key in ("others", "flags"):
            parts[key] = [*getattr(self, key)]
            (parts[key][i],) = getattr(other, key)
        return replace(self, **parts)

    @property
    def largest_std(self):
        """(d,), as largest_std has it."""
        return largest_std(self.periods or [None] * len(self.error_scale)).to(self.error_scale)

    @property
    def covariance(self):
        """(B, d, d), of the errors; zero for numbers that were known."""
        scale, sought = torch.diag(self.error_scale), self.residual_covariance.diagonal(dim1=1, dim2=2) > 0
        floor = torch.diag_embed(self.error_floor.square() * sought)
        covariance = self.noise_covariance + scale @ self.residual_covariance @ scale + floor
        std = covariance.diagonal(dim1=1, dim2=2).sqrt()
        factor = torch.minimum(torch.ones_like(std), self.largest_std / std)
        if self.relief is not None:
            factor = factor * (1 - self.relief).sqrt()
        if self.reach is not None:
            factor = factor * (self.reach / (Z90 * std * factor)).nan_to_num(1).clamp_min(1)
        factor = torch.minimum(factor, self.largest_std / std)
        return factor[:, :, None] * covariance * factor[:, None]

    def with_opinion(self, control, std, correlation=0.0):
        """Take other estimates into account, each as much as its variance allows.

        control, std: (B, d), the estimates; an infinite std says nothing. correlation: of their errors with ours, from
        0 to below 1, so that of two that err alike the worse adds nothing.
        Returns: Reading. Source: Bates & Granger 1969, the combination of forecasts.
        """
        variance = self.std.square()
        both = torch.where(std.isfinite(), correlation * self.std * std, 0)  # their covariance
        share = ((variance - both) / (variance + std.square() - 2 * both)).nan_to_num(0).clamp(0, 1)
        moved = self.control + share * wrap(control - self.control, self.periods)
        moved = wrap(moved, self.periods, moved.new_tensor(self.middle))
        theirs = torch.where(share > 0, share * std, 0)  # of the errors that remain
        left = ((1 - share) * self.std).square() + theirs.square() + 2 * share * (1 - share) * both
        taken = torch.where(variance > 0, 1 - left / variance, 0)
        relief = taken if self.relief is None else 1 - (1 - self.relief) * (1 - taken)
        return replace(self, control=moved, relief=relief, unmoved=self.lowest)

    @property
    def lowest(self):
        """(B, d), where the loss is lowest."""
        return self.control if self.unmoved is None else self.unmoved

    @property
    def std(self):
        """(B, d), standard errors."""
        return self.covariance.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def given(self):
        """(B, d) bool, whether a number was known."""
        noise, residual = (own.diagonal(dim1=1, dim2=2) for own in (self.noise_covariance, self.residual_covariance))
        return (noise == 0) & (residual == 0)

    @property
    def anywhere(self):
        """(B, d) bool, whether a periodic number may lie anywhere on its circle."""
        return is_anywhere(self.std, self.largest_std)

    @property
    def margin(self):
        """(B, d), half the width of interval90."""
        return half_interval(self.std, self.largest_std)

    @property
    def interval90(self):
        """(B, d, 2), [low, high]; low is above high where the interval runs through the seam of a circle."""
        middle = self.control.new_tensor(self.middle)
        ends = (
            torch.where(self.anywhere, middle + side, wrap(self.control + side, self.periods, middle))
            for side in (-self.margin, self.margin)
        )
        return torch.stack([*ends], 2)


def largest_std(periods):
    """Returns: (d,) float64, standard error of a periodic number of which nothing is known; infinite of others."""
    return torch.tensor([period / 12**0.5 if period else math.inf for period in periods], dtype=torch.float64)


def is_anywhere(std, largest):
    """std: (..., d). largest: (d,), of largest_std. Returns: (..., d) bool, whether a number may lie all round."""
    return std > 0.999 * largest


def half_interval(std, largest):
    """As is_anywhere. Returns: (..., d), half of the 90% interval, which may be the whole circle."""
    return torch.where(is_anywhere(std, largest), 3**0.5 * largest, Z90 * std)


def decimals(std):
    """Returns: how many decimals tell two digits of a standard error; three at least, ten at most."""
    return 3 if not 0 < std < math.inf else min(10, max(3, 1 - math.floor(math.log10(std))))


def tell_value(value, std=None):
    """Returns: a number as text, with its standard error if that is known."""
    small = std if std else abs(value)
    digits = "g" if 0 < small < (1e-9 if std else 5e-3) else f".{decimals(std or 0)}f"
    return f"{value:+{digits}}" + ("" if std is None else f" ± {std:{digits}}")


def widen(std, scale, floor):
    """std: (B, d), as an estimate claims them. scale, floor: d numbers, learned. Returns: (B, d), as they are."""
    return torch.hypot(std * torch.as_tensor(scale).to(std), torch.as_tensor(floor).to(std))


def standard_errors(found, paired, width):
    """Estimate the errors of a Solution's free numbers.

    paired: whether every two draws have opposite noise. width: (f,), of the searched range.
    Returns: two covariances, (P, f, f) each: White's sandwich estimator over draws of noise; and the covariance if the
    residuals were entirely due to control error, whatever their number. A number without effect may be anywhere.
    """
    gradients = rearrange(found.gradients, "p (k two) f -> p k two f", two=2).mean(2) if paired else found.gradients
    gradients = gradients.double() * width  # in units of the range: the numbers may be of very different sizes
    curvature, loss = found.curvature.double() * width[:, None] * width, found.loss[:, None]
    count = gradients.shape[1]
    scatter = einsum(gradients, gradients, "p k e, p k f -> p e f") / (count * max(count - 1, 1))
    inverse = torch.linalg.pinv(curvature, hermitian=True)
    noise = inverse @ scatter @ inverse
    idle = curvature.diagonal(dim1=1, dim2=2) <= NO_EFFECT * loss
    noise = noise.masked_fill(idle[:, :, None] | idle[:, None], 0) + torch.diag_embed(idle.to(noise))
    units = width[:, None] * width
    return (noise * units).to(width), (loss[:, :, None] * inverse * units).to(width)


def is_guess(config, reading):
    """Returns: (B, d) bool, of a calibrated Reading, which numbers a guess would tell as well."""
    low, high = (reading.margin.new_tensor(ends) for ends in (config.control_low, config.control_high))
    never = torch.tensor(config.guessed or [False] * len(low), device=low.device)
    return ((2 * replace(reading, reach=None).margin >= GUESS * (high - low)) | never) & ~reading.given


def is_outside(config, control, std):
    """control, std: (B, d); std 0: the number was known, and does not count; nor does a periodic one.

    Returns: (B,) bool, whether a number lies further beyond the trained range than its 90% interval, or than OUTSIDE.
    """
    low, high = control.new_tensor(config.control_low), control.new_tensor(config.control_high)
    slack = torch.minimum(Z90 * std, OUTSIDE * (high - low))
    has_ends = torch.tensor([not period for period in config.periods], device=control.device)
    return (((control < low - slack) | (control > high + slack)) & (std > 0) & has_ends).any(1)


def is_ambiguous(losses, paired):
    """losses: (V, K), of one target's valleys, the best first. Returns: whether the second is about as good."""
    if len(losses) < 2:
        return False
    difference = losses[1] - losses[0]  # (K,)
    difference = rearrange(difference, "(k two) -> k two", two=2).mean(1) if paired else difference
    chance = difference.std(correction=min(1, len(difference) - 1)) / len(difference) ** 0.5
    return bool(difference.mean() < max(2 * chance, AMBIGUOUS * losses[0].mean()))


def raise_flags(count, **conditions):
    """conditions: {one of FLAGS: B booleans}. Returns: a list of flags for each of B = count targets."""
    return [[name for name, holds in conditions.items() if holds[i]] for i in range(count)]


def flag_inversion(config, control, loss, settled):
    """control: (d,), found by generating at a sampling loss. settled: whether it had. Returns: list of FLAGS."""
    raised = {"unsettled": not settled, "uncalibrated": config.sampling_loss is None}
    if config.control_low is not None:
        raised["outside_range"] = is_outside(config, control[None], torch.full_like(control[None], math.inf))[0]
    raised["unexplained"] = loss > (math.inf if config.sampling_loss is None else config.sampling_loss)
    return [name for name, holds in raised.items() if holds]
