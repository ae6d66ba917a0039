"""Numbers that pictures suggest at a glance: a small network that says where to start, and how sure it is."""

import math

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import nn

from cldm.hints import decode

SIDES = 8, 32  # of the latents that are looked at; larger ones are averaged to the second, smaller ones enlarged
WIDTHS = 64, 96, 192  # channels there, and at a half and a quarter of it
GROUPS = 16
# The reference is compared with the target at the first two sides, finely and coarsely:
REACHES = 4, 5  # places to each side
HEADS = 1, 2  # parts of the features that are compared each by itself
KEYS = 32, 96  # features
SHARPNESS = 4.0  # of a comparison, cosines beside features of spread 1
POOLED, HIDDEN = 4, 256  # places to a side that the last layers see; width between them
NOISE = 0.1  # added to latents in training, whose spread is 1
ERASED, ERASED_SIDES = 0.5, (0.125, 0.5)  # share of rows that lose a rectangle in training; shares of a side, its own
LEAST_STD = 0.01  # of a component, in units of a number's spread


def blocks(before, *widths):
    """Returns: residual blocks, each of which halves the side if it changes the width."""
    parts = []
    for width in widths:
        own = dict(in_channels=before, out_channels=width, down=width != before)
        parts.append(ResnetBlock2D(**own, temb_channels=None, groups=GROUPS))
        before = width
    return nn.ModuleList(parts)


def run(parts, hidden):
    for part in parts:
        hidden = part(hidden, None)
    return hidden


def compare(target, reference, heads, reach):
    """Compare every place of the target with those around it in the reference.

    target, reference: (B, C, h, w). heads: groups of the C features. reach: places to each side.
    Returns: (B, heads * (2 reach + 1)^2, h, w), cosines, 0 beyond the picture.
    Source: Dosovitskiy et al. 2015, FlowNet's correlation layer.
    """
    size, device = target.shape[2:], target.device
    target, reference = (
        F.normalize(rearrange(own, "b (n c) h w -> b n (h w) c", n=heads), dim=3) for own in (target, reference)
    )
    every = target @ reference.transpose(2, 3)  # (B, n, places of the target, places of the reference)
    moves = torch.arange(-reach, reach + 1, device=device)
    y, x = (torch.arange(extent, device=device)[:, None] + moves for extent in size)  # (h, m), (w, m)
    inside = rearrange((y >= 0) & (y < size[0]), "h m -> h 1 m 1") & rearrange((x >= 0) & (x < size[1]), "w k -> w 1 k")
    place = rearrange(y.clamp(0, size[0] - 1) * size[1], "h m -> h 1 m 1")
    place = place + rearrange(x.clamp(0, size[1] - 1), "w k -> w 1 k")
    place, inside = (rearrange(own, "h w m k -> (h w) (m k)") for own in (place, inside))
    near = every.gather(3, place.expand(*every.shape[:2], -1, -1)) * inside.to(every.dtype)
    return rearrange(near, "b n (h w) m -> b (n m) h w", h=size[0])


def hide(latents, noise, draws):
    """Replace a rectangle of some rows by noise, so that no single place tells a number.

    latents, noise: (B, pictures, C, h, w); every picture of a row loses the same place. draws: (B, 5), from 0 to 1.
    Returns: as latents. Source: Zhong et al. 2020, random erasing.
    """
    chosen, places = draws[:, :1] < ERASED, []
    least, most = ERASED_SIDES
    for extent, side, start in zip(latents.shape[3:], draws[:, 1:3].T, draws[:, 3:].T):
        side = least + (most - least) * side
        first = (start * (1 - side))[:, None]
        middles = (torch.arange(extent, device=draws.device) + 0.5) / extent
        places.append((middles >= first) & (middles < first + side[:, None]) & chosen)
    y, x = places
    return torch.where(rearrange(y, "b h -> b 1 1 h 1") & rearrange(x, "b w -> b 1 1 1 w"), noise, latents)


class Proposal(nn.Module):
    """A mixture of Gaussians over numbers, given latents of a target, and of a reference where there is one.

    With a reference, both go through one encoder, and their features are compared place by place.
    inputs: of an encoded control, as NumericControlNet.normalize has it. channels: of latents. components: K.
    Source: Bishop 1994, mixture density networks; He et al. 2016, residual networks.
    """

    def __init__(self, inputs, channels, components, uses_reference):
        super().__init__()
        self.shape, self.ends = (components, 1 + 2 * inputs), [1, 1 + inputs]
        first, width, last = WIDTHS
        self.first = nn.Conv2d(channels, first, 3, padding=1)
        self.encoder = nn.ModuleList([blocks(first, first), blocks(first, width, width, width)])
        self.uses_reference = uses_reference
        if uses_reference:
            fine, coarse = (heads * (2 * reach + 1) ** 2 for heads, reach in zip(HEADS, REACHES))
            self.keys = nn.ModuleList(
                nn.Sequential(nn.GroupNorm(GROUPS, own), nn.SiLU(), nn.Conv2d(own, key, 1))
                for own, key in zip(WIDTHS, KEYS)
            )
            halve = nn.Conv2d(KEYS[0], width, 3, 2, 1)
            self.near = nn.ModuleList(
                [nn.Sequential(nn.Conv2d(fine, KEYS[0], 1), nn.SiLU(), halve), nn.Conv2d(coarse, width, 1)]
            )
            self.merge = nn.Conv2d(2 * width, width, 1)
        self.trunk = blocks(width, width, width, last, last, last)
        self.head = nn.Sequential(
            nn.GroupNorm(GROUPS, last),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(POOLED),
            nn.Flatten(),
            nn.Linear(last * POOLED**2, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, math.prod(self.shape)),
        )

    def encode(self, latents):
        """Returns: features at the first two sides."""
        size = [min(max(extent, SIDES[0]), SIDES[1]) // 2 * 2 for extent in latents.shape[2:]]
        fine = run(self.encoder[0], self.first(F.adaptive_avg_pool2d(latents, size)))
        return fine, run(self.encoder[1], fine)

    def forward(self, latents, reference=None):
        """latents, reference: (B, C, h, w). Returns: log weights (B, K), means and spreads (B, K, inputs), encoded."""
        after = self.encode(latents)
        hidden = after[-1]
        if self.uses_reference:
            before = self.encode(reference)
            hidden = self.merge(torch.cat([before[-1], hidden], 1))
            for part, key, *both, heads, reach in zip(self.near, self.keys, after, before, HEADS, REACHES):
                near = compare(*map(key, both), heads, reach)
                hidden = hidden + part(SHARPNESS * near.to(hidden.dtype))
        hidden = run(self.trunk, hidden).to(self.head[-1].weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # numbers have more digits than bfloat16
            weights, mean, log_std = self.head(hidden).float().unflatten(1, self.shape).tensor_split(self.ends, 2)
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

    def loss(self, latents, noise, draws, control):
        """latents: (B, pictures, C, h, w), of a target, and of a reference where there is one. noise: as latents, of
        spread 1. draws: as `hide` has them.
        control: (B, inputs), the truth, encoded. Returns: (B,), nats a number.
        """
        weights, mean, std = self(*hide(latents + NOISE * noise, noise, draws).unbind(1))
        each = -((control[:, None] - mean) / std).square() / 2 - std.log()
        return -(weights + each.sum(2)).logsumexp(1) / control.shape[1]
