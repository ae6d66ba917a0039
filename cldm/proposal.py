"""Numbers that pictures suggest at a glance: a small network that says where to start, and how sure it is."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from cldm.hints import decode
from cldm.matcher import GROUPS, HEADS, REACHES, SHARPNESS, WIDTHS, Matcher, blocks, run

LOUDNESS, MOVED = 4 / SHARPNESS, 6.0  # of comparisons and of moves, for features of spread 1
NEAR, MOVING = 32, 64  # channels that fine comparisons become, and moves
WIDTH = 192  # channels at a quarter of the side, beyond a Matcher's
POOLED, HIDDEN = 4, 256  # places to a side that the last layers see; width between them
JOINED = 4  # of the last layers have pooled, when moves join
NOISE = 0.1  # added to latents in training, whose spread is 1
ERASED, ERASED_SIDES = 0.5, (0.125, 0.5)  # share of rows that lose a rectangle in training; shares of a side, its own
LEAST_STD = 0.01  # of a component, in units of a number's spread


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


class Proposal(Matcher):
    """A mixture of Gaussians over numbers, given latents of a target, and of a reference where there is one.

    With a reference, both are compared place by place. inputs: of an encoded control, as NumericControlNet.normalize
    has it. channels: of latents. components: K. flows: with a reference, whether the last layers see what moved where.
    Source: Bishop 1994, mixture density networks; He et al. 2016, residual networks.
    """

    def __init__(self, inputs, channels, components, uses_reference, flows):
        super().__init__(channels, uses_reference)
        self.shape, self.ends = (components, 1 + 2 * inputs), [1, 1 + inputs]
        self.uses_reference, self.flows, width = uses_reference, flows, WIDTHS[1]
        pool = nn.AdaptiveAvgPool2d(POOLED), nn.Flatten()
        if uses_reference:
            fine, coarse = (heads * (2 * reach + 1) ** 2 for heads, reach in zip(HEADS, REACHES))
            halve = nn.Conv2d(NEAR, width, 3, 2, 1)
            self.near = nn.ModuleList(
                [nn.Sequential(nn.Conv2d(fine, NEAR, 1), nn.SiLU(), halve), nn.Conv2d(coarse, width, 1)]
            )
            self.merge = nn.Conv2d(2 * width, width, 1)
        if flows:
            sides = nn.Conv2d(2 * sum(HEADS), MOVING, 3, 2, 1), nn.Conv2d(MOVING, MOVING, 3, 2, 1)
            self.moves = nn.Sequential(sides[0], nn.SiLU(), sides[1], nn.SiLU(), *pool)
        self.trunk = blocks(width, width, width, WIDTH, WIDTH, WIDTH)
        self.head = nn.Sequential(
            nn.GroupNorm(GROUPS, WIDTH),
            nn.SiLU(),
            *pool,
            nn.Linear((WIDTH + MOVING * flows) * POOLED**2, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, math.prod(self.shape)),
        )

    def forward(self, latents, reference=None):
        """latents, reference: (B, C, h, w). Returns: log weights (B, K), means and spreads (B, K, inputs), encoded."""
        after, moves = self.encode(latents), []
        hidden = after[-1]
        if self.uses_reference:
            before = self.encode(reference)
            hidden = self.merge(torch.cat([before[-1], hidden], 1))
            for part, logits, reach in zip(self.near, self.compare(after, before), REACHES):
                hidden = hidden + part((LOUDNESS * logits).flatten(1, 2).to(hidden.dtype))
                if self.flows:
                    moves.append(F.adaptive_avg_pool2d(MOVED * self.flow(logits, reach), hidden.shape[2:]))
        hidden = run(self.trunk, hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # numbers have more digits than bfloat16
            seen = self.head[:JOINED](hidden.to(self.head[-1].weight.dtype))
            if self.flows:
                seen = torch.cat([seen, self.moves(torch.cat(moves, 1).to(seen.dtype))], 1)
            seen = self.head[JOINED:](seen).float().unflatten(1, self.shape)
        weights, mean, log_std = seen.tensor_split(self.ends, 2)
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
            if period:  # as if sine and cosine were spread alike in all directions
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
