"""Where the places of one picture are in another: features of latents by which they are found."""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from einops import einsum, rearrange
from torch import nn

MATCHER_FILE = "matcher.safetensors"  # in the folder of a base, for whose latents it was trained
SIDES = 8, 32  # of the latents that are looked at; larger ones are averaged to the second, smaller ones enlarged
WIDTHS = 64, 96  # channels there, and at a half of it
GROUPS = 16
# The reference is compared with the target at both sides, finely and coarsely:
REACHES = 4, 5  # places to each side
HEADS = 1, 2  # parts of the features that are compared each by itself
KEYS = 32, 96  # features
SHARPNESS = 10.0  # what cosines are multiplied by; learned, it stayed there


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
    Returns: (B, heads, (2 reach + 1)^2, h, w), cosines, 0 beyond the picture.
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
    return rearrange(near, "b n (h w) m -> b n m h w", h=size[0])


def spread_over(moves, reach):
    """moves: (B, 2, h, w), x and y in places. Returns: (B, (2 reach + 1)^2, h, w), their weights among whole moves."""
    side = 2 * reach + 1
    place = (moves + reach).clamp(0, side - 1 - 1e-3)
    shares = torch.zeros(len(moves), side**2, *moves.shape[2:], device=moves.device)
    (x, y), (right, down) = place.floor().unbind(1), place.frac().unbind(1)
    for across, beside in ((0, 1 - right), (1, right)):
        for along, above in ((0, 1 - down), (1, down)):
            index = ((y + along) * side + x + across).long()
            shares.scatter_add_(1, index[:, None], (beside * above)[:, None])
    return shares


class Matcher(nn.Module):
    """Finds the places of a target in a reference, finely and coarsely.

    channels: of their latents. compares: whether there is a reference; without, `encode` is all that it does.
    """

    def __init__(self, channels, compares=True):
        super().__init__()
        first, width = WIDTHS
        self.first = nn.Conv2d(channels, first, 3, padding=1)
        self.encoder = nn.ModuleList([blocks(first, first), blocks(first, width, width, width)])
        if compares:
            self.keys = nn.ModuleList(
                nn.Sequential(nn.GroupNorm(GROUPS, own), nn.SiLU(), nn.Conv2d(own, key, 1))
                for own, key in zip(WIDTHS, KEYS)
            )

    def encode(self, latents):
        """Returns: features at both sides."""
        size = [min(max(extent, SIDES[0]), SIDES[1]) // 2 * 2 for extent in latents.shape[2:]]
        fine = run(self.encoder[0], self.first(F.adaptive_avg_pool2d(latents, size)))
        return fine, run(self.encoder[1], fine)

    def compare(self, target, reference):
        """target, reference: what `encode` returns. Returns: logits (B, heads, (2 reach + 1)^2, h, w) of both sides."""
        return [
            SHARPNESS * compare(key(after), key(before), heads, reach).float()  # moves have more digits than bfloat16
            for key, after, before, heads, reach in zip(self.keys, target, reference, HEADS, REACHES)
        ]

    @staticmethod
    def flow(logits, reach):
        """Returns: (B, 2 * heads, h, w), expected moves to the right and down, as shares of the reach."""
        steps = torch.arange(-reach, reach + 1, device=logits.device, dtype=logits.dtype) / reach
        moves = torch.stack(torch.meshgrid(steps, steps, indexing="xy")).flatten(1)
        with torch.autocast(logits.device.type, enabled=False):
            return einsum(logits.softmax(2), moves, "b n m h w, k m -> b n k h w").flatten(1, 2)

    def loss(self, latents, moves, seen):
        """latents: (B, 2, C, h, w), of targets and references. moves: (B, 2, h, w), where what a place of a target
        shows lies in the reference, x and y from there, in latents. seen: (B, h, w) bool, whether it does.

        Returns: nats, the mean of both sides' cross entropies, over places that are within reach.
        """
        losses = []
        target, reference = (self.encode(own) for own in latents.unbind(1))
        for logits, reach in zip(self.compare(target, reference), REACHES):
            size, own = logits.shape[3:], moves.shape[3]
            known = F.adaptive_avg_pool2d(seen[:, None].to(moves.dtype), size)
            mean = F.adaptive_avg_pool2d(moves * seen[:, None], size) / known.clamp_min(0.1) * size[1] / own
            within = (known[:, 0] > 0.6) & (mean.abs() < reach).all(1)
            shares = spread_over(mean, reach)[:, None]
            entropies = -(shares * logits.log_softmax(2)).sum(2).mean(1)
            losses.append(entropies[within].sum() / within.sum().clamp_min(1))
        return sum(losses)
