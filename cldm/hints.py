"""Hints: 3-layer MLPs that turn a control vector into the ControlNet's first features, in place of the hint CNN.

A periodic number, such as an hour of the clock, comes back to the same after its period. It enters as sine and cosine.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ldm.settings import InputError

# hint type -> widths of its MLP's two hidden layers
HINTS = {"coordinate": (256, 256), "dense": (256, 64), "original": (256, 512), "reference": (256, 256)}


def wrap(values, periods, middle=0.0):
    """Bring periodic numbers within half a period of `middle`; without one, differences, which are then the shortest.

    values: (..., d). periods: d numbers, None where a number does not go round; or nothing at all. middle: a number or
    (..., d). Returns: (..., d), from middle - period / 2, included, to middle + period / 2.
    """
    if not any(periods):
        return values
    goes_round, period = (values.new_tensor(own) for own in ([*map(bool, periods)], [p or 1.0 for p in periods]))
    turns = ((values - middle) / period + 0.5).floor()
    return torch.where(goes_round.bool(), values - turns * period, values)


def circle_middle(controls, periods):
    """Choose the circle that periodic numbers are told in: around zero if training's are, else from zero on.

    controls: (N, d) numbers of training. periods: as in wrap. Returns: (d,), the middles; 0 of numbers without period.
    """
    controls = torch.as_tensor(controls, dtype=torch.float64)
    half = controls.new_tensor([(period or 0.0) / 2 for period in periods] or 0.0)
    around_zero = (controls < 0).any(0) & (controls.abs() <= half).all(0)
    return torch.where(around_zero, 0, half)


def encode(control, mean, std, periods):
    """Returns: (..., d + p) what an MLP is given: normalised numbers, of periodic ones sine and cosine of spread 1.

    control: (..., d). mean, std: d numbers, not tensors, which a GPU would have to wait for. periods: as in wrap.
    """
    columns = []
    for number, middle, spread, period in zip(control.unbind(-1), mean, std, periods):
        phase = 2 * math.pi * number / (period or 1.0)
        columns += [2**0.5 * phase.sin(), 2**0.5 * phase.cos()] if period else [(number - middle) / spread]
    return torch.stack(columns, -1)


def decode(encoded, config):
    """Undo NumericControlNet.normalize. encoded: (..., d + p). config: the control's. Returns: (..., d)."""
    columns, rest = [], [*encoded.unbind(-1)]
    for period, mean, std in zip(config.periods, config.control_mean, config.control_std):
        if period:
            columns.append(torch.atan2(rest.pop(0), rest.pop(0)) * period / (2 * math.pi))
        else:
            columns.append(mean + std * rest.pop(0))
    control = torch.stack(columns, -1)
    return wrap(control, config.periods, control.new_tensor(config.control_mean))


def fourier_positions(height, width, octaves, device):
    """Positions from -1 to 1 between the outermost of the longer side, with sines and cosines at `octaves` frequencies.

    Without these an MLP is slow to learn detail.
    Returns: (2 + 4 octaves, height, width). Source: Tancik et al. 2020, Fourier features.
    """
    longer = max(height, width, 2) - 1
    y, x = torch.meshgrid(
        *((2 * torch.arange(n, device=device) - n + 1) / longer for n in (height, width)), indexing="ij"
    )
    phases = [2**k * math.pi * axis for k in range(octaves) for axis in (x, y)]
    return torch.stack([x, y, *map(torch.sin, phases), *map(torch.cos, phases)])


def make_mlp(layer, inputs, hidden, outputs, activation=nn.SiLU):
    """Returns: three layers with activations between them, initialised to keep the variance of the control.

    layer: function(inputs, outputs) -> nn.Module with weight and bias. PyTorch's own initialisation would shrink the
    variance twentyfold.
    """
    widths = (inputs, *hidden, outputs)
    layers = [layer(*pair) for pair in zip(widths, widths[1:])]
    for each in layers:
        nn.init.kaiming_normal_(each.weight)
        nn.init.zeros_(each.bias)
    return nn.Sequential(layers[0], activation(), layers[1], activation(), layers[2])


class Hint(nn.Module):
    """What a control adds to the ControlNet's first features.

    The part that sees the number stays in float32, outside autocast: half precision would round the number itself.
    """

    output_dtype = None  # of the features: that of the ControlNet's other weights; None: that of the hint's own
    repeats = 1  # noisy pictures to every control, one after the other

    def forward(self, condition):
        """condition: (B, inputs, h, w), the encoded control, constant over h and w.

        Returns: (B repeats, channels, h, w).
        """
        features = self.features(condition).to(self.output_dtype or self.mlp[0].weight.dtype)
        return features.repeat_interleave(self.repeats, 0) if self.repeats > 1 else features


class CoordinateHint(Hint):
    """An MLP evaluated at every latent position on (control, x, y): any resolution, few weights."""

    def __init__(self, inputs, channels, hidden, octaves):
        super().__init__()
        self.octaves = octaves
        self.mlp = make_mlp(lambda i, o: nn.Conv2d(i, o, 1), inputs + 2 + 4 * octaves, hidden, channels)

    def features(self, condition):
        positions = fourier_positions(*condition.shape[2:], self.octaves, condition.device)
        first, *rest = self.mlp
        weights = first.weight.split([condition.shape[1], len(positions)], 1)
        with torch.autocast(condition.device.type, enabled=False):
            # not as a convolution: GPUs round those to TF32
            of_number = F.linear(condition[:, :, 0, 0], weights[0].flatten(1))[:, :, None, None]
            hidden = F.conv2d(positions.to(condition.dtype)[None], weights[1], first.bias) + of_number
            return nn.Sequential(*rest)(hidden)


class DenseHint(Hint):
    """An MLP from the control to the whole feature map, for one latent size only.

    original: with ReLU after every layer, the last included, as in the original fork; otherwise SiLU between layers.
    """

    def __init__(self, inputs, channels, hidden, latent_size, original):
        super().__init__()
        self.shape = (channels, latent_size, latent_size)
        activation = nn.ReLU if original else nn.SiLU
        self.mlp = make_mlp(nn.Linear, inputs, hidden, channels * latent_size**2, activation)
        if original:
            self.mlp.append(nn.ReLU())

    def features(self, condition):
        if condition.shape[2:] != self.shape[1:]:
            expected, found = (" x ".join(map(str, shape)) for shape in (self.shape[1:], condition.shape[2:]))
            raise InputError(f"this hint was made for latents of {expected}, got {found}: use hint=coordinate")
        with torch.autocast(condition.device.type, enabled=False):
            return self.mlp(condition[:, :, 0, 0]).unflatten(1, self.shape)
