"""Numbers that pictures suggest at a glance: a small network that says where to start, and how sure it is."""

import math

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from cldm.hints import decode

WIDTHS = 64, 128, 256, 256  # channels at the latents' resolution, and at a half, a quarter, an eighth of it
GROUPS = 16
NOISE = 0.1  # added to latents in training, whose spread is 1
LEAST_STD = 0.01  # of a component, in units of a number's spread


class Proposal(nn.Module):
    """A mixture of Gaussians over numbers, given latents of a target, and of a reference where there is one.

    inputs: of an encoded control, as NumericControlNet.normalize has it. channels: of all latents. components: K.
    Source: Bishop 1994, mixture density networks; He et al. 2016, residual networks.
    """

    def __init__(self, inputs, channels, components):
        super().__init__()
        self.shape, self.ends = (components, 1 + 2 * inputs), [1, 1 + inputs]
        parts, before = [nn.Conv2d(channels, WIDTHS[0], 3, padding=1)], WIDTHS[0]
        for width in WIDTHS[1:]:
            for own in (dict(in_channels=before, down=True), dict(in_channels=width)):
                parts.append(ResnetBlock2D(**own, out_channels=width, temb_channels=None, groups=GROUPS))
            before = width
        self.trunk = nn.ModuleList(parts)
        self.head = nn.Sequential(nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(before, math.prod(self.shape))

    def forward(self, latents):
        """latents: (B, channels, h, w). Returns: log weights (B, K), means and spreads (B, K, inputs), encoded."""
        hidden = self.trunk[0](latents)
        for block in self.trunk[1:]:
            hidden = block(hidden, None)
        hidden = self.head(hidden).to(self.last.weight.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            weights, mean, log_std = self.last(hidden).float().unflatten(1, self.shape).tensor_split(self.ends, 2)
        return weights.squeeze(2).log_softmax(1), mean, log_std.exp() + LEAST_STD

    @staticmethod
    def moments(weights, mean, std, config):
        """weights, mean, std: as `forward` returns them. config: the control's.

        Returns: the mixture's means and standard deviations in the numbers' units, (B, d) each; of a periodic number,
        that of nothing known at most.
        """
        shares = weights.exp()[..., None]
        middle = (shares * mean).sum(1)
        variance = (shares * (std.square() + mean.square())).sum(1) - middle.square()
        spreads, columns = [], [*zip(middle.unbind(1), variance.unbind(1))]
        for period, unit in zip(config.periods, config.control_std):
            (centre, own), *columns = columns
            if period:  # across the direction that sine and cosine point to
                (other, its), *columns = columns
                angle = ((own + its) / 2).sqrt() / torch.hypot(centre, other).clamp_min(1e-6)
                spreads.append((angle * period / (2 * math.pi)).clamp_max(period / 12**0.5))
            else:
                spreads.append(own.sqrt() * unit)
        return decode(middle.double(), config), torch.stack(spreads, 1).double()

    def loss(self, latents, noise, control):
        """noise: as latents, of spread 1. control: (B, inputs), the truth, encoded. Returns: (B,), nats a number."""
        weights, mean, std = self(latents + NOISE * noise)
        each = -((control[:, None] - mean) / std).square() / 2 - std.log()
        return -(weights + each.sum(2)).logsumexp(1) / control.shape[1]
