"""What a control is judged by: residuals between what the model says at a control and what the target shows.

An objective of B targets maps controls (P, d), each for one of them, to residuals (P, K, N): K draws of noise, N
numbers each. Its loss is their mean square. Everything that does not depend on the control is computed once.
"""

import warnings
from abc import ABC, abstractmethod

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from cldm.controlnet import sample_bilinear
from cldm.model import ControlLDM
from ldm.ddim import ddim_timesteps
from ldm.unet import Encoded, encode_unet

CHUNK, SAVING_CHUNK = 16, 2  # pictures in one call of the model, without and with save_memory
DERIVATIVES = 3  # by so many numbers are taken of as many pictures at once; by twice as many, of half
LEVELS = (0.5, 1.0), (0.3, 0.8)  # of noise, without and with a reference; what errs least on validation pictures
STILL = 0.25  # latents: a number that moves the reference less, over half its range, does not move it
ATTENTION = 2**24  # attention weights that a derivative by forward mode keeps at once


def draw_noise(shape, count, seed, device, num_samples=1):
    """Returns: (count, num_samples, C, h, w) normal noise of a seed, the same for every picture of a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, num_samples, *shape[1:], generator=generator).to(device)


class SlicedAttention(TorchFunctionMode):
    """Attention for a slice of the queries at a time, since torch's fused kernels have no forward-mode derivative.

    Source: Rabe & Staats 2021, self-attention does not need O(n^2) memory.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, *rest = args
        rows = max(1, ATTENTION // (query.shape[:-2].numel() * key.shape[-2]))
        with sdpa_kernel(SDPBackend.MATH):
            return torch.cat([function(q, key, *rest, **(kwargs or {})) for q in query.split(rows, -2)], -2)


def forward_mode(function, control):
    """Returns: function(control) and its derivatives by each of the numbers that control (..., d) ends in, (..., d)."""

    def differentiate(axis):
        return torch.func.jvp(function, (control,), (axis.expand_as(control).contiguous(),))

    axes = torch.eye(control.shape[-1], dtype=control.dtype, device=control.device)
    # torch's own derivatives use what it warns of
    with SlicedAttention(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        return torch.func.vmap(differentiate, out_dims=(None, -1))(axes)


class Objective(ABC):
    """Residuals and their derivatives, in calls of at most CHUNK pictures.

    known: (B, d) numbers that are given, NaN where they are sought; None: all are. Controls, here and below, are the
    sought ones alone.
    calls: how many pictures the model was evaluated on so far; a derivative counts as one more.
    channels: C of the N = C h w numbers.
    """

    model: ControlLDM
    draws: int  # K
    known = None
    calls_each = 1  # evaluations of the model for one residual
    paired = False  # whether every two draws have opposite noise
    calls, channels = 0, 1

    @property
    def chunk(self):
        return SAVING_CHUNK if self.model.save_memory else CHUNK

    @abstractmethod
    def residuals(self, control, targets, draws):
        """control: (P, k, d). targets: (P,), which target each is for. draws: (k,), of the K. Returns: (P, k, N)."""

    def complete(self, control, targets):
        """control: (P, ..., f), those sought. targets: (P,). Returns: (P, ..., d), with those that are known."""
        if self.known is None:
            return control
        sought = self.known[0].isnan()
        parts, rest = iter(control.unbind(-1)), control[..., 0]
        known = [column.view(-1, *[1] * (rest.ndim - 1)).expand_as(rest) for column in self.known[targets].unbind(1)]
        return torch.stack([next(parts) if free else given for free, given in zip(sought, known)], -1)

    def _chunked(self, function, control, targets, draws, share=1):
        """Returns: what function(control (P, k, d), draws, targets) makes of them all: tensors (P, k, ...).

        share: one in so many of the pictures, P k, that a call may have, may be in one call of the function.
        """
        chunk = max(1, self.chunk // share)
        draws = torch.arange(self.draws) if draws is None else draws
        control = control[:, None].repeat(1, len(draws), 1)
        size, rows = max(1, chunk // len(draws)), []
        for some, whose in zip(control.split(size), targets.split(size)):
            parts = [function(*part, whose) for part in zip(some.split(chunk, 1), draws.split(chunk))]
            rows.append([torch.cat(tensors, 1) for tensors in zip(*parts)])
        return tuple(map(torch.cat, zip(*rows)))

    @torch.no_grad()
    def evaluate(self, control, targets, draws=None):
        """control: (P, d). targets: (P,). draws: (k,), by default all. Returns: residuals (P, k, N)."""

        def function(control, draws, targets):
            residuals = self.residuals(self.complete(control, targets), targets, draws)
            self.calls += control.shape[0] * control.shape[1] * self.calls_each
            return (residuals,)

        return self._chunked(function, control, targets, draws)[0]

    @torch.no_grad()
    def linearize(self, control, targets, draws=None):
        """Forward mode: one pass for all numbers, in the memory of an evaluation.

        control: (P, d). targets: (P,). draws: (k,), by default all.
        Returns: residuals (P, k, N) and their Jacobian (P, k, N, d).
        """

        def function(control, draws, targets):
            both = forward_mode(lambda c: self.residuals(self.complete(c, targets), targets, draws), control)
            self.calls += (1 + control.shape[2]) * control.shape[0] * control.shape[1] * self.calls_each
            return both

        return self._chunked(function, control, targets, draws, max(1, control.shape[1] // DERIVATIVES))

    def gradient(self, control, targets):
        """Reverse mode: the time of about two evaluations, however many numbers there are.

        control: (P, d). targets: (P,).
        Returns: residuals (P, K, N) and the gradient (P, K, d) of every draw's mean square.
        """

        def function(control, draws, targets):
            moving = control.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                residuals = self.residuals(self.complete(moving, targets), targets, draws)
                (gradient,) = torch.autograd.grad(residuals.square().mean(2).sum(), moving)
            self.calls += 2 * control.shape[0] * control.shape[1] * self.calls_each
            return residuals.detach(), gradient

        return self._chunked(function, control, targets, None)


class DenoisingObjective(Objective):
    """The likelihood bound of a diffusion model: how well noise added to the target is told from it, at a control.

    target_latents: (B, C, h, w). embeddings: (B, 77, D). reference: (B, C, h, w), as ControlLDM.predict has it.
    draws: K noises and timesteps, the same for every target, in pairs of opposite sign. levels: share of the noise
    schedule that the timesteps cover; None: as LEVELS says.
    Residuals are those of whatever the base predicts, noise or velocity.
    Source: Li et al. 2023, the diffusion classifier.
    """

    paired = True

    def __init__(self, model, target_latents, embeddings, reference=None, *, draws=8, levels=None, seed=0):
        levels = levels or LEVELS[reference is not None]
        pairs, self.draws, self.reference = draws // 2, draws // 2 * 2, reference
        scheduler, self.model, self.channels = model.base.scheduler, model, target_latents.shape[1]
        count, device = len(target_latents), target_latents.device
        low, high = (share * (scheduler.config.num_train_timesteps - 1) for share in levels)
        timesteps = (low + (high - low) * (torch.arange(pairs) + 0.5) / pairs).long()
        noise = draw_noise(target_latents.shape, pairs, seed, device)
        noise = torch.cat([noise, -noise], 1).flatten(0, 1)
        self.timesteps = timesteps.repeat_interleave(2).repeat(count).to(device)  # (B K,), as all below
        noise, clean = noise.repeat(count, 1, 1, 1), target_latents.repeat_interleave(self.draws, 0)
        self.noisy = scheduler.add_noise(clean, noise, self.timesteps)
        self.wanted = model.base.prediction_target(clean, noise, self.timesteps)
        with torch.no_grad():
            inputs = (self.noisy, self.timesteps, embeddings.repeat_interleave(self.draws, 0))
            chunks = zip(*(tensor.split(self.chunk) for tensor in inputs))
            self.encoded = Encoded.cat([encode_unet(model.base.unet, *chunk) for chunk in chunks])

    def residuals(self, control, targets, draws):
        index = (targets[:, None] * self.draws + draws.to(targets.device)).flatten()
        encoded = self.encoded.select(index)
        prediction = self.model.predict(
            self.noisy[index],
            self.timesteps[index],
            encoded.embeddings,
            control.flatten(0, 1),
            None if self.reference is None else self.reference[index // self.draws],
            encoded=encoded,
        )
        return (prediction - self.wanted[index]).flatten(1).unflatten(0, control.shape[:2])


class MotionObjective(Objective):
    """How unlike the target the reference is where its hint looks for it. No model is called: it costs next to nothing.

    target_latents, reference: (B, C, h, w). known: (d,), of all targets, NaN where sought. What moves nothing is left
    in the middle of its range.
    Residuals are those of latents averaged over squares of `pool`, with mean 0 and spread 1 in every channel of what
    both pictures show: their mean square is twice what their correlation lacks of 1.
    Source: Evangelidis & Psarakis 2008, the enhanced correlation coefficient.
    """

    draws, calls_each, pool, chunk = 1, 0, 1, 1024

    def __init__(self, model, target_latents, reference, known):
        self.model, self.target, self.reference = model, target_latents, reference
        config, hint = model.control_net.config, model.control_net.controlnet_cond_embedding
        low, high = (known.new_tensor(bound) for bound in (config.control_low, config.control_high))
        points = ((low + high) / 2 + torch.diag((high - low) / 2) * sign for sign in (-1, 0, 1))
        first, middle, last = (
            hint.motion(model.control_net.normalize(point), *reference.shape[2:])[0] for point in points
        )  # (d, 2, h, w) each
        moves = torch.maximum((first - middle).norm(dim=1), (last - middle).norm(dim=1)).mean((1, 2)) > STILL
        self.moving = moves & known.isnan()  # (d,)
        self.known = known.where(moves | ~known.isnan(), (low + high) / 2).expand(len(target_latents), -1)

    def residuals(self, control, targets, draws):
        control_net, target = self.model.control_net, self.target[targets]
        control = control_net.normalize(control[:, 0])
        positions, inside, _ = control_net.controlnet_cond_embedding.motion(control, *target.shape[2:])
        moved, shown = sample_bilinear(self.reference[targets], positions), F.avg_pool2d(inside, self.pool)
        weights = shown / shown.mean((2, 3), keepdim=True).clamp_min(1e-3)

        def normalize(latents):
            latents = F.avg_pool2d(latents * inside, self.pool) / shown.clamp_min(1e-3)
            latents = latents - (latents * weights).mean((2, 3), keepdim=True)
            return latents / ((latents.square() * weights).mean((2, 3), keepdim=True) + 1e-6).sqrt()

        residuals = (normalize(moved) - normalize(target)) * (weights + 1e-6).sqrt()
        return residuals.flatten(1)[:, None]


class SamplingObjective(Objective):
    """Test5's: generate by DDIM at a control, compare latents with the target's.

    input_latents, target_latents: (B, C, h, w); the first are the reference of a control that takes one.
    embeddings, negative: (B, 77, D). draws: K pictures, each from noise of its own, the same for every target.
    seed: of noise for `longest` steps, by default ddim_steps.
    how: scale, strength, eta, guess_mode and recompute, as ControlLDM.generate has them.
    """

    def __init__(
        self,
        model,
        input_latents,
        target_latents,
        embeddings,
        *,
        negative=None,
        draws=1,
        ddim_steps=32,
        denoise_strength=1.0,
        longest=None,
        seed=0,
        **how,
    ):
        self.model, self.target, self.draws, self.how = model, target_latents, draws, how
        self.channels = target_latents.shape[1]
        self.embeddings, self.negative = embeddings, negative
        self.reference = input_latents if model.control_net.uses_reference else None
        shape, device = target_latents.shape, target_latents.device
        self.noise = draw_noise(shape, 1 + (longest or ddim_steps), seed, device, draws)
        self.start_from(input_latents[:, None].expand(-1, draws, -1, -1, -1), ddim_steps, denoise_strength)

    def start_from(self, latents, ddim_steps, denoise_strength):
        """Let all chains start from latents (B, K, C, h, w), noised as far as the first of `ddim_steps` steps asks."""
        self.steps = (self.model.base.scheduler, ddim_steps, denoise_strength)
        self.calls_each = ddim_steps * (1 if self.how.get("scale", 1.0) == 1.0 else 2)
        first = ddim_timesteps(*self.steps)[:1].to(latents.device)
        self.noisy = self.model.base.scheduler.add_noise(latents, self.noise[0].expand_as(latents), first)

    def residuals(self, control, targets, draws):
        def repeat(tensor):
            return None if tensor is None else tensor[targets].repeat_interleave(len(draws), 0)

        generated = self.model.generate(
            self.noisy[targets][:, draws].flatten(0, 1),
            ddim_timesteps(*self.steps),
            repeat(self.embeddings),
            control.flatten(0, 1),
            reference=repeat(self.reference),
            negative=repeat(self.negative),
            noise=self.noise[1:, draws].repeat(1, len(targets), 1, 1, 1),
            **self.how,
        )
        return (generated - repeat(self.target)).flatten(1).unflatten(0, control.shape[:2])
