"""Picture A: how a control moves and changes a reference picture, and how a reference is matched to a target."""

import torch
from diffusers.models.attention import BasicTransformerBlock
from einops import einsum, rearrange
from torch import nn
from torch.nn import functional as F

from cldm.hints import Hint, fourier_positions, make_mlp
from cldm.objective import Objective
from cldm.solvers import keep_rivals, levenberg_marquardt

FUSIONS = "affine", "attention", "both"  # how a reference's features come to where the target shows them
FEATURES = 64  # channels of a reference's features
WIDTH, HEADS = 128, 4  # of a ViewTransformer, and its blocks, on the tokens of the reference and of the target
REFERENCE_BLOCKS, TARGET_BLOCKS, OCTAVES = 2, 4, 4
STILL = 0.25  # latents: a number that moves the reference less, over half its range, does not move it
MATCHES = 64  # places tried; the best REFINED are refined
REFINED = 8
RIVALS = 2  # places where the reference matches the target, at most, that the model then chooses from
COARSEST = 8  # squares along a side that latents are averaged over at first


class ReferenceHint(Hint):
    """What a change does to a reference picture: its features, moved and scaled as a 3-layer MLP on the control says.

    Affine map from positions in the target to positions in the reference: exp(sum_i c_i G_i + MLP(c)), with G_i learned
    2x3 generators of the affine group. Where a number goes round it is 1 + sum_i c_i G_i + MLP(c): the exponent of a
    whole turn would have to leap from half a turn to minus half a turn. The MLP's other outputs scale and shift the
    features before each of two convolutions.
    fusion: one of FUSIONS; "both": a ViewTransformer's features beside those that were moved; "attention": alone.
    draft: (B, C, h, w), the target's latents as the ViewTransformer saw them in the last call of a training.
    Source: Jaderberg et al. 2015, spatial transformers; Perez et al. 2018, FiLM.
    """

    def __init__(self, inputs, channels, hidden, latent_channels, goes_round=False, fusion="affine"):
        super().__init__()
        self.inputs, self.goes_round, self.fusion, self.draft = inputs, goes_round, fusion, None
        width = (FEATURES + 1) * (fusion != "attention") + FEATURES * (fusion != "affine")
        self.widths = (6, *2 * [width], *2 * [2 * FEATURES])
        self.mlp = make_mlp(nn.Linear, inputs, hidden, sum(self.widths))
        nn.init.normal_(self.mlp[-1].weight, std=1e-3)  # hardly any change at first
        self.generators = nn.Linear(inputs, 6, bias=False)
        nn.init.zeros_(self.generators.weight)
        self.extract = nn.Sequential(  # to twice the resolution, to tell positions between two latents apart
            nn.Conv2d(latent_channels, 2 * FEATURES, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * FEATURES, 4 * FEATURES, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.mix = nn.Conv2d(width, 2 * FEATURES, 3, padding=1)
        self.out = nn.Conv2d(2 * FEATURES, channels, 3, padding=1)
        if fusion != "affine":
            self.view = ViewTransformer(inputs, hidden, latent_channels)
            self.sketch = nn.Conv2d(FEATURES, latent_channels, 1)

    def features(self, condition):
        control, reference = condition[:, : self.inputs, 0, 0], condition[:, self.inputs :]
        positions, inside, modulation = self.motion(control, *reference.shape[2:])
        scale, shift, scale2, shift2 = (rearrange(part, "b c -> b c 1 1") for part in modulation)
        parts = []
        if self.fusion != "attention":
            parts += [sample_bilinear(self.extract(reference), 2 * positions + 0.5), inside]
        if self.fusion != "affine":
            parts.append(self.view(control, reference))
            self.draft = self.sketch(parts[-1]) if self.training else None
        moved = torch.cat(parts, 1) * (1 + scale) + shift
        mixed = self.mix(F.silu(moved)) * (1 + scale2) + shift2
        return self.out(F.silu(mixed))

    def motion(self, control, height, width):
        """control: (B, inputs), encoded. height, width: of the latents.

        Returns: x and y, in latents of the reference, of every latent of the target (B, 2, h, w); how far inside the
        reference that is, from 0 to 1 (B, 1, h, w); scales and shifts of the features.
        """
        with torch.autocast(control.device.type, enabled=False):
            motion, *modulation = self.mlp(control).split(self.widths, 1)
            generator = F.pad(rearrange(motion + self.generators(control), "b (i j) -> b i j", i=2), (0, 0, 0, 1))
            affine = generator + torch.eye(3).to(generator) if self.goes_round else torch.linalg.matrix_exp(generator)
            positions = self.positions(affine, height, width)
        size = positions.new_tensor([width, height])[:, None, None]
        inside = (torch.minimum(positions, size - 1 - positions) + 1).clamp(0, 1).prod(1, keepdim=True)
        return positions, inside, modulation

    @staticmethod
    def positions(affine, height, width):
        """affine: (B, 3, 3), from target to reference, in units of half the longer side, from the middle.

        Returns: (B, 2, h, w), x and y in the reference, in latents, of every latent of the target.
        """
        half = affine.new_tensor([width, height]) / 2
        y, x = torch.meshgrid(*(torch.arange(n, device=affine.device) + 0.5 for n in (height, width)), indexing="ij")
        here = (torch.stack([x, y]) - half[:, None, None]) / half.max()  # (2, h, w)
        there = einsum(affine[:, :2, :2], here, "b i j, j h w -> b i h w") + affine[:, :2, 2, None, None]
        return there * half.max() + half[:, None, None] - 0.5


class ViewTransformer(nn.Module):
    """A reference as it looks after a change: tokens of the target, which know the numbers, ask those of the reference.

    A token is a square of two latents a side.
    Source: Sajjadi et al. 2022, scene representation transformer.
    """

    def __init__(self, inputs, hidden, latent_channels):
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv2d(latent_channels, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 2, stride=2)
        )
        self.place = nn.Linear(2 + 4 * OCTAVES, WIDTH)
        self.numbers = make_mlp(nn.Linear, inputs, hidden, WIDTH)
        size = dict(dim=WIDTH, num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, ff_inner_dim=2 * WIDTH)
        self.reference = nn.ModuleList(BasicTransformerBlock(**size) for _ in range(REFERENCE_BLOCKS))
        self.target = nn.ModuleList(
            BasicTransformerBlock(**size, cross_attention_dim=WIDTH) for _ in range(TARGET_BLOCKS)
        )
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * FEATURES))

    def forward(self, control, reference):
        """control: (B, inputs), encoded. reference: (B, C, h, w), latents. Returns: (B, FEATURES, h, w)."""
        height, width = reference.shape[2:]
        seen = self.embed(F.pad(reference, (0, width % 2, 0, height % 2)))
        places = fourier_positions(*seen.shape[2:], OCTAVES, seen.device)
        places = self.place(rearrange(places, "c h w -> (h w) c"))
        tokens = rearrange(seen, "b c h w -> b (h w) c") + places
        for block in self.reference:
            tokens = block(tokens)
        with torch.autocast(control.device.type, enabled=False):
            hidden = places.float() + self.numbers(control)[:, None]
        for block in self.target:
            hidden = block(hidden, encoder_hidden_states=tokens)
        squares = rearrange(self.out(hidden), "b (h w) (c i j) -> b c (h i) (w j)", h=seen.shape[2], i=2, j=2)
        return squares[:, :, :height, :width]


def sample_bilinear(features, positions):
    """Interpolate between four neighbours; torch's grid_sample has no forward-mode derivative.

    features: (B, C, H, W). positions: (B, 2, h, w), x and y in units of the grid, clamped to it.
    Returns: (B, C, h, w).
    """
    width, size = features.shape[3], features.new_tensor(features.shape[:1:-1], dtype=positions.dtype)[:, None, None]
    positions = torch.minimum(positions.clamp_min(0), size - 1)
    corner = torch.minimum(positions.detach().floor(), size - 2)
    right, down = (positions - corner)[:, :, None].unbind(1)  # (B, 1, h, w) each
    whole = (corner[:, 1] * width + corner[:, 0]).nan_to_num(0).long()  # nan comes back by `right` and `down`
    index = rearrange(whole, "b h w -> b 1 (h w)")
    index, flat = index.expand(-1, features.shape[1], -1), features.flatten(2)
    neighbours = (flat.gather(2, index + k).unflatten(2, positions.shape[2:]) for k in (0, 1, width, width + 1))
    top, top_right, bottom, bottom_right = neighbours
    return (top * (1 - right) + top_right * right) * (1 - down) + (bottom * (1 - right) + bottom_right * right) * down


class Registration(Objective):
    """Image registration: residual between the target and the reference warped by the hint's own affine map.

    target: Target of B pictures with references. free: (d,) bool, of numbers that move the reference.
    pool: latents are averaged over squares of this many latents a side.
    Latents have mean 0 and spread 1, in every channel, over what both pictures show, so that the mean squared residual
    is 2 - 2 r, r being their correlation. The model is not called, so this costs next to nothing.
    Source: Evangelidis & Psarakis 2008, the enhanced correlation coefficient.
    """

    def __init__(self, model, target, free, pool=1):
        super().__init__(model, free, draws=1)
        self.target, self.pool, self.chunk = target, pool, 1024

    def residuals(self, control, index, draw_index):
        control_net, target = self.model.control_net, self.target.select(index)
        control = control_net.normalize(control[:, 0])
        positions, inside, _ = control_net.controlnet_cond_embedding.motion(control, *target.latents.shape[2:])
        shown = F.avg_pool2d(inside, self.pool)
        weights = shown / shown.mean((2, 3), keepdim=True).clamp_min(1e-3)

        def standardize(latents):
            latents = F.avg_pool2d(latents * inside, self.pool) / shown.clamp_min(1e-3)
            latents = latents - (latents * weights).mean((2, 3), keepdim=True)
            return latents / ((latents.square() * weights).mean((2, 3), keepdim=True) + 1e-6).sqrt()

        moved = standardize(sample_bilinear(target.reference, positions))
        residuals = (moved - standardize(target.latents)) * (weights + 1e-6).sqrt()
        return rearrange(residuals, "p c h w -> p 1 1 (c h w)")


def find_moving(control_net, size):
    """Returns: (d,) bool, which numbers move a reference of latents of `size`, (h, w)."""
    hint, config = control_net.controlnet_cond_embedding, control_net.config
    weight = hint.mlp[0].weight
    if hint.fusion == "attention":  # whose motion acts on nothing, and never learned
        return torch.zeros(control_net.control_dim, dtype=torch.bool, device=weight.device)
    low, high = (
        torch.tensor(b, dtype=torch.float64, device=weight.device) for b in (config.control_low, config.control_high)
    )
    points = ((low + high) / 2 + torch.diag((high - low) / 2) * sign for sign in (-1, 0, 1))
    first, middle, last = (hint.motion(control_net.normalize(point), *size)[0] for point in points)  # (d, 2, h, w)
    distance = torch.maximum((first - middle).norm(dim=1), (last - middle).norm(dim=1))
    return distance.mean((1, 2)) > STILL


def match_reference(model, target, control, free, bounds):
    """Move references onto their targets, from coarse to fine.

    control: (MATCHES, d), places to try for every target. free: (d,) bool, numbers that move the reference.
    bounds: (2, d), lowest and highest controls.
    Returns: the best places (P, d); the index (P,) of the target that each is for.
    """
    pool = max(1, min(target.latents.shape[2:]) // COARSEST)
    coarse, count = Registration(model, target, free, pool), len(target)
    every = torch.arange(count, device=control.device)
    losses = coarse.losses(control.repeat(count, 1), every.repeat_interleave(len(control)))
    best = rearrange(losses, "(b m) -> b m", b=count).topk(REFINED, largest=False).indices
    control, index = rearrange(control[best], "b r d -> (b r) d"), every.repeat_interleave(REFINED)
    while pool:
        found = levenberg_marquardt(Registration(model, target, free, pool), control, index, bounds)
        control, pool = found.control, pool // 2
    kept = keep_rivals(found, index, coarse, bounds, most=RIVALS)
    return control[kept], index[kept]
